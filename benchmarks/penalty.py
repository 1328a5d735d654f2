"""The penalty's gradient into ``.grad``, two cases in full: the parameters of a network, and 8 small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from .contenders import BYTES, MAKERS, NO_VALUE, Case, check, make, net_shapes
from .plumbing.progress import progress
from .timing import Contender, Spread, interleave, ratio, triads

BASELINES = ("eager", "foreach", "cat", "compile")
SHARES = ("share_of_triad", "share_of_triad_in_place")
TENSORS = 160  # of a network


def small_shapes() -> list[tuple[int, ...]]:
    """Return 4 layers of 64 units."""
    return [(64, 64), (64,)] * 4


def measure_case(case: Case, device: torch.device, rounds: int, seconds: float, compiled: bool, roof: bool) -> dict:
    """Check and time all ways on one case; return its record."""
    runs, compile_seconds = make(case, [maker for maker in MAKERS if compiled or maker != "compiled"])
    errors = {name: check(case, name, run) for name, run in runs.items()}
    n_bytes = {name: BYTES[name] * case.numel for name in runs}
    contenders = {name: Contender(run) for name, run in runs.items()}
    if roof:
        roofs = triads(n_bytes["add_grad_"], device)
        contenders |= roofs
        n_bytes |= dict.fromkeys(roofs, n_bytes["add_grad_"])
    times = interleave(contenders, rounds, seconds, device)
    results = {}
    for name, measured in times.items():
        spread = Spread.of(measured)
        results[name] = {
            "milliseconds": asdict(Spread.of(measured, 1e3)),
            "bytes": n_bytes[name],
            "gigabytes_per_second": n_bytes[name] / spread.median / 1e9,
        }
        if name in errors:
            results[name] |= {"relative_error": errors[name], "computes_value": name not in NO_VALUE}
            for baseline in BASELINES:
                if baseline in times and baseline != name:
                    results[name][f"{baseline}_over_it"] = asdict(ratio(times[baseline], measured))
            for limit in ("triad", "triad in place", "copy") if roof else ():
                moved = n_bytes[name] / n_bytes[limit]
                share = ratio(times[limit], measured)
                results[name][f"share_of_{limit.replace(' ', '_')}"] = {
                    key: moved * value for key, value in asdict(share).items()
                }
    return {
        "case": case.name,
        "tensors": len(case.theta),
        "parameters": case.numel,
        "rounds": len(times["eager"]),
        "compile_seconds": compile_seconds,
        "results": results,
    }


def run(device: torch.device, size: int, rounds: int, seconds: float, compiled: bool) -> list[dict]:
    """Measure the large case and the small one."""
    cases = [(f"{size / 1e6:g} M in {TENSORS} tensors", net_shapes(size, TENSORS), True)]
    cases.append(("8 small tensors", small_shapes(), False))
    return [
        measure_case(Case.of(name, shapes, device), device, rounds, seconds, compiled, roof)
        for name, shapes, roof in progress(cases, "penalty")
    ]


def table(records: Sequence[dict]) -> str:
    """Return a table for people: medians, with quartiles in brackets."""
    lines = []
    for record in records:
        lines += ["", f"{record['case']} ({record['parameters']:,} parameters), {record['rounds']} rounds"]
        columns = f"{'ms':>24} {'GB/s':>6} {'of triad':>9} {'in place':>9}"
        lines.append(f"{'':16}{columns}" + "".join(f"{f'{baseline} / it':>23}" for baseline in BASELINES))
        for name, result in record["results"].items():
            shares = [f"{result[k]['median']:.0%}" if k in result else "" for k in SHARES]
            ratios = [str(Spread(**result[f"{b}_over_it"])) if f"{b}_over_it" in result else "" for b in BASELINES]
            time, rate = Spread(**result["milliseconds"]), result["gigabytes_per_second"]
            shown = f"{time!s:>24} {rate:6.1f} {shares[0]:>9} {shares[1]:>9}"
            lines.append(f"{name:16}{shown}" + "".join(f"{words:>23}" for words in ratios))
        if any(not result.get("computes_value", True) for result in record["results"].values()):
            lines.append(f"{', '.join(sorted(NO_VALUE))}: the gradient alone, no value")
    return "\n".join(lines[1:])
