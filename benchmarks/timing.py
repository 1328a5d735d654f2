"""Interleaved timing: every contender runs once a round, so that a busy machine slows them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle

import torch

TICK = 1e-3  # seconds that one measurement should at least last
QUEUED = 100  # calls that a GPU's queue surely holds, of a few launches each
PAUSED = 10**7  # cycles of the pause that others are calibrated with
ROTATED = 1 << 28  # bytes of inputs, several times the L2 cache of any GPU, that calls go through in turn

Quartiles = dict[str, float]


@dataclass
class Contender:
    """Something to time.

    Args:
        run: the work.
        prepare: runs before it, untimed; the work is then timed call by call.
        seconds: once it has taken so long in all, and has run in three rounds, it sits out the rest.
        alone: on a GPU, time the kernels without the host: calls are queued during a pause.
        host: seconds that the host took for a call in the warm-up, where it was measured.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    seconds: float = math.inf
    alone: bool = False
    host: float = math.nan


@dataclass(frozen=True)
class Budget:
    """Where contenders are timed, and for how long.

    Args:
        device: where the work runs.
        rounds: how many rounds to run.
        seconds: time after which no further round begins, except that three always run.
        quick: tiny sizes, to test the programs that measure.
    """

    device: torch.device
    rounds: int = 40
    seconds: float = 30.0
    quick: bool = False

    def time(self, contenders: Mapping[str, Contender]) -> dict[str, list[float]]:
        """Time all contenders in every round, each round in another order.

        Returns:
            Seconds per call by name, one entry per round that it took part in: the first ones.
        """
        repeats = {name: _repeats(contender, self.device) for name, contender in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        order, started = list(contenders), time.perf_counter()
        for done in range(self.rounds):
            if done >= 3 and time.perf_counter() - started > self.seconds:
                break
            shift = done // 2 % len(order)
            turn = order[shift:] + order[:shift]
            for name in turn if done % 2 == 0 else reversed(turn):
                if done < 3 or repeats[name] * sum(times[name]) < contenders[name].seconds:
                    times[name].append(measure(contenders[name], repeats[name], self.device))
        return times


def quartiles(values: Sequence[float], factor: float = 1.0) -> Quartiles:
    """Return median, quartiles and least of at least one value, multiplied with a factor."""
    scaled = [factor * value for value in values]
    q1, median, q3 = statistics.quantiles(scaled, n=4, method="inclusive") if len(scaled) > 1 else scaled * 3
    return {"median": median, "q1": q1, "q3": q3, "best": min(scaled)}


def ratio(over: Sequence[float], under: Sequence[float], factor: float = 1.0) -> Quartiles:
    """Summarise the ratios of two contenders, round by round while both ran; ``best`` is that of their least times."""
    found = quartiles([a / b for a, b in zip(over, under, strict=False)], factor)
    return found | {"best": factor * min(over) / min(under)}


def measure(contender: Contender, repeats: int, device: torch.device) -> float:
    """Return the seconds of one call, averaged over some calls in a row."""
    if contender.prepare is not None:
        contender.prepare()
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        if contender.alone and contender.host == contender.host:
            torch.cuda._sleep(int((1.5 * repeats * contender.host + 1e-4) * _cycles(device)))
        begin.record()
        for _ in range(repeats):
            contender.run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        contender.run()
    return (time.perf_counter() - started) / repeats


def _repeats(contender: Contender, device: torch.device) -> int:
    """Return how many calls in a row a measurement needs."""
    first = measure(contender, 1, device)
    if contender.prepare is not None or (first > 100 * TICK and not contender.alone):
        return 1
    if contender.alone:
        contender.host = min(_enqueue(contender, device) for _ in range(3))
    once = min(measure(contender, 1, device) for _ in range(2 + contender.alone))
    repeats = max(1, math.ceil(TICK / max(once, 1e-6)))
    return min(QUEUED, repeats) if contender.alone and device.type == "cuda" else repeats


def _enqueue(contender: Contender, device: torch.device) -> float:
    """Return the seconds after which a call returns, whether or not its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    contender.run()
    return time.perf_counter() - started


@lru_cache
def _cycles(device: torch.device) -> float:
    """Return how many cycles a GPU's pause counts in a second."""
    times = [measure(Contender(lambda: torch.cuda._sleep(PAUSED)), 1, device) for _ in range(3)]
    return PAUSED / min(times)


def rotating(run: Callable[..., object], inputs: Sequence[Sequence[object]]) -> Callable[[], object]:
    """Return what calls a function with the next inputs each time, so that caches do not hold them."""
    turn = cycle(inputs)
    return lambda: run(*next(turn))


def rotations(n_bytes: int, device: torch.device) -> int:
    """Return how many sets of inputs of so many bytes do not fit a GPU's cache; 2 on a CPU."""
    return min(64, max(2, math.ceil(ROTATED / max(1, n_bytes)))) if device.type == "cuda" else 2
