"""A steady Fisher pass beside other libraries that compute the same Fisher, in one interleaved run."""

from __future__ import annotations

import importlib.util
import math
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .fisher import TOLERANCE, Subject, errors_of, memory, peak_bytes, steady, subject_of
from .peer_libraries import Way, ways
from .plumbing.parts import Cases
from .plumbing.progress import progress
from .plumbing.record import version
from .roofs import tf32
from .timing import Budget, Contender, quartiles, ratio
from .workloads import KNOWN, Workload

PACKAGES = {"BackPACK": ("backpack", "backpack-for-pytorch"), "Opacus": ("opacus", "opacus")}
OURS = "wplfast"
NOT_TRIED = "not tried for lack of time"
LATE = 2  # times the budget of a case, after which no further way of a peer is tried
SHARE = 1 / 8  # of a case's time that one peer may take

Run = Callable[[], list[Tensor]]


def error_of(found: Sequence[Tensor], expected: Mapping[str, Tensor], n: int) -> float:
    """Return the largest error of sums of squares against means, relative to a parameter's largest entry."""
    return errors_of({name: f / n for name, f in zip(expected, found, strict=True)}, expected)["largest"]


def choose(
    candidates: Iterable[Way], subject: Subject, expected: Mapping[str, Tensor], limit: float, seconds: float
) -> tuple[Run | None, dict]:
    """Try the ways of one peer and keep the fastest right one, or the fastest wrong one if none is right.

    Args:
        candidates: what to try.
        subject: model and batch.
        expected: the oracle's Fisher.
        limit: the largest error of a right result.
        seconds: no further way is tried after that.

    Returns:
        What runs the way kept, None if all raise; and the record of what was tried.
    """
    kept: list[tuple[tuple[bool, float], Run, dict]] = []
    tried, started = [], time.perf_counter()
    for way in candidates:
        record: dict = {"setting": str(way)}
        tried.append(record)
        if tried[1:] and time.perf_counter() - started > seconds:
            record["error"] = NOT_TRIED
            continue
        try:
            run = way.over(subject.ordinary, *subject.batch)
            found, once = _timed(run)
            error = error_of(found, expected, len(subject.batch[1]))
            if once < 4 * min((rank[1] for rank, _, _ in kept), default=math.inf):  # the first call warmed up
                once = _timed(run)[1]
        except Exception as raised:  # a peer may fail in any manner, and says how
            record["error"] = textwrap.shorten(f"{type(raised).__name__}: {raised}", 140, placeholder="...")
            continue
        record |= {"seconds": once, "relative_error": error}
        kept.append(((not error < limit, once), run, record))
    if not kept:
        return None, {"error": tried[0]["error"], "tried": tried}
    (wrong, _), run, record = min(kept, key=lambda item: item[0])
    return run, {key: record[key] for key in ("setting", "relative_error")} | {"right": not wrong, "tried": tried}


def _timed(run: Run) -> tuple[list[Tensor], float]:
    """Return what a call returns, and its seconds."""
    started = time.perf_counter()
    found = run()
    found[0].sum().item()  # waits for a GPU
    return found, time.perf_counter() - started


def measure_workload(workload: Workload, budget: Budget, seed: int = 0) -> dict:
    """Check and time all contenders on one workload; return its record."""
    with tf32(workload.precision == "tf32"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers warn about hooks, vmap about operations without a batching rule
        return _measure(workload, subject_of(workload, budget.device, budget.quick, seed), budget)


def _measure(workload: Workload, subject: Subject, budget: Budget) -> dict:
    """Check and time all contenders on a model; return its record."""
    expected, limit, samples = subject.oracle(), TOLERANCE, len(subject.batch[1])
    if subject.precision != "fp32":  # a few times the error of a one-sample loop in that precision
        limit = 4 * errors_of(subject.one_by_one(subject.ordinary), expected)["largest"]
    runs: dict[str, Run] = {}
    results: dict[str, dict] = {OURS: {}}
    for name, candidates in ways(samples, subject.ordinary).items():
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
            results[name] = {"error": "not installed"}
            continue
        run, results[name] = choose(candidates, subject, expected, limit, LATE * budget.seconds)
        if run is not None:
            runs[name] = run
    del expected
    with steady(subject, workload.precision == "fp32") as fisher_pass:
        results[OURS] = {"relative_error": subject.error, "right": not subject.wrong}
        contenders = {"unit": Contender(subject.unit, subject.clear), OURS: Contender(fisher_pass, subject.clear)}
        contenders |= {n: Contender(run, subject.clear, SHARE * budget.seconds) for n, run in runs.items()}
        times = budget.time(contenders)
        peaks = memory(subject, fisher_pass, budget.device)
    peak = {OURS: peaks["fisher_pass"]} | {name: peak_bytes(run, budget.device) for name, run in runs.items()}
    for name in peak:
        results[name] |= {
            "milliseconds": quartiles(times[name], 1e3),
            "ratio": ratio(times[name], times["unit"]),
            "rounds": len(times[name]),
            "peak_bytes": peak[name],
        }
    return {
        "workload": workload.name,
        "shown": workload.shown,
        "parameters": sum(p.numel() for p in subject.ordinary.parameters()),
        "samples": samples,
        "unit": {"milliseconds": quartiles(times["unit"], 1e3), "peak_bytes": peaks["unit"]},
        "one_fisher_bytes": peaks["one_fisher"],
        "limit": limit,
        "contenders": results,
    }


def run(budget: Budget, names: Sequence[str]) -> list[dict]:
    """Measure the named workloads."""
    return [measure_workload(KNOWN[name], budget) for name in progress(names, "peers")]


def case(device: torch.device, quick: bool, name: str) -> dict:
    """Measure one workload with weights and inputs that no run before had."""
    seed = int.from_bytes(os.urandom(4), "little")
    budget = Budget(device, 4, 0.2, True) if quick else Budget(device, 30, 4.0)
    return {"seed": seed, **measure_workload(KNOWN[name], budget, seed)}


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured on a GPU."""
    return {name: partial(case, device, quick, name) for name in ("gpt2", "mlp", "resnet50", "lstm", "decoder", "cell")}


def versions() -> dict[str, str | None]:
    """Return the versions of the peers that are packages; None where one is not installed."""
    return {package: version(package) for _, package in PACKAGES.values()}
