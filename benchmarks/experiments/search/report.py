"""A search's record as tables and as a figure in four panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...plumbing import plots
from ..harness import drawing
from ..harness.statistics import points, seeds_of
from ..harness.tables import Table
from .loop import MEASURES
from .summary import ARMS

NOTES = """Differences: the validation error at the end of an epoch minus right after an architecture's own training;
mean ± standard deviation over seeds. Goals (60, 40, 40 % less, a reward that is not lower; *: reached) are somewhat
below the paper's reductions, and about the epoch in which cross-entropy alone forgets most; since that epoch is picked
by what one arm did, chance favours the other one in it, and not in the rows over all epochs."""

_LOOKS = {
    "ce": {"color": plots.VERMILLION, "linestyle": (0, (4, 1.6))},
    "wpl": {"color": plots.BLUE, "linestyle": "-"},
}
_GOAL_COLUMNS = ("", "penalty on", "mean difference", "best five", "largest", "reward")
_TUNING_COLUMNS = (
    "",
    "penalty on",
    "learning rate",
    "tried (reward, difference)",
    "alpha",
    "tried (reward, difference)",
)
_TIME_COLUMNS = ("", "penalty on", "step", "with WPL", "penalty", "Fisher", "anchor", "one Fisher")
_TIME_COLUMNS += ("at a time", "as published: penalty, Fisher")


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """Return what was measured; and in one row each the goals, what was tuned, and times."""
    summary, tuning = record["summary"], record["tuning"]
    task = record["settings"]["task"]
    name = record["words"]["title"].removeprefix("Search for ") + f", {record['data']['name']}"
    name += ", outputs normalised" * _normalised(record)
    row = [name, f"{'all in use' if task['cover'] == 'used' else 'cells'}, alpha {tuning['alpha']['chosen']:g}"]
    tried = [cell for setting in ("lr", "alpha") for cell in _tried(tuning[setting], setting)]
    found = {
        "results": Table(("", *ARMS.values()), _results(record)),
        "tuning": Table(_TUNING_COLUMNS, [[*row, *tried]]),
    }
    if "verdicts" in summary:
        found["goals"] = Table(_GOAL_COLUMNS, [[*row, *_goals(summary["verdicts"])]])
    if "penalty" in summary["arms"]["wpl"]["times"]:
        found["times"] = Table(_TIME_COLUMNS, [[*row, *_times(record)]])
    return found


def _results(record: dict[str, Any]) -> list[list[str]]:
    """Return the rows of what was measured in each arm."""
    summary, error = record["summary"], record["words"]["error"]
    arms = [summary["arms"][arm] for arm in ARMS]
    rows = []
    if "verdicts" in summary:
        worst = summary["worst_epoch"]
        for measure, name in MEASURES.items():
            curves = [arm["curves"][measure] for arm in arms]
            cells = [_points({key: curve[key][worst] for key in ("mean", "std")}) for curve in curves]
            rows.append([f"{name}, epoch {worst + 1}", *cells])
        for measure, name in MEASURES.items():
            cells = [_points(arm["after_start"][measure]) for arm in arms]
            rows.append([f"{name}, epochs {summary['start'] + 1} on", *cells])
        rows.append(["mean reward, last epochs", *(_points(arm["end"]["reward"]) for arm in arms)])
        rows.append([f"{error} when trained, last epochs", *(_points(arm["end"]["error_before"]) for arm in arms)])
        rows.append([f"test {error}, chosen at the end", *(_points(arm["final"]["test"]) for arm in arms)])
    if any(arm["diverged"] for arm in arms):
        rows.append(["runs that diverged, left out in both arms", *(str(arm["diverged"]) for arm in arms)])
    return rows


def _goals(verdicts: Mapping[str, Any]) -> list[str]:
    """Return what became of forgetting in the worst epoch and of the reward; marked where the goal was reached."""
    cells = []
    for measure in (*MEASURES, "reward"):
        one = verdicts[measure]
        change = f"{one['ce']:.3g} to {one['wpl']:.3g}"
        if measure != "reward":
            cut = one["reduction_percent"]
            words = "nothing forgotten" if cut is None else f"{abs(cut):.0f} % {'less' if cut >= 0 else 'more'}"
            change += f" ({words})"
        cells.append(f"{change}{' *' * bool(one['reached'])}")
    return cells


def _tried(found: Mapping[str, Any], setting: str) -> list[str]:
    """Return the value that was chosen, and all that were tried."""
    tried = []
    for row in found["values"]:
        lost = row.get("forgetting")
        tried.append(f"{row[setting]:g} ({row['reward']:.3g}{f', {lost:.3g}' if lost is not None else ''})")
    return [f"{found['chosen']:g}{' (edge)' * found['at_edge']}", ", ".join(tried) or "given"]


def _times(record: dict[str, Any]) -> list[str]:
    """Return what a training step takes, and which share of it the penalty, the Fisher and the anchors have."""
    times, settings = record["summary"]["arms"]["wpl"]["times"], record["settings"]
    step = times["cross-entropy"] + times["clipping and step"]
    per_architecture = {part: times.get(part, 0.0) / settings["minibatches"] for part in ("Fisher", "anchor")}
    parts = {"penalty": times["penalty"], **per_architecture}
    total = step + sum(parts.values())
    published = [times.get(f"{part}, as published") for part in ("penalty", "Fisher")]
    return [
        f"{step:.3g} ms",
        f"{total:.3g} ms",
        *(f"{100 * value / total:.2g} %" for value in parts.values()),
        f"{times.get('Fisher', 0.0):.3g} ms",
        str(record["workers"] or 1),
        "" if None in published else f"{published[0]:.3g} ({times['penalty']:.3g}), {published[1]:.3g} ms",
    ]


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
    size = max(abs(values["mean"]), values["std"])
    return points(values, 0 if size >= 100 else 1 if size >= 10 else 2)
