"""What the sequences say: each arm at its own best setting, with 95 % intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..harness.statistics import at_edge, best, good_range, grouped, half_width, spread
from .arms import Row
from .training import Run


def summarise(runs: Sequence[Run], row: Row, epochs: int) -> dict[str, Any]:
    """Return what became of the tasks with each arm, in the record's scale.

    The setting is the one with the best validation score, averaged over tasks at the end and over seeds; the test
    split has no say.

    Args:
        runs: of all arms, settings and seeds.
        row: what the scores are.
        epochs: of each task.
    """
    return {arm: _arm(same, row, epochs) for arm, same in grouped(runs, lambda run: run.arm).items()}


def _arm(runs: Sequence[Run], row: Row, epochs: int) -> dict[str, Any]:
    """Return one arm."""
    grid = [_tried(setting, same, row) for setting, same in grouped(runs, lambda run: run.setting).items()]
    chosen = best({tried["setting"]: row.better * tried["validation"] for tried in grid})
    curves = row.scale * np.array([run.curve for run in runs if run.setting == chosen])  # [seeds, epochs, tasks]
    ends = curves[:, epochs - 1 :: epochs]  # [seeds, tasks learnt, tasks]
    tasks = curves.shape[2]
    found: dict[str, Any] = {"setting": chosen, "grid": grid, row.key: interval(curves[:, -1].mean(1), row)}
    alphas = [tried["setting"] for tried in grid] if isinstance(chosen, float) and len(grid) > 1 else []
    found["at_edge_of_grid"] = bool(at_edge(chosen, alphas))
    if alphas:
        found["good"] = good_range(alphas, [row.better * tried["validation"] for tried in grid], row.within)
    found["tasks"] = [interval(curves[:, -1, task], row) for task in range(tasks)]
    if runs[0].arm != "joint":  # which has no tasks one after the other
        found["stages"] = [interval(ends[:, last, : last + 1].mean(1), row) for last in range(tasks)]
        found["new_tasks"] = interval(np.mean([ends[:, task, task] for task in range(1, tasks)], 0), row)
        lost = [_forgotten(row.better * ends, task) for task in range(tasks - 1)]
        found["forgetting"] = interval(np.mean(lost, 0), row)
        found["curve"] = np.round(curves.mean(0), row.digits + 1).tolist()
        found["curve_half_width"] = np.round(half_width(curves), row.digits + 1).tolist() if len(curves) > 1 else None
    return found


def interval(values: np.ndarray, row: Row) -> dict[str, Any]:
    """Return mean, spread and single values over seeds, and half the mean's 95 % interval, if it has one."""
    half = half_width(values)
    rounded = round(float(half), row.digits + 2) if np.isfinite(half) else None
    return {**spread(values, lambda value: round(value, row.digits + 2)), "half_width": rounded}


def _tried(setting: float | str | None, runs: Sequence[Run], row: Row) -> dict[str, Any]:
    """Return mean scores over seeds and tasks at the end, with one setting."""
    test = np.mean([run.curve[-1] for run in runs])
    validation = np.mean([run.validation for run in runs])
    digits = row.digits + 2
    return {
        "setting": setting,
        "validation": round(row.scale * float(validation), digits),
        "test": round(row.scale * float(test), digits),
    }


def _forgotten(ends: np.ndarray, task: int) -> np.ndarray:
    """Return a task's best score after any task from its own on but the last, minus that at the end: [seeds]."""
    return ends[:, task:-1, task].max(1) - ends[:, -1, task]
