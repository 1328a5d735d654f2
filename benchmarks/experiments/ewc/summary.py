"""What the sequences say: the choice of alpha for each arm; accuracy, forgetting and cost over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...plumbing.spread import spread
from .metrics import average_accuracy, backward_transfer, forgetting, new_task_accuracy
from .scenarios import SCENARIOS
from .training import TUNED, Run

GOAL_REDUCTION, GOAL_COST = 80.0, 2.0  # forgetting cut by at least (%), at a cost on new tasks of at most (points)


def summarise(scenario: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return one scenario: its arms, each at its own best alpha of as many values, chosen on validation accuracy.

    Forgetting is in points after Chaudhry et al.; ``reduction_percent`` compares its means with fine-tuning's;
    ``cost`` is how much less accurate the new tasks are right after they were learnt than with fine-tuning, paired by
    seed; ``gap`` how far the average accuracy at the end lies below joint training.
    """
    arms: dict[str, Any] = {}
    chosen = {arm: _best([run for run in runs if run.arm == arm]) for arm in dict.fromkeys(run.arm for run in runs)}
    new = {arm: np.array([new_task_accuracy(run.matrix) for run in picked]) for arm, picked in chosen.items()}
    joint = np.array([average_accuracy(run.matrix)[-1] for run in chosen["joint"]])
    for arm, picked in chosen.items():
        grid = _grid([run for run in runs if run.arm == arm]) if arm in TUNED else []
        accuracy, lost, transfer = (
            100 * np.array([measure(run.matrix) for run in picked])
            for measure in (average_accuracy, forgetting, backward_transfer)
        )
        arms[arm] = {
            "alpha": picked[0].alpha,
            "at_edge_of_grid": bool(grid) and picked[0].alpha in (grid[0]["alpha"], grid[-1]["alpha"]),
            "accuracy": _stages(accuracy),
            "forgetting": _stages(lost),
            "backward_transfer": _stages(transfer),
            "new_task_accuracy": spread(100 * new[arm]),
            "cost": spread(100 * (new["none"] - new[arm])),
            "gap": spread(100 * joint - accuracy[:, -1]),
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


def reaches_goal(row: dict[str, Any]) -> bool:
    """Tell whether an arm cuts forgetting enough at a cost that is low enough."""
    reduction = row["reduction_percent"]
    return reduction is not None and reduction >= GOAL_REDUCTION and row["cost"]["mean"] <= GOAL_COST


def _best(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, one a seed, at the alpha with the best mean validation accuracy at the end."""
    grid = _grid(runs)
    best = max(grid, key=lambda row: row["validation"])["alpha"]
    return [run for run in runs if run.alpha == best]


def _grid(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the mean over seeds at every alpha of one arm, in the order of the grid."""
    rows = []
    for alpha in dict.fromkeys(run.alpha for run in runs):
        same = [run for run in runs if run.alpha == alpha]
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
