"""What the runs of a search say: the choice of a setting, curves over seeds, times; the tables and the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...plumbing import plots
from ..harness import drawing
from ..harness.statistics import (
    at_edge,
    best,
    deviation,
    difference,
    five_digits,
    grouped,
    points,
    seeds_of,
    signed,
    spread,
    within_noise,
)
from ..harness.tables import Table
from .loop import MEASURES, Run

#: the paper's curves fall by this much in percent, or more, where cross-entropy alone forgets most
GOALS = {"mean": 60.0, "best5": 40.0, "max": 40.0}
ARMS = {"ce": "cross-entropy alone", "wpl": "with WPL"}
#: how a setting is chosen: by the best mean validation reward, or, among those within one standard error of it, the one
#: that lets the weights move least
CHOICES = {"best": "best reward", "one-se": "one-standard-error rule"}
NOTES = """Differences: the validation error at the end of an epoch minus right after an architecture's own training;
mean ± standard deviation over seeds; change: WPL minus cross-entropy alone, paired by seed, with its 95 % interval.
Goals (60, 40, 40 % less, a reward that is not lower; *: reached) are somewhat below the paper's reductions, and about
the epoch in which cross-entropy alone forgets most; since that epoch is picked by what one arm did, chance favours the
other one in it, and not in the rows over all epochs. Times: milliseconds of one; there is one Fisher for each
architecture, the rest for each of its minibatches."""

_END = 3  # epochs that "in the end" means
_CALMEST = {"lr": min, "alpha": max}  # of settings that are as good
_PARTS = ("cross-entropy", "clipping and step", "penalty", "Fisher", "anchor")
_PARTS += ("penalty, as published", "Fisher, as published")
_LOOKS = {"ce": {"color": plots.VERMILLION, "linestyle": (0, (4, 1.6))}, "wpl": {"color": plots.BLUE, "linestyle": "-"}}


def score(run: Run) -> float:
    """Return what settings are chosen by: the mean validation reward of the last epochs; 0 if the run diverged."""
    return 0.0 if run.diverged else float(np.mean([epoch["reward"] for epoch in run.epochs[-_END:]]))


def grid(runs: Sequence[Run], setting: str, start: int = 0, choice: str = "best") -> dict[str, Any]:
    """Return the scores of a grid, the value that is chosen, and whether it lies at the edge.

    What was forgotten on the mean, from epoch ``start`` on, stands beside each score; it has no say in the choice.

    Args:
        runs: of all values, with the same seeds each.
        setting: "lr" or "alpha".
        start: epoch from which on forgetting counts.
        choice: "best": the value with the best mean score, the smaller of equals; "one-se": of those at most one
            standard error of the best one's mean below it, the smallest learning rate, or the largest alpha.
    """
    groups = dict(sorted(grouped(runs, lambda run: getattr(run, setting)).items()))
    scores = {value: [score(run) for run in same] for value, same in groups.items()}
    if choice == "one-se":
        chosen = _CALMEST[setting](within_noise(scores))
    else:
        chosen = best({value: float(np.mean(found)) for value, found in scores.items()})
    rows = []
    for value, same in groups.items():
        lost = [epoch["mean"] for run in same if not run.diverged for epoch in run.epochs[start:]]
        row = {"reward": round(float(np.mean(scores[value])), 5), "seeds": _rounded(scores[value])}
        rows.append({setting: value, **row, "forgetting": five_digits(np.mean(lost)) if lost else None})
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
        keys, parts = (chosen[0].epochs[0], chosen[0].times) if chosen else ((), ())
        stacked = {key: np.array([[epoch[key] for epoch in run.epochs] for run in chosen]) for key in keys}
        times = {part: [r.times[part]["milliseconds"] for r in chosen if part in r.times] for part in parts}
        arms[arm] = {
            "diverged": sum(run.diverged for run in all_runs),
            "curves": {k: {"mean": _rounded(v.mean(0)), "std": _rounded(deviation(v))} for k, v in stacked.items()},
            "after_start": {key: spread(values[:, start:].mean(1), five_digits) for key, values in stacked.items()},
            "end": {key: spread(values[:, -_END:].mean(1), five_digits) for key, values in stacked.items()},
            "final": {part: spread([r.final[part] for r in chosen], five_digits) for part in ("validation", "test")},
            "times": {part: round(float(np.median(found)), 4) for part, found in times.items()},
        }
    result: dict[str, Any] = {"seeds": len(kept), "start": start, "arms": arms}
    if kept:
        result["worst_epoch"] = start + int(np.argmax(arms["ce"]["curves"]["mean"]["mean"][start:]))
    return result


def _rounded(values: Any) -> list[float]:
    """Keep five digits of each."""
    return [five_digits(value) for value in values]


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """Return what was measured; and in one row each the goals, what was tuned, and times."""
    summary, tuning = record["summary"], record["tuning"]
    name = record["words"]["title"].removeprefix("Search for ") + f", {record['data']['name']}"
    name += ", outputs normalised" * _normalised(record)
    choice = record["settings"].get("choice", "best")
    name += f", {CHOICES[choice]}" * (choice != "best")
    covered = "all in use" if record["settings"]["task"]["cover"] == "used" else "cells"
    row, columns = [name, f"{covered}, alpha {tuning['alpha']['chosen']:g}"], ["", "penalty on"]
    tried = [cell for setting in ("lr", "alpha") for cell in _tried(tuning[setting], setting)]
    heads = ("learning rate", "tried (reward, difference)", "alpha", "tried (reward, difference)")
    found = {
        "results": Table(("", *ARMS.values(), "change"), _results(record)),
        "tuning": Table([*columns, *heads], [[*row, *tried]]),
    }
    if "worst_epoch" in summary:
        times = summary["arms"]["wpl"]["times"]
        cells = [f"{times[part]:.3g}" if part in times else "" for part in _PARTS]
        goals = Table([*columns, "mean difference", "best five", "largest", "reward"], [[*row, *_goals(summary)]])
        found |= {"goals": goals, "times": Table([*columns, *_PARTS], [[*row, *cells]])}
    return found


def _results(record: dict[str, Any]) -> list[list[str]]:
    """Return the rows of what was measured in each arm, and the change of what no arm's figures picked."""
    summary, error = record["summary"], record["words"]["error"]
    arms = [summary["arms"][arm] for arm in ARMS]
    rows = []
    if "worst_epoch" in summary:
        worst = summary["worst_epoch"]
        for measure, name in MEASURES.items():
            curves = [arm["curves"][measure] for arm in arms]
            cells = [_points({key: curve[key][worst] for key in ("mean", "std")}) for curve in curves]
            rows.append([f"{name}, epoch {worst + 1}", *cells, ""])
        for measure, name in MEASURES.items():
            words = f"{name}, epochs {summary['start'] + 1} on"
            rows.append([words, *_compared([arm["after_start"][measure] for arm in arms])])
        ends = [arm["end"] for arm in arms]
        rows.append(["mean reward, last epochs", *_compared([end["reward"] for end in ends])])
        rows.append([f"{error} when trained, last epochs", *_compared([end["error_before"] for end in ends])])
        rows.append([f"test {error}, chosen at the end", *_compared([arm["final"]["test"] for arm in arms])])
    if any(arm["diverged"] for arm in arms):
        rows.append(["runs that diverged, left out in both arms", *(str(arm["diverged"]) for arm in arms), ""])
    return rows


def _compared(spreads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render both arms' spreads over the same seeds, and the change from the first to the second."""
    mean, half = difference(spreads[1], spreads[0])
    size = max(abs(mean), half if math.isfinite(half) else 0.0)
    return [*map(_points, spreads), signed(mean, half, _digits(size))]


def _goals(summary: Mapping[str, Any]) -> list[str]:
    """Return what became of forgetting in the worst epoch and of the reward; marked where the goal was reached."""
    cells = []
    for measure, goal in GOALS.items():
        a, b = (summary["arms"][arm]["curves"][measure]["mean"][summary["worst_epoch"]] for arm in ARMS)
        cut = 100 * (1 - b / a) if a > 0 else None
        words = "nothing forgotten" if cut is None else f"{abs(cut):.0f} % {'less' if cut >= 0 else 'more'}"
        cells.append(f"{a:.3g} to {b:.3g} ({words}){' *' * (cut is not None and cut >= goal)}")
    a, b = (summary["arms"][arm]["end"]["reward"]["mean"] for arm in ARMS)
    return [*cells, f"{a:.3g} to {b:.3g}{' *' * (b >= a)}"]


def _tried(found: Mapping[str, Any], setting: str) -> list[str]:
    """Return the value that was chosen, and all that were tried."""
    tried = []
    for row in found["values"]:
        lost = row.get("forgetting")
        tried.append(f"{row[setting]:g} ({row['reward']:.3g}{f', {lost:.3g}' if lost is not None else ''})")
    return [f"{found['chosen']:g}{' (edge)' * found['at_edge']}", ", ".join(tried) or "given"]


def figures(record: dict[str, Any]) -> dict[str, bytes]:
    """Draw forgetting by epoch (its mean, that of the best five, the worst) and the rewards, with bands over seeds.

    Forgetting is drawn from the epoch on in which the penalty begins: before it the arms are the same run.
    """
    summary, words, cover = record["summary"], record["words"], record["settings"]["task"]["cover"]
    figure, axes = drawing.panels(2, 2, (9, 6))
    panels = {**MEASURES, "reward": "mean reward of the controller"}
    for index, (axis, (key, title)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        first = 0 if key == "reward" else summary["start"]
        for arm, label in ARMS.items():
            curve = summary["arms"][arm]["curves"].get(key, {"mean": [], "std": []})
            mean, std = (curve[part][first:] for part in ("mean", "std"))
            drawing.band(axis, range(first + 1, first + len(mean) + 1), mean, std, label=label, **_LOOKS[arm])
        if key == "reward":
            axis.axvline(summary["start"] + 1, color=plots.GREY, linestyle=":", linewidth=1.2, label="WPL begins")
        else:
            axis.axhline(0, color=plots.BLACK, linewidth=0.8)
        drawing.letter(axis, index, title)
        axis.set(xlabel="epoch", ylabel=words["reward"] if key == "reward" else f"change of {words['error']}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    drawing.legend(figure, [axes[1, 1]], 3)
    covered = "all weights that an architecture uses" if cover == "used" else "the cells' weights alone"
    notes = [f"penalty on {covered}, alpha {record['tuning']['alpha']['chosen']:g}"]
    notes += ["the cells' outputs are normalised"] * _normalised(record)
    notes.append(f"{seeds_of(summary['seeds'])}, mean ± standard deviation")
    return {"": drawing.png(figure, f"{words['title']}: {record['data']['name']}\n{'; '.join(notes)}")}


def _normalised(record: dict[str, Any]) -> bool:
    """Tell whether the cells' outputs are normalised."""
    return record["settings"]["task"].get("sizes", {}).get("layer_norm", False)


def _points(values: Mapping[str, Any]) -> str:
    """Render mean and deviation with three digits or so."""
    return points(values, _digits(max(abs(values["mean"]), values["std"])))


def _digits(size: float) -> int:
    """Return the number of digits behind the point that numbers of a size are shown with."""
    return 0 if size >= 100 else 1 if size >= 10 else 2
