"""A steady Fisher pass beside other libraries that compute the same Fisher, in one interleaved run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from .fisher import KNOWN, TOLERANCE, Model, errors_of, memory, one_by_one, oracle, peak_bytes, steady
from .plumbing.parts import Cases
from .plumbing.peer_libraries import Way, ways
from .plumbing.progress import progress
from .roofs import tf32
from .timing import Contender, Spread, interleave, ratio
from .workloads import Block, Workload

PACKAGES = {"BackPACK": ("backpack", "backpack-for-pytorch"), "Opacus": ("opacus", "opacus")}
OURS = "wplfast"
NOT_TRIED = "not tried for lack of time"

Run = Callable[[], list[Tensor]]


def error_of(found: Sequence[Tensor], expected: Mapping[str, Tensor], n: int) -> float:
    """Return the largest error of sums of squares against the oracle's means, relative to a parameter's largest entry.

    Raises:
        ValueError: if shapes differ.
    """
    worst = 0.0
    for f, e in zip(found, expected.values(), strict=True):
        if f.shape != e.shape:
            raise ValueError(f"expected a Fisher of shape {list(e.shape)}, got {list(f.shape)}")
        worst = max(worst, ((f / n - e).abs().max() / e.abs().max()).nan_to_num(torch.inf).item())
    return worst


def has_attention(model: Model) -> bool:
    """Tell whether a workload's model has transformer blocks."""
    return any(isinstance(module, Block) for module in model.ordinary.modules())


def limit_of(model: Model, expected: Mapping[str, Tensor]) -> float:
    """Return the largest error of a right result; in a lower precision, a few times that of a one-sample loop in it."""
    if model.workload.precision == "fp32":
        return TOLERANCE
    return 4 * errors_of(one_by_one(model.ordinary, model.batch, torch.float32), expected)["largest"]


def choose(
    candidates: Iterable[Way], model: Model, expected: Mapping[str, Tensor], seconds: float, limit: float = TOLERANCE
) -> tuple[Run | None, dict]:
    """Try the ways of one peer and keep the fastest right one, or the fastest wrong one if none is right.

    Args:
        candidates: what to try.
        model: the workload.
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
            candidate = way.over(model.ordinary, *model.batch)
            found, once = _timed(candidate)
            error = error_of(found, expected, len(model.batch[1]))
            if kept is None or once < 4 * kept[1]:  # the first call warmed up
                once = _timed(candidate)[1]
        except Exception as raised:  # a peer may fail in any manner, and says how
            tried.append({"setting": str(way), "error": _shortened(raised)})
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


def _shortened(error: Exception) -> str:
    """Return an error's type and the beginning of what it says."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:117] + '...' if len(words) > 120 else words}"


def measure_workload(
    workload: Workload, device: torch.device, quick: bool, rounds: int, seconds: float, seed: int = 0
) -> dict:
    """Check and time all contenders on one workload; return its record."""
    with tf32(workload.precision == "tf32"):
        return _measure(Model(workload, device, quick, seed), device, rounds, seconds)


def _measure(model: Model, device: torch.device, rounds: int, seconds: float) -> dict:
    """Check and time all contenders on a model; return its record."""
    workload, expected = model.workload, oracle(model.ordinary, model.batch)
    limit = limit_of(model, expected)
    runs: dict[str, Run] = {}
    results: dict[str, dict] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers warn about hooks, vmap about operations without a batching rule
        for name, candidates in ways(len(model.batch[1]), has_attention(model)).items():
            if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
                results[name] = {"error": "not installed"}
                continue
            run, results[name] = choose(candidates, model, expected, 2 * seconds, limit)
            if run is not None:
                runs[name] = run
        del expected
        with steady(model, workload.precision == "fp32") as fisher_pass:
            ours = {"relative_error": model.error, "right": not model.wrong}
            contenders = {"unit": Contender(model.unit, model.clear), OURS: Contender(fisher_pass, model.clear)}
            contenders |= {name: Contender(run, model.clear, seconds / 8) for name, run in runs.items()}
            times = interleave(contenders, rounds, seconds, device)
            peaks = memory(model, fisher_pass, device)
        peak = {OURS: peaks["fisher_pass"]} | {name: peak_bytes(run, device) for name, run in runs.items()}
    results = {OURS: ours, **results}
    for name in peak:
        results[name] |= {
            "milliseconds": asdict(Spread.of(times[name], 1e3)),
            "ratio": asdict(ratio(times[name], times["unit"][: len(times[name])])),
            "rounds": len(times[name]),
            "peak_bytes": peak[name],
        }
    return {
        "workload": workload.name,
        "shown": workload.shown,
        "parameters": sum(p.numel() for p in model.ordinary.parameters()),
        "samples": len(model.batch[1]),
        "unit": {"milliseconds": asdict(Spread.of(times["unit"], 1e3)), "peak_bytes": peaks["unit"]},
        "one_fisher_bytes": peaks["one_fisher"],
        "limit": limit,
        "contenders": results,
    }


def run(device: torch.device, names: Sequence[str], quick: bool, rounds: int, seconds: float) -> list[dict]:
    """Measure the named workloads."""
    return [measure_workload(KNOWN[name], device, quick, rounds, seconds) for name in progress(names, "peers")]


def case(device: torch.device, quick: bool, name: str) -> dict:
    """Measure one workload with weights and inputs that no run before had."""
    seed = int.from_bytes(os.urandom(4), "little")
    return {
        "seed": seed,
        **measure_workload(KNOWN[name], device, quick, 4 if quick else 30, 0.2 if quick else 4.0, seed),
    }


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured on a GPU."""
    return {name: partial(case, device, quick, name) for name in ("gpt2", "mlp", "resnet50", "lstm", "decoder", "cell")}


def short_table(found: dict) -> str:
    """Return a line for each workload: time of each contender over the unit's, and peak memory."""
    lines = []
    for name, record in found.items():
        cells = []
        for way, result in record["contenders"].items():
            if "ratio" not in result:
                cells.append(f"{way}: {result['error'][:60]}")
                continue
            wrong = "" if result["right"] else f" WRONG {result['relative_error']:.0e}"
            cells.append(f"{way} {result['ratio']['median']:.3g} {result['peak_bytes'] / 1e9:.2f} GB{wrong}")
        lines.append(f"{name}: time over a unit, peak memory: {'; '.join(cells)}")
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """Return the versions of the peers that are packages; None where one is not installed."""
    found: dict[str, str | None] = {}
    for _, package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def table(records: Sequence[dict]) -> str:
    """Return a table for people: medians, with quartiles in brackets."""
    lines = [f"{'':12}{'ms':>24} {'of the unit':>22} {'rounds':>6} {'peak MB':>8} {'rel. error':>10}  setting"]
    for record in records:
        unit = record["unit"]
        lines += ["", record["shown"]]
        lines.append(
            f"{'unit':12}{Spread(**unit['milliseconds'])!s:>24} {'1':>22} {'':>6} {unit['peak_bytes'] / 1e6:8.1f}"
        )
        for name, result in record["contenders"].items():
            if "ratio" not in result:
                lines.append(f"{name:12}  {result['error']}")
                continue
            time, of_unit = (Spread(**result[key]) for key in ("milliseconds", "ratio"))
            shown = f"{time!s:>24} {of_unit!s:>22} {result['rounds']:6} {result['peak_bytes'] / 1e6:8.1f}"
            lines.append(
                f"{name:12}{shown} {result['relative_error']:10.1e}  {_remark(result, record['limit'])}".rstrip()
            )
    return "\n".join(lines)


def _remark(result: dict, limit: float) -> str:
    """Return the setting, whether it is wrong, and which other settings are wrong or raise."""
    others, late = [], 0
    for tried in result.get("tried", []):
        if tried["setting"] == result["setting"]:
            continue
        if tried.get("error") == NOT_TRIED:
            late += 1
        elif "error" in tried:
            others.append(f"{tried['setting']}: {tried['error'].partition(':')[0]}")
        elif not tried["relative_error"] < limit:
            others.append(f"{tried['setting']}: wrong by {tried['relative_error']:.1e}")
    others += [f"{late} {NOT_TRIED}"] * bool(late)
    wrong = "" if result["right"] else "WRONG, "
    return wrong + result.get("setting", "") + (f" ({'; '.join(others)})" if others else "")
