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
from .ways import KERNELS, MAKERS, Case, check, net_shapes

TENSORS = 160  # of a network
LARGE, LARGE_CUDA, QUICK = 10**7, 64 * 10**6, 10**5  # parameters of a network
PLAIN = ("ours", "functional", "plain", "flat")  # what makes the ways, but for the compiler
SMALL = [(64, 64), (64,)] * 4
BASELINES = ("eager", "foreach", "cat", "compile")
SIZES, COUNTS = tuple(round(10 ** (k / 2)) for k in range(6, 17)), (1, 10, 100, 1000)
QUICK_SIZES, QUICK_COUNTS = (1000, 10000), (1, 10)
ELEMENTS = 16  # a tensor of the sweep has at least about so many, or the case is skipped
COMPILED = 100  # tensors of the sweep up to which the compiler takes part: it unrolls the loop over them, 0.2 s each
ROOF = 1 << 32  # bytes that a roof moves at most
NEEDED = 110  # bytes a parameter that a case takes with all its ways


def measure_case(
    case: Case, budget: Budget, makers: Sequence[str] = PLAIN, roofs: Sequence[str] = tuple(ROOFS)
) -> dict:
    """Check and time ways on one case, beside roofs that move the bytes of ``add_grad_``; return its record."""
    record: dict = {"case": case.name, "tensors": len(case.theta), "parameters": case.numel}
    ways = {}
    for maker in makers:
        started = time.perf_counter()
        ways |= MAKERS[maker](case)
        if maker == "compiled":
            record["compile_seconds"] = time.perf_counter() - started
    errors = {
        name: check(f"{case.name}, {name}", case.theta, case.anchors, way, case.kind.tolerance)
        for name, way in ways.items()
        if name not in KERNELS
    }
    moved = min(ROOF, case.kind.bytes("add_grad_") * case.numel)
    contenders = {name: Contender(way, alone=name in KERNELS) for name, way in ways.items()}
    contenders |= {name: ROOFS[name](moved, budget.device) for name in roofs}
    times = budget.time(contenders)
    record |= {"rounds": min(map(len, times.values())), "results": {}}
    for name, taken in times.items():
        n_bytes = moved if name in roofs else case.kind.bytes(name) * case.numel
        spread = quartiles(taken, 1e3)
        result = {"milliseconds": spread, "bytes": n_bytes, "gigabytes_per_second": n_bytes / spread["median"] / 1e6}
        record["results"][name] = result
        if name in roofs:
            continue
        result |= {f"{other}_over_it": ratio(times[other], taken) for other in BASELINES if other in times}
        for roof in roofs:
            result[f"share_of_{roof.replace(' ', '_')}"] = ratio(times[roof], taken, n_bytes / moved)
        if name in errors:
            result |= {"relative_error": errors[name], "computes_value": "value" in errors[name]}
        else:
            result["host_microseconds"] = 1e6 * contenders[name].host
    return record


def run(budget: Budget, compiled: bool = False) -> list[dict]:
    """Measure the cases with quartiles; the first is large, the others are small."""
    size = QUICK if budget.quick else LARGE_CUDA if budget.device.type == "cuda" else LARGE
    cases = {
        f"{size / 1e6:g} M in {TENSORS} tensors": net_shapes(size, TENSORS),
        "8 small tensors": SMALL,
        "4 tensors of 64": [(64,)] * 4,
        "28 tensors of 1,000": [(1000,)] * 28,
    }
    return [
        measure_case(Case(name, shapes, budget.device), budget, (*PLAIN, "compiled") if compiled else PLAIN)
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
        case = Case(f"{size:,} parameters in {count:,} tensors", net_shapes(size, count), budget.device)
        makers = (*PLAIN, "compiled") if compiled and count <= COMPILED else PLAIN
        records.append(measure_case(case, budget, makers, ("triad",)))
    return records
