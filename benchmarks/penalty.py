"""The penalty's gradient into ``.grad``: four cases with quartiles, and a sweep over sizes and numbers of tensors.

Cases are the parameters of a network, 8 small tensors where a call's own cost counts, and few tensors for the function
without state. The sweep goes from a thousand parameters to 10^8, in 1 to 1,000 tensors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from .plumbing.malloc import available, give_back
from .plumbing.progress import progress
from .roofs import ROOFS
from .timing import Budget, Contender, quartiles, ratio
from .ways import BYTES, MAKERS, Case, check, net_shapes

TENSORS = 160  # of a network
LARGE, LARGE_CUDA, QUICK = 10**7, 64 * 10**6, 10**5  # parameters of a network
BASELINES = ("eager", "foreach", "cat", "compile")
SIZES, COUNTS = tuple(round(10 ** (k / 2)) for k in range(6, 17)), (1, 10, 100, 1000)
QUICK_SIZES, QUICK_COUNTS = (1000, 10000), (1, 10)
ELEMENTS = 16  # a tensor of the sweep has at least about so many, or the case is skipped
COMPILED = 100  # tensors of the sweep up to which the compiler takes part: it unrolls the loop over them, 0.2 s each
NEEDED = 110  # bytes a parameter that a case takes with all its ways


def measure_case(case: Case, budget: Budget, compiled: bool, roofs: Sequence[str] = tuple(ROOFS)) -> dict:
    """Check and time all ways on one case, beside roofs that move the bytes of ``add_grad_``; return its record."""
    ways, seconds = {}, None
    for name, make in MAKERS.items():
        if name != "compiled" or compiled:
            started = time.perf_counter()
            ways |= make(case)
            seconds = time.perf_counter() - started  # the last one's
    errors = {name: check(f"{case.name}, {name}", case.theta, case.anchors, way) for name, way in ways.items()}
    moved = BYTES["add_grad_"] * case.numel
    contenders = {name: Contender(way) for name, way in ways.items()}
    contenders |= {name: ROOFS[name](moved, budget.device) for name in roofs}
    times = budget.time(contenders)
    results: dict[str, dict] = {}
    for name, taken in times.items():
        n_bytes = BYTES.get(name, BYTES["add_grad_"]) * case.numel
        spread = quartiles(taken, 1e3)
        results[name] = {"milliseconds": spread, "bytes": n_bytes}
        results[name]["gigabytes_per_second"] = n_bytes / spread["median"] / 1e6
        if name not in errors:
            continue
        results[name] |= {"relative_error": errors[name], "computes_value": "value" in errors[name]}
        for baseline in BASELINES:
            if baseline in times and baseline != name:
                results[name][f"{baseline}_over_it"] = ratio(times[baseline], taken)
        for roof in roofs:
            results[name][f"share_of_{roof.replace(' ', '_')}"] = ratio(times[roof], taken, n_bytes / moved)
    record = {"case": case.name, "tensors": len(case.theta), "parameters": case.numel}
    record |= {"rounds": len(times["eager"]), "results": results}
    return record | {"compile_seconds": seconds} if compiled else record


def run(budget: Budget, compiled: bool = False) -> list[dict]:
    """Measure the cases with quartiles; the first is large, the others are small."""
    size = QUICK if budget.quick else LARGE_CUDA if budget.device.type == "cuda" else LARGE
    cases = {
        f"{size / 1e6:g} M in {TENSORS} tensors": net_shapes(size, TENSORS),
        "8 small tensors": [(64, 64), (64,)] * 4,
        "4 tensors of 64": [(64,)] * 4,
        "28 tensors of 1,000": [(1000,)] * 28,
    }
    return [
        measure_case(Case.of(name, shapes, budget.device), budget, compiled)
        for name, shapes in progress(cases.items(), "penalty")
    ]


def pairs_of(sizes: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of a size and a number of tensors, without tensors too small."""
    return [(size, count) for size in sizes for count in counts if count == 1 or size >= ELEMENTS * count]


def sweep(budget: Budget, sizes: Sequence[int] = (), counts: Sequence[int] = (), compiled: bool = False) -> list[dict]:
    """Measure all pairs of sizes and numbers of tensors that there is memory for, each beside a triad."""
    sizes = sizes or (QUICK_SIZES if budget.quick else SIZES)
    records = []
    for size, count in progress(pairs_of(sizes, counts or (QUICK_COUNTS if budget.quick else COUNTS)), "sweep"):
        give_back()
        if NEEDED * size > available(budget.device.type):
            print(f"left out for lack of memory: {size:,} parameters", file=sys.stderr)
            continue
        case = Case.of(f"{size:,} parameters in {count:,} tensors", net_shapes(size, count), budget.device)
        records.append(measure_case(case, budget, compiled and count <= COMPILED, ("triad",)))
    return records
