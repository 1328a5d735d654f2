"""What is compared: conditions, the methods of each, the grids, the choice on validation data, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..harness.runner import Runner
from ..harness.statistics import at_edge, best, spread
from .settings import METHODS, UNCHANGED, Arm, Condition, Run, Setup
from .stream import SCENARIOS
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


def studies(scenario: str, iterations: int, epochs: float) -> dict[str, list[Condition]]:
    """Return the conditions of each study; one condition may be part of several.

    Updates have so many iterations unless the study is about them; the longest ones, of that many epochs, are those of
    the study of noise.
    """
    usual = Condition(scenario, iterations)
    longest = Condition(scenario, epochs, "epochs")
    share = [usual._replace(share_old=value) for value in SHARES]
    constants = sorted({iterations, *(value for value in CONSTANTS if value < iterations)}, reverse=True)
    return {
        "steps": [
            longest,
            *(Condition(scenario, value, "epochs") for value in EPOCHS if value < epochs),
            *(usual._replace(steps=value) for value in constants),
        ],
        "share": share,
        "noise": [longest._replace(noise=value) for value in NOISES],
        "memory": [share[0], *(usual._replace(memory=value) for value in MEMORIES), usual],
    }


def grid(method: str) -> list[Arm]:
    """Return what is tried: as many arms for every method."""
    if method == "none":
        return [Arm(method, lr) for lr in LEARNING_RATES]
    return [Arm(method, lr, pull / lr) for lr in PENALTY_RATES for pull in PULLS[method]]


def run(
    setup: Setup,
    plan: dict[str, list[Condition]],
    n_seeds: int,
    n_tuning: int,
    runner: Runner,
    methods: Sequence[str] = tuple(METHODS),
) -> tuple[dict[str, Any], int]:
    """Tune every condition with every method on the validation data of some seeds, then run what was chosen on all.

    The L2 anchor, if it is among the methods, runs where WPL may replace old data. With wrong labels a method keeps
    what was chosen without: the validation data of a user would have them too.

    The choice is made on the first ``n_tuning`` of all ``n_seeds`` seeds.

    Returns:
        What the record says of the scenario: the conditions of each study by title, the model that is never updated,
        and every outcome, accuracies in %, "mean" over updates first; and the number of runs.
    """
    conditions = dict.fromkeys(condition for study in plan.values() for condition in study)
    pairs = [(c, method) for c in conditions for method in methods if method != "l2" or c in plan["memory"]]
    words = SCENARIOS[pairs[0][0].scenario]
    tuned = [pair for pair in pairs if pair[0].noise == 0]
    jobs = [(c, arm, seed) for seed in range(n_tuning) for c, method in tuned for arm in grid(method)]
    done = _train(f"tuning, {words}", setup, jobs, runner)
    tried = {
        (c, method): {arm: _score([done[c, arm, seed] for seed in range(n_tuning)]) for arm in grid(method)}
        for c, method in tuned
    }
    chosen = {(c, method): best(tried[c._replace(noise=0.0), method]) for c, method in pairs}
    unchanged = (pairs[0][0], Arm(UNCHANGED, 0.0))
    wanted = [(*what, seed) for seed in range(n_seeds) for what in (unchanged, *((c, chosen[c, m]) for c, m in pairs))]
    done |= _train(words, setup, [job for job in wanted if job not in done], runner)
    results: dict[str, Any] = {}
    for (c, method), arm in chosen.items():
        runs = [done[c, arm, seed] for seed in range(n_seeds)]
        row = results.setdefault(c.title, {"condition": c._asdict(), "methods": {}})
        row["iterations_per_update"] = round(max(run.iterations for run in runs) / (len(runs[0].test) - 1), 1)
        scores = tried.get((c, method), {})
        edge = {"lr_at_edge": at_edge(arm.lr, [one.lr for one in scores])} if scores else {}
        trials = [{**one._asdict(), "validation": round(100 * score, 2)} for one, score in scores.items()]
        row["methods"][method] = {**arm._asdict(), **edge, "grid": trials, **_accuracies(runs)}
    part = {
        "studies": {study: [condition.title for condition in of] for study, of in plan.items()},
        "unchanged": _accuracies([done[(*unchanged, seed)] for seed in range(n_seeds)]),
        "results": results,
    }
    return part, len(done)


def _train(
    words: str, setup: Setup, jobs: Sequence[tuple[Condition, Arm, int]], runner: Runner
) -> dict[tuple[Condition, Arm, int], Run]:
    """Run jobs."""
    return dict(zip(jobs, runner.map(words, train, [(setup, *job) for job in jobs]), strict=True))


def _score(runs: Sequence[Run]) -> float:
    """Return the validation accuracy, its mean over updates and runs."""
    return float(np.mean([run.validation[1:] for run in runs]))


def _accuracies(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the curves of runs, which begin with the model of the start, and what they come to."""
    curves = 100 * np.array([run.test for run in runs])
    return {
        "mean": spread(curves[:, 1:].mean(1)),
        "final": spread(curves[:, -1]),
        "diverged": sum(run.diverged for run in runs),
        "curves": curves.round(2).tolist(),
    }
