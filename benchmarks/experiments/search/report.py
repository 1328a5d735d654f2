"""A search's record as a table, as a figure in four panels, and as a section of the results page."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plumbing import markdown as md
from ...plumbing import plots
from .forgetting import MEASURES
from .summary import ARMS

_COLOURS = {"ce": plots.VERMILLION, "wpl": plots.BLUE}
_LINES = {"ce": (0, (4, 1.6)), "wpl": "-"}


def table(record: dict[str, Any]) -> str:
    """Return the comparison as text."""
    columns = (("", -38), *((ARMS[arm], 21) for arm in ARMS), ("", 40))
    lines = ["".join(_fit(name, width) for name, width in columns)]
    lines.append("-" * (sum(abs(width) for _, width in columns)))
    for cells in _rows(record):
        lines.append("".join(_fit(cell, width) for cell, (_, width) in zip(cells, columns, strict=True)).rstrip())
    return "\n".join([*lines, "-" * len(lines[1]), *_notes(record), *_time_lines(record)])


def figure(record: dict[str, Any]) -> bytes:
    """Draw forgetting by epoch (its mean, that of the best five, the worst) and the rewards, with bands over seeds.

    Forgetting is drawn from the epoch on in which the penalty begins: before it the arms are the same run.
    """
    plt = plots.pyplot()
    drawing, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    summary, words = record["summary"], record["words"]
    panels = {**MEASURES, "reward": "mean reward of the controller"}
    for letter, axis, (key, title) in zip("abcd", axes.flat, panels.items(), strict=True):
        for arm, label in ARMS.items():
            curve = summary["arms"][arm]["curves"].get(key, {"mean": [], "std": []})
            first = 0 if key == "reward" else summary["start"]
            mean, std = (np.array(curve[part][first:]) for part in ("mean", "std"))
            epochs = np.arange(first + 1, first + len(mean) + 1)
            axis.plot(epochs, mean, color=_COLOURS[arm], linestyle=_LINES[arm], label=label)
            axis.fill_between(epochs, mean - std, mean + std, color=_COLOURS[arm], alpha=0.15, linewidth=0)
        if key == "reward":
            axis.axvline(summary["start"] + 1, color=plots.GREY, linestyle=":", linewidth=1.2, label="WPL begins")
        else:
            axis.axhline(0, color=plots.BLACK, linewidth=0.8)
        axis.set_title(f"({letter}) {title}", loc="left", fontweight="bold")
        axis.set(xlabel="epoch", ylabel=words["reward"] if key == "reward" else f"change of {words['error']}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[1, 1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    seeds = f"{summary['seeds']} seed{'s' * (summary['seeds'] != 1)}"
    title = f"{words['title']}: {record['data']['name']}"
    penalty = f"penalty on {_covered(record)}, alpha {record['tuning']['alpha']['chosen']:g}"
    notes = "; ".join([penalty, *_changes(record), f"{seeds}, mean ± standard deviation"])
    drawing.suptitle(f"{title}\n{notes}", fontsize=11)
    return plots.png(drawing)


def markdown(record: dict[str, Any]) -> str:
    """Return a section of the results page: the table, the verdicts, the settings."""
    words, tuning = record["words"], record["tuning"]
    lines = [f"### {words['title']}: {record['data']['name']}", ""]
    lines += md.heading(["", *ARMS.values(), ""])
    lines += [md.row(cells) for cells in _rows(record)]
    lines += ["", *_notes(record)]
    for setting, what in (("lr", "learning rate (for cross-entropy alone)"), ("alpha", "alpha")):
        found = tuning[setting]
        tried = ", ".join(_tried(row, setting) for row in found["values"])
        edge = ", at the edge of its grid" * found["at_edge"]
        why = f"{edge}; tried, with rewards and mean differences: {tried}" if tried else ", given"
        lines += ["", f"The {what} is {found['chosen']:g}{why}."]
    lines += ["", f"Chosen by: {record['chosen_by']}.", "", *_time_lines(record), "", _setting(record)]
    return "\n".join(lines) + "\n"


def _rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows: what, each arm, the verdict."""
    summary, words = record["summary"], record["words"]
    arms = summary["arms"]
    if "verdicts" not in summary:
        return [("all runs diverged", *("" for _ in ARMS), "")]
    worst, rows = summary["worst_epoch"], []
    for measure, name in MEASURES.items():
        verdict = summary["verdicts"][measure]
        curves = [arms[arm]["curves"][measure] for arm in ARMS]
        cells = [_points(curve["mean"][worst], curve["std"][worst]) for curve in curves]
        rows.append((f"{name}, epoch {worst + 1}", *cells, _verdict(verdict)))
    for measure, name in MEASURES.items():
        cells = [_of(arms[arm]["after_start"][measure]) for arm in ARMS]
        rows.append((f"{name}, epochs {summary['start'] + 1} on", *cells, ""))
    cells = [_of(arms[arm]["end"]["reward"]) for arm in ARMS]
    reached = summary["verdicts"]["reward"]["reached"]
    rows.append(("mean reward, last epochs", *cells, f"goal: not lower: {_met(reached)}"))
    cells = [_of(arms[arm]["end"]["error_before"]) for arm in ARMS]
    rows.append((f"{words['error']} when trained, last epochs", *cells, ""))
    cells = [_of(arms[arm]["final"]["test"]) for arm in ARMS]
    rows.append((f"test {words['error']}, chosen at the end", *cells, ""))
    return rows


def _verdict(verdict: dict[str, Any]) -> str:
    """Render a goal and whether it was reached."""
    if verdict["reduction_percent"] is None:
        return "nothing was forgotten"
    percent = verdict["reduction_percent"]
    change = f"{percent:.0f} % less" if percent >= 0 else f"{-percent:.0f} % more"
    return f"{change}; goal {verdict['goal_percent']:.0f} % less: {_met(verdict['reached'])}"


def _met(reached: bool) -> str:
    """Render a verdict."""
    return "reached" if reached else "not reached"


def _notes(record: dict[str, Any]) -> list[str]:
    """Say what the figures are."""
    summary, words = record["summary"], record["words"]
    lines = [
        f"Differences: validation {words['error']} at the end of an epoch minus right after an architecture's own "
        "training; mean ± standard deviation over "
        f"{summary['seeds']} seed{'s' * (summary['seeds'] != 1)}. The goals, somewhat below the paper's reductions, "
        "are about the epoch in which cross-entropy alone forgets most; since that epoch is picked by what one arm "
        "did, chance favours the other one in it, and not in the rows over all epochs.",
    ]
    lost = {ARMS[arm]: values["diverged"] for arm, values in summary["arms"].items() if values["diverged"]}
    if lost:
        words_ = md.several([f"{number} {arm}" for arm, number in lost.items()])
        lines.append(f"Diverged, and left out in both arms: {words_}.")
    return lines


def _time_lines(record: dict[str, Any]) -> list[str]:
    """Say what the Fisher and the penalty cost."""
    times = record["summary"]["arms"]["wpl"]["times"]
    if "penalty" not in times or "Fisher" not in times:
        return []
    loop = record["settings"]
    step = times["cross-entropy"] + times["clipping and step"]
    per_step = {part: times[part] / (loop["minibatches"] if part in ("Fisher", "anchor") else 1) for part in times}
    ours = {part: per_step[part] for part in ("penalty", "Fisher", "anchor")}
    total = step + sum(ours.values())
    shares = md.several([f"{part} {100 * value / total:.2g} %" for part, value in ours.items()])
    lines = [
        f"Time of a training step without the penalty {step:.3g} ms, with it {total:.3g} ms: {shares} of it "
        f"(one Fisher of {times['Fisher']:.3g} ms every {loop['minibatches']} steps, of one minibatch; "
        f"{record['hardware']['cpu' if loop['device'] == 'cpu' else 'gpu']}, "
        f"{record['workers'] or 1} at a time)."
    ]
    if "penalty, as published" in times:
        lines.append(
            f"As published, in the same run: the penalty as a loop over parameters "
            f"{times['penalty, as published']:.3g} ms (here {times['penalty']:.3g} ms), squares of one minibatch's "
            f"gradient {times['Fisher, as published']:.3g} ms (here, of per-sample gradients, "
            f"{times['Fisher']:.3g} ms)."
        )
    return lines


def _setting(record: dict[str, Any]) -> str:
    """Say how large the experiment was."""
    settings = record["settings"]
    parts = [
        f"{settings['epochs']} epochs of {settings['architectures']} architectures with {settings['minibatches']} "
        "minibatches each",
        f"the penalty covers {_covered(record)}",
        *_changes(record),
        "errors, rewards and the Fisher are of the validation part",
        ", ".join(f"{key} {value:,}" for key, value in record["data"].items() if isinstance(value, int)),
    ]
    if record.get("resumed"):
        parts.append("run with --resume: the wall time is that of the last call")
    return f"{'; '.join(parts)}."


def _covered(record: dict[str, Any]) -> str:
    """Say what the penalty covers."""
    used = record["settings"]["task"]["cover"] == "used"
    return "all weights that an architecture uses" if used else "the cells' weights alone"


def _changes(record: dict[str, Any]) -> list[str]:
    """Say in what the models are not the usual ones."""
    normal = record["settings"]["task"].get("sizes", {}).get("layer_norm", False)
    return ["the cells' outputs are normalised"] if normal else []


def _tried(row: dict[str, Any], setting: str) -> str:
    """Render a setting that was tried."""
    lost = row.get("forgetting")
    return f"{row[setting]:g} ({row['reward']:.3g}" + (f", {lost:.3g})" if lost is not None else ")")


def _points(mean: float, std: float) -> str:
    """Render mean and deviation."""
    digits = 0 if max(abs(mean), std) >= 100 else 1 if max(abs(mean), std) >= 10 else 2
    return f"{round(mean, digits) + 0.0:.{digits}f} ± {std:.{digits}f}"  # without the sign of a zero


def _of(values: dict[str, Any]) -> str:
    """Render a spread."""
    return _points(values["mean"], values["std"])


def _fit(cell: str, width: int) -> str:
    """Fill a cell; a negative width aligns to the left."""
    return cell.ljust(-width) if width < 0 else cell.rjust(width)
