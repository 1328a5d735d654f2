"""The figure of the experiment: four panels for each scenario."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...plumbing import plots
from .results import Scenario, name
from .settings import METHODS
from .stream import SCENARIOS

_LINES = (plots.BLACK, plots.BLUE, plots.SKY, plots.GREEN, plots.ORANGE, plots.VERMILLION, plots.PURPLE)
_MARKS = ("o", "s", "^", "v", "D", "P", "X")
_METHODS = {"none": (plots.VERMILLION, "o"), "wpl": (plots.BLUE, "s"), "l2": (plots.ORANGE, "D")}
_TITLES = ("steps of an update", "share of old data", "wrong labels, {epochs:g} epochs", "mean over updates, with WPL")


def draw(record: Mapping[str, Any]) -> bytes:
    """Draw a record as PNG."""
    plt = plots.pyplot()
    scenarios = [Scenario(record, name) for name in record["scenarios"]]
    drawing, axes = plt.subplots(
        len(scenarios), 4, figsize=(13.5, 0.9 + 3.5 * len(scenarios)), squeeze=False, layout="constrained"
    )
    for row, (scenario, line) in enumerate(zip(scenarios, axes, strict=True)):
        for column, study in enumerate(("steps", "share", "noise")):
            _draw_curves(line[column], scenario, study)
        _draw_methods(line[3], scenario)
        for column, axis in enumerate(line):
            letter = "abcdefgh"[4 * row + column]
            axis.set_title(f"({letter}) {_TITLES[column].format(**record['settings'])}", loc="left", fontweight="bold")
        line[0].set_ylabel(f"{SCENARIOS[scenario.name].capitalize()}\ntest accuracy (%)")
    for column, axis in enumerate(axes[-1]):
        columns = 3 if column == 3 else 2
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False, columnspacing=1.2)
    data, settings = record["data"]["name"], record["settings"]
    words = (
        f"{data}, update sets of {settings['sizes']['update']}, {settings['seeds']} seed{'s' * (settings['seeds'] > 1)}"
    )
    drawing.suptitle(f"Fine-tuning on small update sets of one class  ({words})", fontsize=11)
    with plt.rc_context({"savefig.dpi": 160}):
        return _with_palette(plots.png(drawing))


def _draw_curves(axis: Any, scenario: Scenario, study: str) -> None:
    """Draw the accuracy after every update without a penalty, for each condition of a study."""
    for index, row in enumerate(scenario.study(study)):
        curves = np.array(row["methods"]["none"]["curves"])
        mean, std = curves.mean(0), curves.std(0, ddof=int(len(curves) > 1))
        colour, steps = _LINES[index % len(_LINES)], range(len(mean))
        mark = _MARKS[index % len(_MARKS)]
        axis.plot(
            steps,
            mean,
            color=colour,
            marker=mark,
            markersize=3.5,
            linewidth=1.3,
            label=name(study, row["condition"]).split(",")[0],
        )
        axis.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)
    unchanged = np.array(scenario.unchanged["curves"]).mean(0)
    axis.plot(range(len(unchanged)), unchanged, color=plots.GREY, linestyle=":", label="never updated")
    axis.set_xlabel("updates")
    axis.locator_params(axis="x", integer=True)
    _fit(axis, [row["methods"]["none"]["curves"] for row in scenario.study(study)])


def _draw_methods(axis: Any, scenario: Scenario) -> None:
    """Draw the mean accuracy of every method against the old data in reach."""
    rows = [*scenario.study("share"), *scenario.study("memory")[1:-1]]
    n_shares = len(scenario.study("share"))
    for shift, (method, (colour, mark)) in zip((-0.16, 0.0, 0.16), _METHODS.items(), strict=True):
        for part in (range(n_shares), range(n_shares, len(rows))):
            found = [
                (place, rows[place]["methods"][method]["mean"]) for place in part if method in rows[place]["methods"]
            ]
            places = [place + shift + 0.5 * (place >= n_shares) for place, _ in found]
            mean, std = ([values[key] for _, values in found] for key in ("mean", "std"))
            label = METHODS[method] if part.start == 0 else None
            line = "none" if method == "l2" else "-"  # it was not run at every lambda
            axis.errorbar(
                places,
                mean,
                yerr=std,
                color=colour,
                marker=mark,
                markersize=4.5,
                linewidth=1.1,
                linestyle=line,
                label=label,
            )
    axis.axhline(scenario.unchanged["mean"]["mean"], color=plots.GREY, linestyle=":")
    axis.axvline(n_shares - 0.25, color=plots.BLACK, linewidth=0.8)
    names = [f"{row['condition']['share_old']:g}" for row in rows[:n_shares]]
    names += [f"{row['condition']['memory']}" for row in rows[n_shares:]]
    axis.set_xticks([place + 0.5 * (place >= n_shares) for place in range(len(rows))], names)
    axis.set_xlabel("\n")  # room for the two names
    for centre, words in (
        (n_shares / 2 - 0.5, "lambda, all old data kept"),
        (n_shares + 1, "kept of a class,\nlambda 0.5"),
    ):
        below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
        axis.annotate(words, (centre, 0), (0, -20), ha="center", va="top", **below)


def _with_palette(png: bytes) -> bytes:
    """Encode an image with 255 colours: overlapping bands have many, and cost three times the bytes without."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(255).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fit(axis: Any, curves: Sequence[Any]) -> None:
    """Leave the range to the data, within 0 to 100."""
    low = min(float(np.array(part).mean(0).min()) for part in curves)
    axis.set_ylim(max(0.0, low - 5), 101)
