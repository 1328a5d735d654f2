"""One case: candidates are compiled, checked against float64 and for equal bits, and timed beside a yardstick."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from wplfast.backends.triton.launch import INTERPRETED

from ..timing import Contender, Spread, interleave, ratio

#: What the library does without being told.
DEFAULT = "default"


@dataclass
class Contest:
    """Ways to add the same thing to ``result``.

    Args:
        name: what is computed.
        result: what the ways add to; ``expected`` is what they add to zeros.
        ways: candidates by name, with the default among them.
        expected: computes the right result in float64.
        limit: norm of the error over the norm of the result.
        yardstick: name and work of what the candidates are measured by.
        unit: how much of the yardstick's work a candidate does, for shares of its rate.
        threads: whether candidates may be compiled side by side.
    """

    name: str
    result: Tensor
    ways: Mapping[str, Callable[[], object]]
    expected: Callable[[], Tensor]
    limit: float
    yardstick: tuple[str, Callable[[], object]]
    unit: float = 1.0
    threads: bool = True
    left_out: dict[str, str] = field(default_factory=dict)


def compile_all(contest: Contest) -> None:
    """Run every candidate once, in threads: what compiles outside Python's lock does so side by side."""
    if INTERPRETED or not contest.threads:
        return

    def attempt(run: Callable[[], object]) -> None:
        with suppress(Exception):  # it fails again where it is checked, and is recorded there
            run()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(attempt, contest.ways.values()))
    if contest.result.is_cuda:
        torch.cuda.synchronize(contest.result.device)


def check(contest: Contest) -> dict[str, float]:
    """Return the errors of the candidates that are right, and note why others are left out."""
    expected = contest.expected()
    scale = expected.norm().item()
    errors = {}
    for name, run in contest.ways.items():
        try:
            results = []
            for _ in range(2):
                contest.result.zero_()
                run()
                results.append(contest.result.clone())
            error = (results[0].double() - expected).norm().item() / scale
            if not error <= contest.limit:
                contest.left_out[name] = f"wrong: error {error:.2g}, limit {contest.limit:.2g}"
            elif not torch.equal(*results):
                contest.left_out[name] = "two runs differ in bits"
            else:
                errors[name] = error
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [""]
            contest.left_out[name] = f"{type(problem).__name__}: {lines[-1][:200]}"
    return errors


def hold(contest: Contest, rounds: int, seconds: float) -> dict:
    """Check and time all candidates of a case; return its record."""
    errors = check(contest)
    record: dict = {"case": contest.name, "yardstick": contest.yardstick[0], "left_out": contest.left_out}
    if not errors:
        return record | {"results": {}}
    device = contest.result.device
    contenders = {name: Contender(contest.ways[name]) for name in errors}
    contenders[contest.yardstick[0]] = Contender(contest.yardstick[1])
    times = interleave(contenders, rounds, seconds, device)
    results = {}
    for name, measured in times.items():
        results[name] = {"microseconds": asdict(Spread.of(measured, 1e6))}
        if name in errors:
            results[name]["relative_error"] = errors[name]
            share = ratio(times[contest.yardstick[0]], measured)
            results[name]["share_of_yardstick"] = contest.unit * share.median
            if DEFAULT in times:
                results[name]["gain_over_default"] = ratio(times[DEFAULT], measured).median
    return record | {"rounds": min(map(len, times.values())), "results": results}
