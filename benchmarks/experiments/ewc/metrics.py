"""What the runs are judged by: accuracy, forgetting, transfer; and how wide the range of good strengths is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]  # row k: accuracies on tasks 0 to k after task k was learnt


def average_accuracy(matrix: Matrix) -> list[float]:
    """Return the mean accuracy over the tasks seen so far, after each task."""
    return [float(np.mean(row)) for row in matrix]


def forgetting(matrix: Matrix) -> list[float]:
    """Return the average forgetting after each task (Chaudhry et al. 2018, arXiv:1801.10112), 0 after the first.

    After task k, that of an earlier task j is its best accuracy so far, ``max_{l < k} a_lj``, minus the present one,
    ``a_kj``; the mean is over j < k. (Tasks are not evaluated before they are learnt.)
    """
    values = [0.0]
    for k in range(1, len(matrix)):
        best = [max(matrix[past][j] for past in range(j, k)) for j in range(k)]
        values.append(float(np.mean([best[j] - matrix[k][j] for j in range(k)])))
    return values


def backward_transfer(matrix: Matrix) -> list[float]:
    """Return after each task the mean over earlier tasks of accuracy now minus right after that task.

    Lopez-Paz and Ranzato 2017, arXiv:1706.08840; 0 after the first task.
    """
    values = [0.0]
    for k in range(1, len(matrix)):
        values.append(float(np.mean([matrix[k][j] - matrix[j][j] for j in range(k)])))
    return values


def new_task_accuracy(matrix: Matrix) -> float:
    """Return the mean over all tasks but the first of their accuracy right after they were learnt."""
    return float(np.mean([matrix[k][k] for k in range(1, len(matrix))]))


def good_range(alphas: Sequence[float], scores: Sequence[float], within: float) -> dict[str, float | bool]:
    """Return the range of strengths around the best one whose score is at most ``within`` below the best.

    Args:
        alphas: a grid in ascending order.
        scores: of each strength, in points; between two of them it is read off a line over log10(alpha).
        within: in points.

    Returns:
        ``low``, ``high`` (strengths), ``decades`` (log10 of their ratio), and ``open_low``, ``open_high``: whether the
        range reaches that end of the grid, so that it may be wider than that.
    """
    x, y = np.log10(alphas), np.asarray(scores, float)
    best, bound = int(y.argmax()), float(y.max()) - within
    ends, is_open = [], []
    for step in (-1, 1):
        at = best
        while 0 <= at + step < len(y) and y[at + step] >= bound:
            at += step
        is_open.append(not 0 <= at + step < len(y))
        share = 0.0 if is_open[-1] else (y[at] - bound) / (y[at] - y[at + step])
        ends.append(float(x[at]) if is_open[-1] else float(x[at] + share * (x[at + step] - x[at])))
    low, high = ends
    return {
        "low": float(f"{10**low:.4g}"),
        "high": float(f"{10**high:.4g}"),
        "decades": round(high - low, 3),
        "open_low": is_open[0],
        "open_high": is_open[1],
    }


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
