"""The tables of the experiment, what the paper found beside them, and its figure; made from the record alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...plumbing import plots
from ..harness import drawing
from ..harness.statistics import difference, points, seeds_of, signed
from ..harness.tables import Table
from .settings import METHODS
from .stream import SCENARIOS

NOTES = """Test accuracy in % on all classes so far, mean over updates, then mean ± standard deviation over seeds; each
cell at its best of as many settings (learning rates; for penalties pairs of learning rate and alpha), chosen on
validation data, those with wrong labels as without. Differences are in points, paired by seed, with 95 % intervals of
each alone. What the paper found holds here, without a penalty: "as well" where the mean loses at most 1 point, "about
as well" 2, "little" 3; "too few" where it loses more than 1 point, and clearly some; "overfits" where clearly more
than 1."""

_COLUMNS = ("", "iterations", *METHODS.values(), "no penalty: change")
_COLUMNS += ("WPL - no penalty", "WPL - L2", "WPL - never updated")
#: what each study is called; its changes are against its longest updates, best lambda, right labels, the row before
_STUDIES = {
    "steps": "steps of an update (change: from the first row)",
    "share": "lambda, the share of old data (change: from the best row)",
    "noise": "wrong labels (change: from the first row)",
    "memory": "old samples that are kept (change: from the row before)",
}

_LINES = (plots.BLACK, plots.BLUE, plots.SKY, plots.GREEN, plots.ORANGE, plots.VERMILLION, plots.PURPLE)
_MARKS = ("o", "s", "^", "v", "D", "P", "X")
_METHODS = {"none": (plots.VERMILLION, "o"), "wpl": (plots.BLUE, "s"), "l2": (plots.ORANGE, "D")}
_TITLES = ("steps of an update", "share of old data", "wrong labels, {epochs:g} epochs", "mean over updates{wpl}")
#: what the paper found
_FINDINGS = (
    "a small constant number of steps does as well as many epochs",
    "a tenth of an epoch is too few",
    "a lambda in between is best",
    "lambda = 0 overfits the update set",
    "lambda = 1 does about as well as 0.75",
    "10 % wrong labels cost little (paper: about 2 points)",
)
#: points that may be lost where something does as well, about as well, with wrong labels
_AS_WELL, _ABOUT_AS_WELL, _LITTLE = 1.0, 2.0, 3.0


def tables(record: Mapping[str, Any]) -> dict[str, Table]:
    """Return one table for each scenario, and whether what the paper found holds in each."""
    scenarios = record["scenarios"]
    found = {name: Table(_COLUMNS, list(_rows(name, part))) for name, part in scenarios.items()}
    data, begun = record["data"]["name"], _begun(record["settings"])
    rows = [[f"{data}, {SCENARIOS[name]}{begun}", *_findings(part)] for name, part in scenarios.items()]
    return {**found, "findings": Table(("", *_FINDINGS), rows)}


def _begun(settings: Mapping[str, Any]) -> str:
    """Say which network it is, if it is another one than usual, and what it learnt before."""
    others = settings.get("n_others", 0)
    words = ", convolutions" * (settings.get("model", "mlp") == "cnn")
    if not others:
        return words
    return words + f", {others} others {'learnt before' if settings['pretraining'] else 'left out'}"


def _findings(part: Mapping[str, Any]) -> Iterator[str]:
    """Tell of each thing that the paper found whether it holds without a penalty, and the figures that decide."""
    longest, *steps = study(part, "steps")
    shares = {row["condition"]["share_old"]: row for row in study(part, "share")}
    noises = {row["condition"]["noise"]: row for row in study(part, "noise")}
    mean, half = _change(shares[0.5], longest)
    yield _verdict(mean >= -_AS_WELL, signed(mean, half))
    tenth = [row for row in steps if row["condition"]["unit"] == "epochs" and row["condition"]["steps"] == 0.1]
    changes = [_change(row, longest) for row in tenth]
    yield "".join(_verdict(mean < -_AS_WELL and mean + half < 0, signed(mean, half)) for mean, half in changes)
    best = max(shares, key=lambda share: shares[share]["methods"]["none"]["mean"]["mean"])
    yield _verdict(0 < best < 1, f"{best:g}")
    mean, half = _change(shares[0.0], shares[best])
    yield _verdict(mean + half < -_AS_WELL, signed(mean, half))
    mean, half = _change(shares[1.0], shares[0.75])
    yield _verdict(mean >= -_ABOUT_AS_WELL, signed(mean, half))
    mean, half = _change(noises[0.1], noises[0.0])
    yield _verdict(mean >= -_LITTLE, signed(mean, half))


def _change(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Return by how much two conditions differ without a penalty."""
    return difference(a["methods"]["none"]["mean"], b["methods"]["none"]["mean"])


def _verdict(holds: bool, figures: str) -> str:
    """Say whether something holds, and by which figures."""
    return f"{'yes' if holds else 'no'} ({figures})"


def study(part: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the rows of a study in order, from a scenario's part of a record."""
    return [part["results"][title] for title in part["studies"][name]]


def condition_name(study: str, condition: Mapping[str, Any]) -> str:
    """Name a condition by what its study varies."""
    unit = condition["unit"].removesuffix("s") if condition["steps"] == 1 else condition["unit"]
    steps = f"{condition['steps']:g} {unit}"
    if study == "steps":
        return steps
    if study == "noise":
        return f"{100 * condition['noise']:.0f} % wrong, {steps}"
    if study == "share":
        return f"lambda = {condition['share_old']:g}"
    if condition["memory"] is not None:
        return f"{condition['memory']} of a class"
    return "none" if condition["share_old"] == 0 else "all"


def _rows(name: str, part: Mapping[str, Any]) -> Iterator[list[str]]:
    """Return the rows of a scenario: each study under its heading."""
    unchanged = part["unchanged"]
    before = f"; before, {points(part['pretrained'])} % of the other classes" if "pretrained" in part else ""
    yield [f"update sets of {SCENARIOS[name]}; never updated: {points(unchanged['mean'])} %{before}"]
    for kind, title in _STUDIES.items():
        rows = study(part, kind)
        yield [title]
        best = max(rows, key=lambda row: row["methods"]["none"]["mean"]["mean"])
        for row, before in zip(rows, [rows[0], *rows], strict=False):
            found = row["methods"]
            reference = {"share": best, "memory": before}.get(kind, rows[0])["methods"]
            yield [
                condition_name(kind, row["condition"]),
                f"{row['iterations_per_update']:g}",
                *(_accuracy(found.get(method)) for method in METHODS),
                "" if reference is found else _difference(found["none"], reference["none"]),
                *(_difference(found.get("wpl"), other) for other in (found["none"], found.get("l2"), unchanged)),
            ]


def _accuracy(found: Mapping[str, Any] | None) -> str:
    """Format an accuracy, and how many runs diverged."""
    if found is None:
        return ""
    return points(found["mean"]) + (f" ({found['diverged']} diverged)" if found["diverged"] else "")


def _difference(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str:
    """Format a - b, paired by seed, where both were run."""
    return "" if a is None or b is None else signed(*difference(a["mean"], b["mean"]))


def figures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the curves of three studies without a penalty, and all methods against the old data in reach."""
    settings, scenarios = record["settings"], record["scenarios"]
    figure, axes = drawing.panels(len(scenarios), 4, (13.5, 0.9 + 3.5 * len(scenarios)))
    for line, (name, part) in zip(axes, scenarios.items(), strict=True):
        for axis, kind in zip(line, ("steps", "share", "noise"), strict=False):
            _draw_curves(axis, part, kind)
        _draw_methods(line[3], part)
        line[0].set_ylabel(f"{SCENARIOS[name].capitalize()}\ntest accuracy (%)")
    for index, axis in enumerate(axes.flat):
        wpl = ", with WPL" * ("wpl" in settings.get("methods", METHODS))
        drawing.letter(axis, index, _TITLES[index % 4].format(**settings, wpl=wpl))
    for column, axis in enumerate(axes[-1]):
        columns = 3 if column == 3 else 2
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False, columnspacing=1.2)
    words = f"{record['data']['name']}, update sets of {settings['sizes']['update']}, {seeds_of(settings['seeds'])}"
    words += _begun(settings)
    with plots.pyplot().rc_context({"savefig.dpi": 160}):
        return {"": drawing.png(figure, f"Fine-tuning on small update sets of one class  ({words})", 255)}


def _draw_curves(axis: Any, part: Mapping[str, Any], kind: str) -> None:
    """Draw the accuracy after every update without a penalty, for each condition of a study."""
    lowest = 100.0
    for index, row in enumerate(study(part, kind)):
        mean, std = drawing.over_runs(row["methods"]["none"]["curves"])
        look = {"color": _LINES[index % len(_LINES)], "marker": _MARKS[index % len(_MARKS)]}
        look |= {"markersize": 3.5, "linewidth": 1.3, "label": condition_name(kind, row["condition"]).split(",")[0]}
        drawing.band(axis, range(len(mean)), mean, std, 0.1, **look)
        lowest = min(lowest, mean.min())
    unchanged = np.array(part["unchanged"]["curves"]).mean(0)
    axis.plot(range(len(unchanged)), unchanged, color=plots.GREY, linestyle=":", label="never updated")
    axis.set(xlabel="updates", ylim=(max(0.0, lowest - 5), 101))
    axis.locator_params(axis="x", integer=True)


def _draw_methods(axis: Any, part: Mapping[str, Any]) -> None:
    """Draw the mean accuracy of every method: at each lambda, and behind a line with some old samples kept."""
    shares, memories = study(part, "share"), study(part, "memory")[1:-1]
    split = len(shares) - 0.25  # where the line is
    groups = [(range(len(shares)), shares), ([len(shares) + 0.5 + i for i in range(len(memories))], memories)]
    for shift, (method, (colour, mark)) in zip((-0.16, 0.0, 0.16), _METHODS.items(), strict=True):
        look = {"color": colour, "marker": mark, "markersize": 4.5, "linewidth": 1.1}
        look["linestyle"] = "none" if method == "l2" else "-"  # it was not run at every lambda
        for places, rows in groups:
            found = [(at + shift, row["methods"].get(method)) for at, row in zip(places, rows, strict=True)]
            drawn = [(at, m["mean"]["mean"], m["mean"]["std"]) for at, m in found if m]
            if not drawn:
                continue
            x, mean, std = zip(*drawn, strict=True)
            axis.errorbar(x, mean, yerr=std, label=METHODS[method] if rows is shares else None, **look)
    axis.axhline(part["unchanged"]["mean"]["mean"], color=plots.GREY, linestyle=":")
    axis.axvline(split, color=plots.BLACK, linewidth=0.8)
    names = [f"{row['condition']['share_old']:g}" for row in shares]
    names += [f"{row['condition']['memory']}" for row in memories]
    axis.set_xticks([*groups[0][0], *groups[1][0]], names)
    axis.set_xlabel("\n")  # room for the two names
    below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
    middle, right = len(shares) / 2 - 0.5, len(shares) + 1
    for centre, words in ((middle, "lambda, all old data kept"), (right, "kept of a class,\nlambda 0.5")):
        axis.annotate(words, (centre, 0), (0, -20), ha="center", va="top", **below)
