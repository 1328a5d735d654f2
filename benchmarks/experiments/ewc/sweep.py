"""How the strength must be chosen: two tasks, a grid of alphas, the Fisher of the first task in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import wplfast

from .fishers import KINDS, estimate
from .metrics import good_range, shift, slope
from .scenarios import Setup, tasks
from .training import FISHER_BATCH, accuracies, first_task, seed_of, train

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
    rows, by_curve = [], {}
    for kind, size in dict.fromkeys((run.kind, run.batch_size) for run in runs):
        same = [run for run in runs if (run.kind, run.batch_size) == (kind, size)]
        by_curve[kind, size] = same
        validation, test = (np.array([getattr(run, part) for run in same]) for part in ("validation", "test"))
        scores = validation.mean(0)
        best = int(scores.argmax())
        rows.append(
            {
                "kind": kind,
                "batch_size": size,
                "mean_fisher": float(np.mean([run.fisher.mean(dtype=np.float64) for run in same])),
                "validation": _rounded(scores),
                "test": _rounded(test.mean(0)),
                "test_std": _rounded(test.std(0, ddof=int(len(same) > 1))),
                "best_alpha": alphas[best],
                "best_validation": round(float(scores[best]), 3),
                "best_test": round(float(test.mean(0)[best]), 3),
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
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["batch_size"])
        if len(same) < 2:
            continue
        sizes = [row["batch_size"] for row in same]
        first = runs[kind, sizes[0]]
        shifts = [shift(alphas, same[0]["validation"], row["validation"]) for row in same]
        lost = [used["best_test"] - used["test"][alphas.index(tuned["best_alpha"])] for tuned in same for used in same]
        found[kind] = {
            "sizes": sizes,
            "fisher_difference": [
                max(_difference(a.fisher, b.fisher) for a, b in zip(runs[kind, size], first, strict=True))
                for size in sizes
            ],
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
