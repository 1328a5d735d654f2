"""How a steady Fisher pass grows with batch size, length, width, classes and samples, beside the unit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import wplfast
from wplfast.losses import cross_entropy

from .fisher import Subject, peak_bytes, steady, subject_of, timed
from .models import Decoder, mlp
from .plumbing.progress import progress
from .timing import Budget
from .workloads import Draw, Workload, rows, text

SAMPLES = 32  # of each batch where classes or the number of batches grow
FITTED = 3  # last points that a slope is fitted to


@dataclass(frozen=True)
class Series:
    """Models and batches of growing size.

    Args:
        name: what grows.
        shown: of what.
        sizes: measured ones.
        quick: tiny ones.
        model: makes the model of a size.
        draw: makes what draws batches for it.
    """

    name: str
    shown: str
    sizes: Sequence[int]
    quick: Sequence[int]
    model: Callable[[int], nn.Module]
    draw: Callable[[int], Draw]

    def at(self, size: int, device: torch.device) -> Subject:
        """Make model and batches of one size."""
        name = f"{self.name}={size}"
        workload = Workload(name, self.shown, math.nan, lambda _: self.model(size), self.draw(size))
        return subject_of(workload, device, quick=False)


def _powers(first: int, last: int) -> list[int]:
    return [2**k for k in range(first, last + 1)]


TIMED = (
    Series(
        "N", "MLP 784-512-512-10, batch size N", _powers(3, 10), (2, 4, 8),
        lambda n: mlp(784, 512, 512, 10), lambda n: rows(n, 784),
    ),
    Series(
        "T", "decoder d=64, 2 layers, V=200, batch of 4, length T", _powers(4, 10), (4, 8, 16),
        lambda t: Decoder(200, t, 64, 2, tied=False), lambda t: text(4, t, 200),
    ),
    Series(
        "D", "MLP D-D-D-10, batch of 64, width D", _powers(5, 11), (8, 16, 32),
        lambda d: mlp(d, d, d, 10), lambda d: rows(64, d),
    ),
)  # fmt: skip
CLASSES = Series(
    "C", "MLP 256-256-256-C, batch of 32, exact over C classes", _powers(1, 8), (2, 3, 4),
    lambda c: mlp(256, 256, 256, c), lambda c: rows(SAMPLES, 256, classes=c),
)  # fmt: skip
HELD = Series(
    "samples", "MLP 256-256-256-10, batches of 32, samples in all", [SAMPLES * k for k in _powers(0, 6)],
    [SAMPLES * k for k in (1, 2, 3)], lambda _: mlp(256, 256, 256, 10), lambda _: rows(SAMPLES, 256),
)  # fmt: skip


def steadily(series: Series, size: int, budget: Budget) -> dict:
    """Time one size: the steady pass, checked against float64 as always, and the unit."""
    subject = series.at(size, budget.device)
    with steady(subject) as fisher_pass:
        return {"size": size, **timed(subject, fisher_pass, budget)}


def exact(series: Series, size: int, budget: Budget) -> dict:
    """Time a call with ``fisher_type="exact"`` over two batches, without verification, and as many units."""
    subject = series.at(size, budget.device)

    def call() -> None:
        batches = subject.batches[:2]
        wplfast.fisher_diagonal(subject.watched, batches, cross_entropy, fisher_type="exact", verify=False)

    return {"size": size, **timed(subject, call, budget, len(subject.batches[:2]))}


def held(series: Series, size: int, budget: Budget) -> dict:
    """Return the peak memory of one call, whose batches are made as it asks for them, and of a unit."""
    subject, draw, generator = series.at(size, budget.device), series.draw(size), torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(size // SAMPLES):
            yield tuple(part.to(budget.device) for part in draw(False, generator))

    subject.clear()
    unit = peak_bytes(subject.unit, budget.device)
    subject.clear()
    call = peak_bytes(lambda: wplfast.fisher_diagonal(subject.watched, batches(), cross_entropy), budget.device)
    return {"size": size, "peak_bytes": {"unit": unit, "fisher": call}}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the power law through the last points: least squares in logarithms."""
    logs = ([math.log(value) for value in part[-FITTED:]] for part in (sizes, values))
    return statistics.linear_regression(*logs).slope


def run(budget: Budget) -> list[dict]:
    """Measure all series; the budget is that of each point."""
    records = []
    for series in progress((*TIMED, CLASSES, HELD), "scaling"):
        sizes = series.quick if budget.quick else series.sizes
        one = held if series is HELD else exact if series is CLASSES else steadily
        points = [one(series, size, budget) for size in sizes]
        slopes = {}
        for name in ("unit", "fisher"):
            values = [p["peak_bytes"][name] if series is HELD else p["milliseconds"][name]["median"] for p in points]
            slopes[name] = slope(sizes, values)
        records.append({"name": series.name, "shown": series.shown, "points": points, "slopes": slopes})
    return records
