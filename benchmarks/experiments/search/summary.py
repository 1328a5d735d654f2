"""What the runs of a search say: the choice of a setting, curves over seeds, the worst epoch, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..harness.statistics import at_edge, best, deviation, five_digits, grouped, spread
from .loop import MEASURES, Run

#: the paper's curves fall by this much in percent, or more, where cross-entropy alone forgets most
GOALS = {"mean": 60.0, "best5": 40.0, "max": 40.0}
ARMS = {"ce": "cross-entropy alone", "wpl": "with WPL"}
_END = 3  # epochs that "in the end" means


def score(run: Run) -> float:
    """Return what settings are chosen by: the mean validation reward of the last epochs; 0 if the run diverged."""
    return 0.0 if run.diverged else float(np.mean([epoch["reward"] for epoch in run.epochs[-_END:]]))


def grid(runs: Sequence[Run], setting: str, start: int = 0) -> dict[str, Any]:
    """Return the scores of a grid, the best of its values (the smaller of equals), and whether it lies at the edge.

    What was forgotten on the mean, from epoch ``start`` on, stands beside each score; it has no say in the choice.
    """
    groups = dict(sorted(grouped(runs, lambda run: getattr(run, setting)).items()))
    chosen = best({value: np.mean([score(run) for run in same]) for value, same in groups.items()})
    rows = []
    for value, same in groups.items():
        scores = [score(run) for run in same]
        lost = [epoch["mean"] for run in same if not run.diverged for epoch in run.epochs[start:]]
        rows.append({setting: value, "reward": round(float(np.mean(scores)), 5), "seeds": _rounded(scores)})
        rows[-1]["forgetting"] = five_digits(np.mean(lost)) if lost else None
    return {"values": rows, "chosen": chosen, "at_edge": at_edge(chosen, list(groups))}


def summarise(runs: Mapping[str, Sequence[Run]], start: int) -> dict[str, Any]:
    """Compare the arms.

    Forgetting is an error at the end of an epoch minus the error right after an architecture's training. The worst
    epoch is the one from ``start`` on in which the mean difference of cross-entropy alone, averaged over seeds, is
    largest; before ``start`` the arms are the same.

    Args:
        runs: by arm, seeds in the same order; runs that diverged are counted and left out, in both arms.
        start: epoch from which on the penalty acts.
    """
    kept = [i for i in range(len(runs["ce"])) if not any(arm[i].diverged for arm in runs.values())]
    arms: dict[str, Any] = {}
    for arm, all_runs in runs.items():
        chosen = [all_runs[i] for i in kept]
        keys = chosen[0].epochs[0] if chosen else ()
        stacked = {key: np.array([[epoch[key] for epoch in run.epochs] for run in chosen]) for key in keys}
        finals = {part: [run.final[part] for run in chosen] for part in ("validation", "test")}
        arms[arm] = {
            "diverged": sum(run.diverged for run in all_runs),
            "curves": {
                key: {"mean": _rounded(values.mean(0)), "std": _rounded(deviation(values))}
                for key, values in stacked.items()
            },
            "after_start": {key: spread(values[:, start:].mean(1), five_digits) for key, values in stacked.items()},
            "end": {key: spread(values[:, -_END:].mean(1), five_digits) for key, values in stacked.items()},
            "final": {part: spread(values, five_digits) for part, values in finals.items()},
            "times": _times(chosen),
        }
    result: dict[str, Any] = {"seeds": len(kept), "start": start, "arms": arms}
    if kept and len(arms["ce"]["curves"]["mean"]["mean"]) > start:
        result |= _verdicts(arms, start)
    return result


def _verdicts(arms: dict[str, Any], start: int) -> dict[str, Any]:
    """Return the worst epoch of cross-entropy alone, and what the penalty makes of it."""
    curves = {arm: values["curves"] for arm, values in arms.items()}
    worst = start + int(np.argmax(curves["ce"]["mean"]["mean"][start:]))
    verdicts = {}
    for measure in MEASURES:
        without, with_it = (curves[arm][measure]["mean"][worst] for arm in ("ce", "wpl"))
        cut = 100 * (1 - with_it / without) if without > 0 else None
        verdicts[measure] = {
            "ce": without,
            "wpl": with_it,
            "reduction_percent": None if cut is None else round(cut, 1),
            "goal_percent": GOALS[measure],
            "reached": None if cut is None else cut >= GOALS[measure],
        }
    rewards = {arm: values["end"]["reward"]["mean"] for arm, values in arms.items()}
    verdicts["reward"] = {**rewards, "reached": rewards["wpl"] >= rewards["ce"]}
    return {"worst_epoch": worst, "verdicts": verdicts}


def _times(runs: Sequence[Run]) -> dict[str, float]:
    """Return the milliseconds of one of each part, the median over runs."""
    parts = runs[0].times if runs else {}
    times = {part: [run.times[part]["milliseconds"] for run in runs if part in run.times] for part in parts}
    return {part: round(float(np.median(values)), 4) for part, values in times.items()}


def _rounded(values: Any) -> list[float]:
    """Keep five digits of each."""
    return [five_digits(value) for value in values]
