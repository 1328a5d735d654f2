"""What the sequences say: each arm at its own best setting, with 95 % intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..harness.statistics import at_edge, best, good_range, grouped, half_width, spread
from .training import Run, Setup

WITHIN = 2.0  # points below the best alpha's validation accuracy that still count as good


def summarise(runs: Sequence[Run], setup: Setup) -> dict[str, Any]:
    """Return what became of the tasks with each arm; all in points.

    The setting is the one with the largest validation accuracy, averaged over tasks at the end and over seeds; the test
    split has no say.
    """
    return {arm: _arm(same, setup) for arm, same in grouped(runs, lambda run: run.arm).items()}


def _arm(runs: Sequence[Run], setup: Setup) -> dict[str, Any]:
    """Return one arm."""
    grid = [_tried(setting, same) for setting, same in grouped(runs, lambda run: run.setting).items()]
    chosen = best({row["setting"]: row["validation"] for row in grid})
    curves = 100 * np.array([run.curve for run in runs if run.setting == chosen])  # [seeds, epochs, tasks]
    ends = curves[:, setup.epochs - 1 :: setup.epochs]  # [seeds, tasks learnt, tasks]
    found: dict[str, Any] = {"setting": chosen, "grid": grid, "accuracy": interval(curves[:, -1].mean(1))}
    alphas = [row["setting"] for row in grid] if isinstance(chosen, float) and len(grid) > 1 else []
    found["at_edge_of_grid"] = bool(at_edge(chosen, alphas))
    if alphas:
        found["good"] = good_range(alphas, [row["validation"] for row in grid], WITHIN)
    found["tasks"] = [interval(curves[:, -1, task]) for task in range(setup.tasks)]
    if runs[0].arm != "joint":  # which has no tasks one after the other
        learnt = range(1, setup.tasks)
        found["stages"] = [interval(ends[:, last, : last + 1].mean(1)) for last in range(setup.tasks)]
        found["new_tasks"] = interval(np.mean([ends[:, task, task] for task in learnt], 0))
        found["forgetting"] = interval(np.mean([_forgotten(ends, task) for task in range(setup.tasks - 1)], 0))
        found["curve"] = np.round(curves.mean(0), 2).tolist()
        found["curve_half_width"] = np.round(half_width(curves), 2).tolist() if len(curves) > 1 else None
    return found


def interval(values: np.ndarray) -> dict[str, Any]:
    """Return mean, spread and single values over seeds, and half the mean's 95 % interval, if it has one."""
    half = half_width(values)
    return {**spread(values), "half_width": round(float(half), 3) if np.isfinite(half) else None}


def _tried(setting: float | str | None, runs: Sequence[Run]) -> dict[str, Any]:
    """Return mean accuracies over seeds and tasks at the end, with one setting."""
    test = np.mean([run.curve[-1] for run in runs])
    validation = np.mean([run.validation for run in runs])
    return {"setting": setting, "validation": round(100 * float(validation), 3), "test": round(100 * float(test), 3)}


def _forgotten(ends: np.ndarray, task: int) -> np.ndarray:
    """Return a task's best accuracy after any task from its own on but the last, minus that at the end: [seeds]."""
    return ends[:, task:-1, task].max(1) - ends[:, -1, task]
