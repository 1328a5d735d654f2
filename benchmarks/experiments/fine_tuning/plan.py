"""What is compared: conditions, the methods of each, the grids, and the choice on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ...plumbing.workers import Workers
from .settings import UNCHANGED, Arm, Condition, Run, Setup
from .training import train

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # lambda
NOISES = (0.0, 0.1, 0.2, 0.4)
MEMORIES = (10, 50)  # old samples of a class; none at all is the same as lambda = 0
EPOCHS = (1.0, 0.1)  # beside the longest training
CONSTANTS = (10, 3)  # iterations, beside the usual number

LEARNING_RATES = (0.0001, 0.001, 0.003, 0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.4)
PENALTY_RATES = (0.0001, 0.01, 0.03, 0.1, 0.3)
#: lr * alpha * max(F): by what share of its way the most important parameter is pulled back in a step. Steps overshoot
#: above 2 (1 + momentum) = 3.8, and F grows as updates go on, so there is little room above 1. The mean of WPL's F is
#: some 50 to 500 times smaller than its maximum, so the L2 anchor, whose F are all the same, begins lower.
PULLS = {"wpl": (0.1, 1.0), "l2": (0.003, 0.1)}

Key = tuple[Condition, str]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
    """One condition with one method: what was tried, what was chosen, and its runs.

    Attributes:
        arm: the chosen one.
        grid: each arm that was tried, with its validation accuracy, the mean over updates and tuning seeds; empty
            where the choice was taken over from the same condition without noise.
        runs: of the chosen arm, by seed.
    """

    arm: Arm
    grid: list[tuple[Arm, float]]
    runs: list[Run]


def studies(scenario: str, iterations: int, epochs: float) -> dict[str, list[Condition]]:
    """Return the conditions of each study; one condition may be part of several.

    Args:
        scenario: "known" or "new".
        iterations: of an update, unless the study is about them.
        epochs: the longest training, that of the study of noise.
    """
    usual = Condition(scenario, iterations)
    longest = Condition(scenario, epochs, "epochs")
    share = [replace(usual, share_old=value) for value in SHARES]
    constants = sorted({iterations, *(value for value in CONSTANTS if value < iterations)}, reverse=True)
    return {
        "steps": [
            longest,
            *(Condition(scenario, value, "epochs") for value in EPOCHS if value < epochs),
            *(replace(usual, steps=value) for value in constants),
        ],
        "share": share,
        "noise": [replace(longest, noise=value) for value in NOISES],
        "memory": [share[0], *(replace(usual, memory=value) for value in MEMORIES), usual],
    }


def keys(plan: dict[str, list[Condition]]) -> list[Key]:
    """Return every pair of a condition and a method, each once: the L2 anchor where WPL may replace old data."""
    pairs = [(c, method) for conditions in plan.values() for c in conditions for method in ("none", "wpl")]
    return _unique([*pairs, *((c, "l2") for c in plan["memory"])])


def grid(method: str) -> list[Arm]:
    """Return what is tried: as many arms for every method."""
    if method == "none":
        return [Arm(method, lr) for lr in LEARNING_RATES]
    return [Arm(method, lr, pull / lr) for lr in PENALTY_RATES for pull in PULLS[method]]


def n_runs(pairs: Sequence[Key], n_seeds: int, n_tuning: int) -> int:
    """Return how many trainings :func:`run` takes for one scenario."""
    tuned = sum(condition.noise == 0 for condition, _ in pairs)
    trials = tuned * len(LEARNING_RATES) * n_tuning
    return trials + tuned * (n_seeds - n_tuning) + (len(pairs) - tuned) * n_seeds + n_seeds


def run(
    setup: Setup, pairs: Sequence[Key], n_seeds: int, n_tuning: int, workers: Workers
) -> tuple[dict[Key, Outcome], list[Run]]:
    """Tune every pair on the validation data of the first seeds, then run what was chosen on all seeds.

    Args:
        setup: settings of all runs.
        pairs: of one scenario, from :func:`keys`.
        n_seeds: seeds 0 to n_seeds - 1.
        n_tuning: how many of them the choice is made on.
        workers: to run on.

    Returns:
        Outcomes by pair, and the runs of the model that is never updated.
    """
    tuned = [pair for pair in pairs if pair[0].noise == 0]
    jobs = [(c, arm, seed) for seed in range(n_tuning) for c, method in tuned for arm in grid(method)]
    done = _train(setup, jobs, workers)
    grids = {
        (c, method): [(arm, _score([done[c, arm, seed] for seed in range(n_tuning)])) for arm in grid(method)]
        for c, method in tuned
    }
    chosen = {pair: max(grids[replace(pair[0], noise=0.0), pair[1]], key=lambda row: row[1])[0] for pair in pairs}
    unchanged = pairs[0][0], Arm(UNCHANGED, 0.0)
    wanted = [(*what, s) for s in range(n_seeds) for what in (unchanged, *((c, chosen[c, m]) for c, m in pairs))]
    done |= _train(setup, [job for job in wanted if job not in done], workers)
    outcomes = {
        (c, m): Outcome(chosen[c, m], grids.get((c, m), []), [done[c, chosen[c, m], s] for s in range(n_seeds)])
        for c, m in pairs
    }
    return outcomes, [done[unchanged[0], unchanged[1], seed] for seed in range(n_seeds)]


def _train(
    setup: Setup, jobs: Sequence[tuple[Condition, Arm, int]], workers: Workers
) -> dict[tuple[Condition, Arm, int], Run]:
    """Run jobs."""
    return dict(zip(jobs, workers.map(train, [(setup, *job) for job in jobs]), strict=True))


def _score(runs: Sequence[Run]) -> float:
    """Return the validation accuracy, its mean over updates and runs."""
    return float(np.mean([run.validation[1:] for run in runs]))


def _unique(items: Sequence[Item]) -> list[Item]:
    """Return the items in order, each once."""
    return list(dict.fromkeys(items))
