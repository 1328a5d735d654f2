"""How the strength must be chosen: two tasks, a grid of alphas, the Fisher of the first task in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import wplfast

from ..harness.statistics import best, deviation, good_range, grouped
from .scenarios import Setup, tasks
from .training import FISHER_BATCH, KINDS, accuracies, estimate, first_task, seed_of, train

SWEPT = ("split2", "permuted")
WITHIN = (1.0, 2.0)  # points below the best score that still count as good


@dataclass(frozen=True)
class Sweep:
    """One Fisher, and at every alpha the accuracy over both tasks after the second, in points."""

    scenario: str
    seed: int
    kind: str
    batch_size: int
    fisher: np.ndarray
    validation: list[float]
    test: list[float]


def curves(batch_sizes: Sequence[int]) -> list[tuple[str, int]]:
    """List what is swept: the empirical and the batch-squared F at every batch size, the other types at one."""
    swept = [(kind, size) for kind in ("empirical", "squared") for size in batch_sizes]
    return swept + [(kind, FISHER_BATCH) for kind in KINDS if kind not in ("empirical", "squared")]


def sweep(job: tuple[Setup, str, int, str, int, Sequence[float]]) -> Sweep:
    """Learn the second task at every alpha, anchored by one estimate of the first task's Fisher.

    Args:
        job: the settings, the scenario, the seed, the kind of Fisher, the batch size of its estimate, the alphas.
    """
    setup, scenario, seed, kind, batch_size, alphas = job
    pair = tasks(setup, scenario, seed)[:2]
    start = first_task(setup, scenario, seed)
    params = start.anchored(scenario, [pair[0].head])
    fisher = dict(estimate(kind, start.path(pair[0].head), params, pair[0].split, batch_size, setup.fisher_samples))
    validation, test = [], []
    for alpha in alphas:
        net = deepcopy(start)
        wpl = wplfast.WeightPlasticityLoss(net.anchored(scenario, [pair[0].head]), alpha)
        wpl.consolidate(fisher)
        train(net, pair[1:], setup, seed_of(seed, 1), wpl)
        validation.append(100 * float(np.mean(accuracies(net, pair, "validation"))))
        test.append(100 * float(np.mean(accuracies(net, pair, "test"))))
    flat = torch.cat([value.flatten() for value in fisher.values()]).cpu().numpy()
    return Sweep(scenario, seed, kind, batch_size, flat, validation, test)


def summarise(runs: Sequence[Sweep], alphas: Sequence[float]) -> dict[str, Any]:
    """Return one scenario's curves, the range of good alphas of each, and how they move with the batch size.

    All choices are made on validation accuracy, averaged over seeds.
    """
    rows, by_curve = [], grouped(runs, lambda run: (run.kind, run.batch_size))
    for (kind, size), same in by_curve.items():
        scores, test = np.mean([run.validation for run in same], 0), np.array([run.test for run in same])
        at = best(dict(enumerate(scores)))
        rows.append(
            {
                "kind": kind,
                "batch_size": size,
                "mean_fisher": float(np.mean([run.fisher.mean(dtype=np.float64) for run in same])),
                "validation": _rounded(scores),
                "test": _rounded(test.mean(0)),
                "test_std": _rounded(deviation(test)),
                "best_alpha": alphas[at],
                "best_validation": round(float(scores[at]), 3),
                "best_test": round(float(test.mean(0)[at]), 3),
                "good": {f"{within:g}": good_range(alphas, scores, within) for within in WITHIN},
            }
        )
    return {"alphas": list(alphas), "curves": rows, "batch_size": _moves(rows, by_curve, alphas)}


def _moves(
    rows: Sequence[dict[str, Any]], runs: dict[tuple[str, int], list[Sweep]], alphas: Sequence[float]
) -> dict[str, Any]:
    """Return for each kind what changes with the batch size, against the smallest one.

    ``fisher_difference`` is ``|F - F_0| / |F_0|`` over all parameters (the largest over seeds), ``shift`` how many
    decades to the right the curve lies, ``shift_per_decade`` its slope over log10 of the batch size, ``lost_points``
    the largest loss of test accuracy when the alpha that is best at one batch size is used at another.
    """
    found = {}
    for kind, unsorted in grouped(rows, lambda row: row["kind"]).items():
        if len(unsorted) < 2:
            continue
        same = sorted(unsorted, key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in same]
        pairs = [list(zip(runs[kind, size], runs[kind, sizes[0]], strict=True)) for size in sizes]
        shifts = [shift(alphas, same[0]["validation"], row["validation"]) for row in same]
        lost = [used["best_test"] - used["test"][alphas.index(tuned["best_alpha"])] for tuned in same for used in same]
        found[kind] = {
            "sizes": sizes,
            "fisher_difference": [max(_difference(a.fisher, b.fisher) for a, b in pair) for pair in pairs],
            "mean_ratio": [row["mean_fisher"] / same[0]["mean_fisher"] for row in same],
            "shift": shifts,
            "shift_per_decade": slope(sizes, shifts),
            "lost_points": max(lost),
        }
    return found


def _difference(fisher: np.ndarray, reference: np.ndarray) -> float:
    """Return the relative difference of two diagonals."""
    reference = reference.astype(np.float64)
    return float(np.linalg.norm(fisher - reference) / np.linalg.norm(reference))


def _rounded(values: np.ndarray) -> list[float]:
    """Return values to 3 digits after the point."""
    return [round(float(value), 3) for value in values]


def shift(alphas: Sequence[float], reference: Sequence[float], scores: Sequence[float]) -> float:
    """Return by how many decades of alpha a curve lies to the right of another one that is shaped like it.

    It is the shift in [-5, 5] (at most what leaves half of the grid in common) with the least mean squared difference
    where both curves are known, in steps of 0.01.
    """
    x, y, r = np.log10(alphas), np.asarray(scores, float), np.asarray(reference, float)
    reach = min(5.0, (x[-1] - x[0]) / 2)
    steps = np.arange(-int(100 * reach), int(100 * reach) + 1)
    errors = []
    for step in steps:
        moved = x - step / 100
        inside = (moved >= x[0]) & (moved <= x[-1])
        errors.append(np.mean((y[inside] - np.interp(moved[inside], x, r)) ** 2))
    least = np.flatnonzero(np.isclose(errors, np.min(errors), rtol=1e-9, atol=1e-12))
    return float(steps[least[np.abs(steps[least]).argmin()]] / 100)  # of equally good ones the smallest


def slope(batch_sizes: Sequence[int], shifts: Sequence[float]) -> float:
    """Return b of the least-squares line shift = a + b log10(batch size)."""
    return float(np.polyfit(np.log10(batch_sizes), shifts, 1)[0])
