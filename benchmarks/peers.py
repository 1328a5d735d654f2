"""A steady Fisher pass beside other libraries that compute the same Fisher, in one interleaved run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .fisher import TOLERANCE, Subject, errors_of, memory, peak_bytes, steady, subject_of
from .models import Block
from .peer_libraries import Way, ways
from .plumbing.parts import Cases
from .plumbing.progress import progress
from .roofs import tf32
from .timing import Budget, Contender, quartiles, ratio
from .workloads import KNOWN, Workload

PACKAGES = {"BackPACK": ("backpack", "backpack-for-pytorch"), "Opacus": ("opacus", "opacus")}
OURS = "wplfast"
NOT_TRIED = "not tried for lack of time"
LATE = 2  # times the budget of a case, after which no further way of a peer is tried
SHARE = 1 / 8  # of a case's time that one peer may take

Run = Callable[[], list[Tensor]]


def has_attention(subject: Subject) -> bool:
    """Tell whether a workload's model has transformer blocks."""
    return any(isinstance(module, Block) for module in subject.ordinary.modules())


def error_of(found: Sequence[Tensor], expected: Mapping[str, Tensor], n: int) -> float:
    """Return the largest error of sums of squares against means, relative to a parameter's largest entry."""
    return errors_of({name: f / n for name, f in zip(expected, found, strict=True)}, expected)["largest"]


def limit_of(subject: Subject, expected: Mapping[str, Tensor]) -> float:
    """Return the largest error of a right result; in a lower precision, a few times that of a one-sample loop in it."""
    if subject.precision == "fp32":
        return TOLERANCE
    return 4 * errors_of(subject.one_by_one(subject.ordinary, torch.float32), expected)["largest"]


def choose(
    candidates: Iterable[Way], subject: Subject, expected: Mapping[str, Tensor], seconds: float, limit: float
) -> tuple[Run | None, dict]:
    """Try the ways of one peer and keep the fastest right one, or the fastest wrong one if none is right.

    Args:
        candidates: what to try.
        subject: model and batch.
        expected: the oracle's Fisher.
        seconds: no further way is tried after that.
        limit: the largest error of a right result.

    Returns:
        What runs the way kept, None if all raise; and the record of what was tried.
    """
    kept: tuple[bool, float] | None = None
    run, record, tried, started = None, {}, [], time.perf_counter()
    for way in candidates:
        if tried and time.perf_counter() - started > seconds:
            tried.append({"setting": str(way), "error": NOT_TRIED})
            continue
        try:
            candidate = way.over(subject.ordinary, *subject.batch)
            found, once = _timed(candidate)
            error = error_of(found, expected, len(subject.batch[1]))
            if kept is None or once < 4 * kept[1]:  # the first call warmed up
                once = _timed(candidate)[1]
        except Exception as raised:  # a peer may fail in any manner, and says how
            words = " ".join(str(raised).split())
            words = words[:117] + "..." if len(words) > 120 else words
            tried.append({"setting": str(way), "error": f"{type(raised).__name__}: {words}"})
            continue
        tried.append({"setting": str(way), "seconds": once, "relative_error": error})
        rank = (not error < limit, once)
        if kept is None or rank < kept:
            kept, run, record = rank, candidate, {"setting": str(way), "relative_error": error, "right": not rank[0]}
    if run is None:
        record = {"error": tried[0]["error"]}
    return run, {**record, "tried": tried}


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
    expected = subject.oracle()
    limit = limit_of(subject, expected)
    runs: dict[str, Run] = {}
    results: dict[str, dict] = {OURS: {}}
    for name, candidates in ways(len(subject.batch[1]), has_attention(subject)).items():
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
            results[name] = {"error": "not installed"}
            continue
        run, results[name] = choose(candidates, subject, expected, LATE * budget.seconds, limit)
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
        "parameters": subject.numel,
        "samples": len(subject.batch[1]),
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
    found: dict[str, str | None] = {}
    for _, package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
