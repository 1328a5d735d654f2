"""What the sequences say: the choice of alpha for each arm; accuracy, forgetting and cost over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..harness.statistics import at_edge, best, grouped, spread
from .scenarios import SCENARIOS
from .training import TUNED, Run

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


def new_task_accuracy(matrix: Matrix) -> float:
    """Return the mean over all tasks but the first of their accuracy right after they were learnt."""
    return float(np.mean([matrix[k][k] for k in range(1, len(matrix))]))


def summarise(scenario: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return one scenario: its arms, each at its own best alpha of as many values, chosen on validation accuracy.

    Forgetting is in points after Chaudhry et al.; ``reduction_percent`` compares its means with fine-tuning's;
    ``cost`` is how much less accurate the new tasks are right after they were learnt than with fine-tuning, paired by
    seed; ``gap`` how far the average accuracy at the end lies below joint training.
    """
    tried = {arm: _grid(same) for arm, same in grouped(runs, lambda run: run.arm).items()}
    alphas = {arm: best({row["alpha"]: row["validation"] for row in rows}) for arm, rows in tried.items()}
    chosen = {arm: [run for run in runs if (run.arm, run.alpha) == (arm, alpha)] for arm, alpha in alphas.items()}

    def measured(arm: str, measure: Any) -> np.ndarray:
        return np.array([measure(run.matrix) for run in chosen[arm]])

    arms: dict[str, Any] = {}
    for arm, picked in chosen.items():
        grid = tried[arm] if arm in TUNED else []
        accuracy, new = 100 * measured(arm, average_accuracy), measured(arm, new_task_accuracy)
        arms[arm] = {
            "alpha": alphas[arm],
            "at_edge_of_grid": at_edge(alphas[arm], [row["alpha"] for row in grid]),
            "accuracy": _stages(accuracy),
            "forgetting": _stages(100 * measured(arm, forgetting)),
            "new_task_accuracy": spread(100 * new),
            "cost": spread(100 * (measured("none", new_task_accuracy) - new)),
            "gap": spread((100 * measured("joint", average_accuracy) - accuracy)[:, -1]),
            "grid": grid,
            "matrices": [[[round(100 * value, 2) for value in row] for row in run.matrix] for run in picked],
        }
    lost = arms["none"]["forgetting"][-1]["mean"]
    for row in arms.values():
        row["reduction_percent"] = 100 * (1 - row["forgetting"][-1]["mean"] / lost) if lost > 0 else None
    return {**asdict(SCENARIOS[scenario]), "n_tasks": len(arms["none"]["accuracy"]), "arms": arms}


def forgets(scenario: dict[str, Any]) -> bool:
    """Tell whether fine-tuning forgets more than its seeds scatter, so that a share of it means something."""
    lost = scenario["arms"]["none"]["forgetting"][-1]
    return bool(lost["mean"] > lost["std"])


def _grid(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the mean over seeds at every alpha of one arm, in the order of the grid."""
    rows = []
    for alpha, same in grouped(runs, lambda run: run.alpha).items():
        row = {
            "validation": np.mean([run.validation for run in same]),
            "accuracy": np.mean([average_accuracy(run.matrix)[-1] for run in same]),
            "forgetting": np.mean([forgetting(run.matrix)[-1] for run in same]),
        }
        rows.append({"alpha": alpha, **{name: round(100 * float(value), 3) for name, value in row.items()}})
    return rows


def _stages(values: np.ndarray) -> list[dict[str, Any]]:
    """Return mean and spread over seeds (rows) after each task (columns)."""
    return [spread(column) for column in values.T]
