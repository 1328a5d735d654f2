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
class Spread:
    """Median, quartiles and least of several measurements."""

    median: float
    q1: float
    q3: float
    best: float

    @classmethod
    def of(cls, values: Sequence[float], factor: float = 1.0) -> Spread:
        """Summarise at least one value, multiplied with a factor."""
        scaled = [factor * value for value in values]
        q1, median, q3 = statistics.quantiles(scaled, n=4, method="inclusive") if len(scaled) > 1 else scaled * 3
        return cls(median, q1, q3, min(scaled))

    def __str__(self) -> str:
        """Show the median and the quartiles."""
        return f"{self.median:.3g} [{self.q1:.3g}, {self.q3:.3g}]"


def interleave(
    contenders: Mapping[str, Contender], rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Time all contenders in every round, each round in another order.

    Args:
        contenders: by name; each is run once to warm up.
        rounds: how many rounds to run.
        seconds: time after which no further round begins, except that three always run.
        device: where the work runs.

    Returns:
        Seconds per call by name, one entry per round that it took part in: the first ones.
    """
    repeats = {name: _repeats(contender, device) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, started = list(contenders), time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        shift = done // 2 % len(order)
        turn = order[shift:] + order[:shift]
        for name in turn if done % 2 == 0 else reversed(turn):
            if done < 3 or repeats[name] * sum(times[name]) < contenders[name].seconds:
                times[name].append(measure(contenders[name], repeats[name], device))
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Summarise the ratios of two contenders, round by round; ``best`` is that of their least times."""
    spread = Spread.of([a / b for a, b in zip(over, under, strict=True)])
    return Spread(spread.median, spread.q1, spread.q3, min(over) / min(under))


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
    if contender.alone and contender.prepare is None:
        contender.host = min(_enqueue(contender, device) for _ in range(3))
        once = min(measure(contender, 1, device) for _ in range(3))
        return max(1, min(QUEUED, math.ceil(TICK / max(once, 1e-6))))
    if contender.prepare is not None or first > 100 * TICK:
        return 1
    once = min(measure(contender, 1, device) for _ in range(2))
    return max(1, math.ceil(TICK / max(once, 1e-6)))


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


def triads(n_bytes: int, device: torch.device) -> dict[str, Contender]:
    """Return the memory roofs: ``c = a + s b``, ``a = a + s b`` and a copy over arrays of so many bytes in all.

    All three are counted as bytes read plus bytes written. A processor that reads a cache line before it writes it
    moves a third more for the triad and half as much again for the copy, and no more for the one in place.
    """
    a, b = torch.zeros(2, n_bytes // 12, device=device).unbind()
    d, e = torch.zeros(2, n_bytes // 8, device=device).unbind()
    return {
        "triad": triad(n_bytes, device),
        "triad in place": Contender(lambda: a.add_(b, alpha=1e-3)),
        "copy": Contender(lambda: d.copy_(e)),
    }


def triad(n_bytes: int, device: torch.device) -> Contender:
    """Return the first of the roofs alone."""
    a, b, c = torch.zeros(3, n_bytes // 12, device=device).unbind()
    return Contender(lambda: torch.add(a, b, alpha=1e-3, out=c))
