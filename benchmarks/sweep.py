"""The penalty from a thousand parameters to 10^8.5, in 1 to 1,000 tensors, each beside a triad of the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from .contenders import BYTES, MAKERS, NO_VALUE, WAYS, Case, check, make, net_shapes
from .plumbing.malloc import available, give_back
from .plumbing.progress import progress
from .timing import Contender, Spread, interleave, triad

SIZES = tuple(round(10 ** (k / 2)) for k in range(6, 18))
TENSORS = (1, 10, 100, 1000)
QUICK_SIZES, QUICK_TENSORS = (1000, 10000), (1, 10, 1000)
ELEMENTS = 16  # a tensor has at least about so many, or the case is skipped
COMPILED = 100  # tensors: the compiler unrolls the loop over them, 0.2 s each
COMPILED_BETWEEN = 10  # tensors, for sizes between decades
APART = 2 * 10**8  # parameters beyond which ways run one after another: together they take 100 bytes for each
#: Peak memory in bytes a parameter, with the case itself: glibc finds no use for most of what a flat vector frees.
NEEDED = {"ours": 48, "plain": 48, "flat": 90, "compiled": 32}
WARMED = 2  # rounds before those that count, where ways run one after another: until then, their memory is new
USED = 0.8  # share of the available memory that a case may take
SMALL = 10**5  # parameters up to which a call's own cost counts, in the table of latencies


def shapes_of(size: int, tensors: int) -> list[tuple[int, ...]]:
    """Return one vector, or weights and biases."""
    return [(size,)] if tensors == 1 else net_shapes(size, tensors)


def cases_of(sizes: Sequence[int], tensors: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of a size and a number of tensors, without tensors too small."""
    return [(size, count) for size in sizes for count in tensors if count == 1 or size >= ELEMENTS * count]


def measure_case(
    size: int, tensors: int, device: torch.device, rounds: int, seconds: float, compiled: bool, apart: int = APART
) -> dict:
    """Check and time all contenders on one case; return its record.

    Args:
        size: parameters asked for; weights and biases have about so many.
        tensors: how many.
        device: where.
        rounds: of all contenders.
        seconds: time cap of the rounds.
        compiled: whether to compile.
        apart: parameters beyond which contenders run one after another.
    """
    started = time.perf_counter()
    give_back()
    case = Case.of(f"{size:,} parameters in {tensors:,} tensors", shapes_of(size, tensors), device)
    left_out = _left_out(size, tensors, compiled)
    if case.numel > apart:
        memory = USED * available(device.type) + 16 * case.numel  # the case itself is there already
        short = [maker for maker, needed in NEEDED.items() if needed * case.numel > memory]
        left_out |= {
            way: f"takes {NEEDED[maker] * case.numel / 1e9:.0f} GB at {case.numel:,} parameters: left out"
            for maker in short
            for way in WAYS[maker]
            if way not in left_out
        }
    makers = [maker for maker in MAKERS if not any(way in left_out for way in WAYS[maker])]
    together = case.numel <= apart
    groups = [[*makers, "triad"]] if together else [[maker] for maker in (*makers, "triad")]
    record = {"parameters": case.numel, "tensors": tensors, "interleaved": together, "left_out": left_out}
    times: dict[str, list[float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for group in groups:
        give_back()
        found, wrong, compile_seconds = _contend(
            case, group, device, rounds, seconds / len(groups), 0 if together else WARMED
        )
        times, errors = times | found, errors | wrong
        if compile_seconds is not None:
            record["compile_seconds"] = compile_seconds
    record |= {"rounds": min(map(len, times.values())), "wall_seconds": round(time.perf_counter() - started, 1)}
    return {**record, "results": _results(case.numel, times, errors)}


def _left_out(size: int, tensors: int, compiled: bool) -> dict[str, str]:
    """Return why a case is not compiled, by the name of the contender; empty where it is."""
    between = abs(math.log10(size) - round(math.log10(size))) > 0.01
    if not compiled:
        return {"compile": "not asked for"}
    if tensors > COMPILED:
        return {"compile": f"unrolls the loop over tensors: left out beyond {COMPILED}"}
    if between and tensors > COMPILED_BETWEEN:
        return {"compile": f"unrolls the loop over tensors: beyond {COMPILED_BETWEEN} at whole decades only"}
    return {}


def _contend(
    case: Case, group: Sequence[str], device: torch.device, rounds: int, seconds: float, warmed: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], float | None]:
    """Make, check and time what may be in memory together; return times, errors and the seconds of compiling."""
    runs, compile_seconds = make(case, [maker for maker in group if maker != "triad"])
    errors = {name: check(case, name, run) for name, run in runs.items()}
    contenders = {name: Contender(run) for name, run in runs.items()}
    if "triad" in group:
        contenders["triad"] = triad(BYTES["add_grad_"] * case.numel, device)
    for _ in range(warmed):
        for contender in contenders.values():
            contender.run()
    return interleave(contenders, rounds, seconds, device), errors, compile_seconds


def _results(numel: int, times: dict[str, list[float]], errors: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Summarise the contenders: time, bytes, GB/s, and GB/s as a share of the triad's."""
    spreads = {name: Spread.of(measured, 1e3) for name, measured in times.items()}
    n_bytes = {name: BYTES[name if name in BYTES else "add_grad_"] * numel for name in times}
    rates = {name: n_bytes[name] / spread.median / 1e6 for name, spread in spreads.items()}
    results = {}
    for name, spread in spreads.items():
        results[name] = {
            "milliseconds": asdict(spread),
            "bytes": n_bytes[name],
            "gigabytes_per_second": rates[name],
            "share_of_triad": rates[name] / rates["triad"],
        }
        if name in errors:
            results[name] |= {"relative_error": errors[name], "computes_value": name not in NO_VALUE}
    return results


def run(
    device: torch.device, sizes: Sequence[int], tensors: Sequence[int], rounds: int, seconds: float, compiled: bool
) -> list[dict]:
    """Measure all cases."""
    return [
        measure_case(size, count, device, rounds, seconds, compiled)
        for size, count in progress(cases_of(sizes, tensors), "sweep")
    ]


def table(records: Sequence[dict]) -> str:
    """Return a table of latencies for small sizes, one of bandwidths, and what was left out; medians."""
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    head = f"{'parameters':>12} {'tensors':>8}" + "".join(f"{name:>15}" for name in names)
    lines, small = [], [record for record in records if record["parameters"] <= 1.1 * SMALL]
    if small:
        lines += ["microseconds per call", head]
        lines += [_row(record, names, lambda r: f"{1e3 * r['milliseconds']['median']:.1f}") for record in small]
        lines.append("")
    lines += ["ms per call, GB/s as a share of the triad's", head]
    lines += [
        _row(record, names, lambda r: f"{r['milliseconds']['median']:.3g} {r['share_of_triad']:5.0%}")
        for record in records
    ]
    return "\n".join([*lines, *remarks(records)])


def _row(record: dict, names: Sequence[str], shown: Callable[[dict], str]) -> str:
    """Return one case's line."""
    cells = (shown(record["results"][name]) if name in record["results"] else "-" for name in names)
    return f"{record['parameters']:12,} {record['tensors']:8,}" + "".join(f"{cell:>15}" for cell in cells)


def remarks(records: Sequence[dict]) -> list[str]:
    """Return what was left out, what compiling took, and which cases were not interleaved."""
    lines = []
    for reason in dict.fromkeys(reason for record in records for reason in record["left_out"].items()):
        counts = sorted({record["tensors"] for record in records if reason in record["left_out"].items()})
        lines.append(f"{reason[0]}, {', '.join(map(str, counts))} tensors: {reason[1]}")
    for count in sorted({record["tensors"] for record in records if "compile_seconds" in record}):
        found = [r["compile_seconds"] for r in records if r["tensors"] == count and "compile_seconds" in r]
        lines.append(f"compiling, {count} tensors: {Spread.of(found)} s a case")
    apart = [record for record in records if not record["interleaved"]]
    if apart:
        least = min(record["parameters"] for record in apart)
        lines.append(f"from {least:,} parameters on, contenders ran one after another for lack of memory")
    if any(not result.get("computes_value", True) for record in records for result in record["results"].values()):
        lines.append(f"{', '.join(sorted(NO_VALUE))}: the gradient alone, no value")
    return lines
