"""What the record says in a table and in two figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...plumbing import plots
from ..harness import drawing
from ..harness.statistics import difference, seeds_of, signed
from ..harness.tables import Table
from .arms import Row

ENOUGH = 4  # seeds for an interval that says something
_CURVES = {"none": "no penalty", "l2": "L2 anchor (F = 1)", "mc": "Fisher"}  # the panels of the first figure
_FEW = (plots.BLUE, plots.VERMILLION, plots.GREEN, plots.ORANGE, plots.PURPLE)  # colours of a few tasks
_LOOKS = {
    "l2": (plots.ORANGE, "^", "-"),
    "mc": (plots.BLUE, "o", "-"),
    "exact": (plots.BLACK, "s", "--"),
    "empirical": (plots.SKY, "D", "-"),
    "none": (plots.VERMILLION, "v", ":"),
    "frozen": (plots.GREY, "P", "-."),
    "joint": (plots.BLACK, "", (0, (1, 2))),
}
_SQUARED = (plots.GREEN, plots.PURPLE, "#8A6D00")  # by rank of the batch size


def tables(row: Row, record: dict[str, Any]) -> dict[str, Table]:
    """Return the table of arms."""
    many = f"{row.task}s"
    columns = ("", f"all {many}", f"first {row.task}", f"last {row.task}", "forgetting", f"new {many}", row.versus)
    columns = (*columns, f"alpha, {row.parts}", "good")
    arms = _ordered(row, record)
    return {"arms": Table(columns, [[row.title_of(a), *_cells(row, f, arms.get("l2"))] for a, f in arms.items()])}


def _ordered(row: Row, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arms in the order in which they are listed."""
    return dict(sorted(record["arms"].items(), key=lambda item: list(row.arms).index(item[0].split()[0])))


def _cells(row: Row, found: Mapping[str, Any], l2: Mapping[str, Any] | None) -> list[str]:
    """Return an arm's cells."""
    setting = found["setting"]
    shown = "" if setting is None else f"{setting:g}" if isinstance(setting, float) else f"{row.parts} {setting}"
    return [
        *(with_interval(row, values) for values in (found[row.key], found["tasks"][0], found["tasks"][-1])),
        *(with_interval(row, found[key]) if key in found else "" for key in ("forgetting", "new_tasks")),
        "" if l2 is None or l2 is found else _versus(row, found, l2),
        shown + " (edge)" * found["at_edge_of_grid"],
        _range(found["good"]) if "good" in found else "",
    ]


def _range(good: Mapping[str, Any]) -> str:
    """Format a range of alphas."""
    return f"{'< ' * good['open_low']}{good['low']:.1e} to {'> ' * good['open_high']}{good['high']:.1e}"


def with_interval(row: Row, values: Mapping[str, Any]) -> str:
    """Format a mean with its 95 % interval, where there is one."""
    half = values["half_width"] if len(values["seeds"]) >= ENOUGH else None
    mean = f"{round(values['mean'], row.digits) + 0.0:.{row.digits}f}"
    return mean + ("" if half is None else f" ± {half:.{row.digits}f}")


def _versus(row: Row, found: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Format by how much an arm is better than another one."""
    mean, half = difference(found[row.key], other[row.key])
    enough = len(found[row.key]["seeds"]) >= ENOUGH
    return signed(row.better * mean, half if enough else math.inf, row.digits)


def figures(row: Row, record: dict[str, Any]) -> dict[str, bytes]:
    """Return both figures; the second one only where alphas were tried."""
    drawn = {"": _sequence(row, record)}
    if any("good" in found for found in record["arms"].values()):
        drawn["_alphas"] = _alphas(row, record)
    return drawn


def _sequence(row: Row, record: dict[str, Any]) -> bytes:
    """Draw every task's score while the next ones are learnt: a panel for each arm, a colour for each task."""
    arms = [arm for arm in _CURVES if arm in record["arms"]]
    n, enough = len(record["arms"]["none"]["tasks"]), record["settings"]["seeds"] >= ENOUGH
    figure, axes = drawing.panels(1, len(arms), (3.6 * len(arms) + 0.3, 3.7), sharey=True)
    for axis, arm in zip(axes[0], arms, strict=True):
        found = record["arms"][arm]
        _draw_tasks(row, axis, found, record, enough)
        alpha = "" if found["setting"] is None else f", alpha = {found['setting']:,g}"
        axis.set_title(f"{_CURVES[arm]}{alpha}", loc="left", pad=17, fontweight="bold")
        said = f"mean of all {n} {row.task}s in the end: {with_interval(row, found[row.key])}{row.unit}"
        axis.annotate(said, (0, 1.02), xycoords="axes fraction", fontsize=8.5, va="bottom")
        axis.set_xlabel(row.clock)
    axes[0, 0].set_ylabel(row.words)
    drawing.legend(figure, axes[0, :1], min(n, 10))
    where = f"{record['data']['name']}, {seeds_of(record['settings']['seeds'])}{'; bands: 95 % intervals' * enough}"
    return drawing.png(figure, f"{row.title.format(n=n)}  ({where})", 128)


def _draw_tasks(row: Row, axis: Any, found: Mapping[str, Any], record: Mapping[str, Any], bands: bool) -> None:
    """Draw one arm's tasks from the epoch on in which each is first learnt, and where one ends and the next begins."""
    n, epochs = len(found["tasks"]), record["settings"]["epochs"]
    names = record["data"].get("tasks") or [f"{row.task} {task + 1}" for task in range(n)]
    x = np.arange(1, n * epochs + 1)
    mean = np.array(found["curve"])
    half = np.array(found["curve_half_width"]) if bands else None
    for task in range(n):
        since = slice(task * epochs, None)
        look = {"color": _colour(task, n), "label": names[task], "linewidth": 1.9}
        if half is None:
            axis.plot(x[since], mean[since, task], **look)
        else:
            drawing.band(axis, x[since], mean[since, task], half[since, task], opacity=0.16, **look)
        axis.axvspan(task * epochs, (task + 1) * epochs, color=plots.BLACK, alpha=0.045 * (task % 2), linewidth=0)
        if n <= 6:
            middle = ((task + 0.5) * epochs, 0.015)
            look = {"ha": "center", "fontsize": 7.5, "color": plots.GREY}
            axis.annotate(f"learns {task + 1}", middle, xycoords=axis.get_xaxis_transform(), **look)
    axis.set(xlim=(0, n * epochs), xticks=[task * epochs for task in range(n + 1)])
    if row.limits is None:
        axis.margins(y=0.12)  # so that no curve runs through the words at the bottom
    else:
        axis.set_ylim(row.limits)
    axis.grid(axis="x", visible=False)


def _colour(task: int, n: int) -> Any:
    """Return a task's colour: one of a few that differ, or one of a scale from dark to bright."""
    return _FEW[task] if n <= len(_FEW) else plots.pyplot().get_cmap("viridis")(0.93 * task / (n - 1))


def _alphas(row: Row, record: dict[str, Any]) -> bytes:
    """Draw the score over all tasks against alpha, and that over the tasks learnt so far after each."""
    figure, axes = drawing.panels(1, 2, (11.5, 4.6), width_ratios=(1.75, 1), sharey=row.limits is not None)
    sweep, stages = axes[0]
    n = len(record["arms"]["none"]["tasks"])
    arms = _ordered(row, record)
    for rank, (arm, found) in enumerate(arms.items()):
        colour, marker, line = look(arm, record["settings"]["batch_sizes"])
        style = {"color": colour, "marker": marker, "markersize": 4.5, "linestyle": line, "label": row.title_of(arm)}
        mean, half = found[row.key]["mean"], found[row.key]["half_width"] or 0
        if isinstance(found["setting"], float):
            sweep.plot([tried["setting"] for tried in found["grid"]], [t["test"] for t in found["grid"]], **style)
            sweep.errorbar(found["setting"], mean, yerr=half, color=colour, capsize=3, linewidth=1.3, marker="")
        else:
            sweep.axhline(mean, color=colour, linestyle=line, linewidth=1.2)
        if "stages" in found:
            means, halves = ([stage[key] or 0 for stage in found["stages"]] for key in ("mean", "half_width"))
            beside = 0.035 * (rank - len(arms) / 2)  # so that intervals do not cover each other
            stages.errorbar(np.arange(1, n + 1) + beside, means, yerr=halves, capsize=2, **style | {"linewidth": 1.1})
        else:
            stages.axhline(mean, **style | {"linewidth": 1.2})
    top = row.limits[1] if row.limits else None
    sweep.set(xscale="log", xlabel="alpha, as the user sets it", ylabel=row.words, ylim=(None, top))
    stages.set(xlabel=f"{row.task}s learnt", xticks=range(1, n + 1))
    drawing.letter(sweep, 0, f"mean over all {n} {row.task}s in the end")
    drawing.letter(stages, 1, f"mean over the {row.task}s learnt so far")
    drawing.legend(figure, [stages], 4)
    where = f"{record['data']['name']}, {seeds_of(record['settings']['seeds'])}; bars: 95 % intervals"
    return drawing.png(figure, f"{row.name}: how strong, and which F  ({where})", 128)


def look(arm: str, batch_sizes: list[int]) -> tuple[Any, ...]:
    """Return an arm's colour, marker and line."""
    kind, _, size = arm.partition(" ")
    if kind != "squared":
        return _LOOKS[kind]
    return _SQUARED[batch_sizes.index(int(size)) % len(_SQUARED)], "x", "-"
