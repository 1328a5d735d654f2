"""How a steady Fisher pass grows with batch size, length, width, classes and samples, beside the unit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import cycle, islice

import torch
from torch import Tensor

import wplfast
from wplfast.losses import cross_entropy

from .fisher import peak_bytes, steady
from .plumbing.progress import progress
from .plumbing.series import CLASSES, HELD, SAMPLES, TIMED, Series
from .timing import Contender, Spread, interleave, measure, ratio
from .workloads import Batch

FITTED = 3  # last points that a slope is fitted to


def timed(series: Series, size: int, device: torch.device, rounds: int, seconds: float) -> dict:
    """Time one size: the steady pass, checked against float64 as always, and the unit."""
    model = series.at(size, device)
    with steady(model) as fisher_pass:
        contenders = {"unit": Contender(model.unit, model.clear), "fisher": Contender(fisher_pass, model.clear)}
        return _point(size, interleave(contenders, rounds, seconds, device))


def exact(series: Series, size: int, device: torch.device, rounds: int, seconds: float) -> dict:
    """Time the batches of one call with ``fisher_type="exact"``, and a unit between each and the next.

    The first batch measures and verifies; its time does not count.
    """
    model = series.at(size, device)
    times: dict[str, list[float]] = {"unit": [], "fisher": []}
    unit, started = Contender(model.unit, model.clear), time.perf_counter()

    def batches() -> Iterator[Batch]:
        for done, batch in enumerate(islice(cycle(model.batches), rounds + 1)):
            asked = _now(device)
            yield batch
            if done:
                times["fisher"].append(_now(device) - asked)
                times["unit"].append(measure(unit, 1, device))
            if done >= 3 and time.perf_counter() - started > seconds:
                break

    measure(unit, 1, device)
    wplfast.fisher_diagonal(model.watched, batches(), cross_entropy, fisher_type="exact")
    return _point(size, times)


def held(series: Series, size: int, device: torch.device) -> dict:
    """Return the peak memory of one call, whose batches are made as it asks for them, and of a unit."""
    model = series.at(size, device)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(size // SAMPLES):
            yield tuple(part.to(device) for part in series.batch(size, generator))

    model.clear()
    unit = peak_bytes(model.unit, device)
    model.clear()
    call = peak_bytes(lambda: wplfast.fisher_diagonal(model.watched, batches(), cross_entropy), device)
    return {"size": size, "peak_bytes": {"unit": unit, "fisher": call}}


def _now(device: torch.device) -> float:
    """Return the time when all work so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _point(size: int, times: dict[str, list[float]]) -> dict:
    """Summarise the times of one size."""
    spreads = {name: asdict(Spread.of(measured, 1e3)) for name, measured in times.items()}
    return {
        "size": size,
        "pairs": len(times["unit"]),
        "milliseconds": spreads,
        "ratio": asdict(ratio(times["fisher"], times["unit"])),
    }


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the power law through the last points: least squares in logarithms."""
    logs = ([math.log(value) for value in part[-FITTED:]] for part in (sizes, values))
    return statistics.linear_regression(*logs).slope


def run(device: torch.device, quick: bool, rounds: int, seconds: float) -> list[dict]:
    """Measure all series; ``seconds`` caps each point."""
    records = []
    for series in progress((*TIMED, CLASSES, HELD), "scaling"):
        points = []
        for size in series.quick if quick else series.sizes:
            if series is HELD:
                points.append(held(series, size, device))
            else:
                points.append((exact if series is CLASSES else timed)(series, size, device, rounds, seconds))
        records.append({"name": series.name, "shown": series.shown, "points": points, "slopes": _slopes(points)})
    return records


def _slopes(points: Sequence[dict]) -> dict[str, float]:
    """Return the exponents of unit and Fisher pass."""
    sizes = [point["size"] for point in points]
    return {name: slope(sizes, [value(point, name) for point in points]) for name in ("unit", "fisher")}


def value(point: dict, name: str) -> float:
    """Return a point's median time in ms, or its peak memory in bytes."""
    return point["milliseconds"][name]["median"] if "milliseconds" in point else point["peak_bytes"][name]


def table(records: Sequence[dict]) -> str:
    """Return a table for people."""
    lines = []
    for record in records:
        lines += ["", record["shown"]]
        for point in record["points"]:
            if "ratio" not in point:
                peaks = (f"{name} {point['peak_bytes'][name] / 1e6:8.3f} MB" for name in ("unit", "fisher"))
                lines.append(f"{record['name']:>8} {point['size']:5} {', '.join(peaks)}")
                continue
            unit, fisher = (Spread(**point["milliseconds"][name]) for name in ("unit", "fisher"))
            shown = f"unit {unit!s:>24} ms, Fisher {fisher!s:>24} ms"
            lines.append(f"{record['name']:>8} {point['size']:5} {shown}, ratio {Spread(**point['ratio'])}")
        shown = ", ".join(f"{name} {record['name']}^{power:.2f}" for name, power in record["slopes"].items())
        lines.append(f"{'':8} last {FITTED} points: {shown}")
    return "\n".join(lines[1:])
