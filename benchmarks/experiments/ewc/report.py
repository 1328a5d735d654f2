"""What the runs say in tables and in two figures, both from the record alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...plumbing import plots
from ..harness import drawing
from ..harness.statistics import points, seeds_of
from ..harness.tables import Table
from .summary import forgets
from .training import ARMS, KINDS

NOTES = """Test accuracies in %, averaged over tasks at the end; forgetting (best earlier minus final accuracy) and cost
(fine-tuning's accuracy on new tasks right after they were learnt, minus this) in points; mean ± standard
deviation over seeds.
Good: the alphas whose validation accuracy is within so many points of the best; < or >: to the grid's end.
Shift: how far the curve lies from that of the smallest batch size, in decades of alpha."""

_ARM_COLUMNS = ("", "accuracy", "forgetting", "cut by", "new tasks", "cost on them", "below joint", "alpha")
_SWEEP_COLUMNS = ("F of the first task", "batch", "mean F", "best alpha")
_SWEEP_COLUMNS += ("good: 1 point", "good: 2 points", "decades", "accuracy", "shift")
_STRENGTH_COLUMNS = ("F of the first task", "batches", "F differs by", "its mean falls to", "best alpha")
_STRENGTH_COLUMNS += ("curve moves by", "per decade of batch size", "an alpha from another batch size loses")

#: of the sorted batch sizes: colour, line width and marker; narrower lines lie on wider ones, so that all can be seen
_SIZES = ((plots.ORANGE, 7.0, "o"), (plots.SKY, 4.6, "s"), (plots.BLUE, 2.4, "D"), (plots.BLACK, 1.0, "v"))
_COLUMNS = {"empirical": "right, empirical F", "squared": "batch-squared F"}
_OTHERS = {"exact": ("exact over classes", (0, (5, 2))), "mc": ("labels drawn from the model", (0, (1.2, 1.6)))}
ARM_LOOKS = {
    "none": (plots.VERMILLION, "o", "-"),
    "ewc": (plots.BLUE, "s", "-"),
    "online": (plots.SKY, "D", "--"),
    "l2": (plots.ORANGE, "^", "-"),
    "joint": (plots.GREY, "v", ":"),
}


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """Return the tables of arms, of sweeps, and of what the sweeps say of the batch size."""
    arms: list[list[str]] = []
    for scenario in record["scenarios"].values():
        rows = ([_arm_title(scenario, arm), *_arm_cells(scenario, arm)] for arm in scenario["arms"])
        arms += [[scenario["title"]], *rows]
    sweeps: list[list[str]] = []
    strengths: list[list[str]] = []
    for name, swept in record["sweep"].items():
        title = [record["scenarios"][name]["title"]]
        sweeps += [title, *_sweep_rows(swept)]
        strengths += [title, *_strength_rows(swept)]
    return {
        "arms": Table(_ARM_COLUMNS, arms),
        "sweep": Table(_SWEEP_COLUMNS, sweeps),
        "strength": Table(_STRENGTH_COLUMNS, strengths),
    }


def _arm_title(scenario: dict[str, Any], arm: str) -> str:
    """Name an arm; with two tasks there is one anchor."""
    return scenario["method"] if arm == "ewc" and scenario["n_tasks"] == 2 else ARMS[arm]


def _arm_cells(scenario: dict[str, Any], arm: str) -> list[str]:
    """Return an arm's row."""
    values = scenario["arms"][arm]
    cut, alpha = values["reduction_percent"] if forgets(scenario) else None, values["alpha"]
    return [
        points(values["accuracy"][-1]),
        points(values["forgetting"][-1]),
        "" if cut is None or alpha is None else f"{cut:.0f} %",
        *(points(values[key]) for key in ("new_task_accuracy", "cost", "gap")),
        "" if alpha is None else f"{alpha:g}{' (edge)' * values['at_edge_of_grid']}",
    ]


def _sweep_rows(swept: dict[str, Any]) -> Iterator[list[str]]:
    """Return a row for each curve of a sweep."""
    for curve in swept["curves"]:
        good = [curve["good"][within] for within in ("1", "2")]
        moves = swept["batch_size"].get(curve["kind"])
        yield [
            KINDS[curve["kind"]],
            str(curve["batch_size"]),
            f"{curve['mean_fisher']:.2g}",
            f"{curve['best_alpha']:.3g}",
            *(f"{'< ' * g['open_low']}{g['low']:.1e} to {'> ' * g['open_high']}{g['high']:.1e}" for g in good),
            ", ".join(f"{one['decades']:.1f}" for one in good),
            f"{curve['best_test']:.1f}",
            "" if moves is None else f"{moves['shift'][moves['sizes'].index(curve['batch_size'])]:.2f}",
        ]


def _strength_rows(swept: dict[str, Any]) -> Iterator[list[str]]:
    """Return a row for each Fisher that was estimated in batches of several sizes."""
    for kind, moves in swept["batch_size"].items():
        best = dict.fromkeys(f"{curve['best_alpha']:.3g}" for curve in swept["curves"] if curve["kind"] == kind)
        furthest = max(moves["shift"], key=abs)
        yield [
            KINDS[kind],
            f"{moves['sizes'][0]} to {moves['sizes'][-1]}",
            f"{max(moves['fisher_difference']):.0e} of its norm",
            f"1/{1 / moves['mean_ratio'][-1]:.0f}",
            " to ".join((next(iter(best)), next(reversed(best)))[: len(best)]),
            f"{furthest:.2f} decades",
            f"{moves['shift_per_decade']:.2f}",
            f"{moves['lost_points']:.1f} points",
        ]


def figures(record: dict[str, Any]) -> dict[str, bytes]:
    """Return both figures."""
    return {"": _sweeps(record), "_tasks": _tasks(record)}


def _sweeps(record: dict[str, Any]) -> bytes:
    """Draw the sweeps: a row for each scenario, the two Fishers side by side, the good ranges below each."""
    n = len(record["sweep"])
    shared = {"sharex": True, "sharey": "row", "height_ratios": (3.4, 1) * n}
    figure, axes = drawing.panels(2 * n, 2, (11, 4.3 * n + 0.6), **shared)
    for row, (name, swept) in enumerate(record["sweep"].items()):
        scenario = record["scenarios"][name]
        for column, kind in enumerate(_COLUMNS):
            axis, moves = axes[2 * row, column], swept["batch_size"][kind]
            _draw_sweep(axis, swept, scenario, kind)
            _draw_ranges(axes[2 * row + 1, column], swept, kind)
            moved = f"moves by {abs(moves['shift'][-1]):.1f} decades"
            words = f"{_COLUMNS[kind]}: {moved}, batches {moves['sizes'][0]} to {moves['sizes'][-1]}"
            drawing.letter(axis, 2 * row + column, f"{scenario['title']}\n{words}")
        axes[2 * row, 0].set_ylabel("test accuracy over both tasks (%)")
    for axis in axes[-1]:
        axis.set_xlabel("alpha, as the user sets it")
    drawing.legend(figure, axes[::2].flat, 4)
    words = f"({_data(record)}; bars: std at the best alpha)"
    return drawing.png(figure, f"EWC's strength and the batch size that F is estimated with  {words}", 128)


def _draw_sweep(axis: Any, swept: dict[str, Any], scenario: dict[str, Any], kind: str) -> None:
    """Draw one kind's curves, one for each batch size, between fine-tuning and joint training."""
    alphas = swept["alphas"]
    for rank, curve in enumerate(_curves(swept, kind)):
        colour, width, marker = _SIZES[rank % len(_SIZES)]
        width = 1.8 if kind == "squared" else width
        mean, best = curve["test"], alphas.index(curve["best_alpha"])
        axis.errorbar(alphas[best], mean[best], yerr=curve["test_std"][best], color=colour, linewidth=1.2, capsize=3)
        size = f"{curve['batch_size']} sample{'s' * (curve['batch_size'] > 1)}"
        axis.plot(alphas, mean, color=colour, linewidth=width, solid_capstyle="round", zorder=3)
        axis.plot(alphas, mean, color=colour, linestyle="", marker=marker, markersize=4 + 0.5 * width, zorder=3 + rank)
        axis.plot([], [], color=colour, linewidth=min(width, 3.5), marker=marker, label=f"F in batches of {size}")
    for other, (words, line) in _OTHERS.items() if kind == "empirical" else ():
        for curve in _curves(swept, other):
            axis.plot(alphas, curve["test"], color=plots.VERMILLION, linestyle=line, label=f"right F, {words}")
    for arm, words, line in (("none", "no penalty", ":"), ("joint", "joint training", "-.")):
        level = scenario["arms"][arm]["accuracy"][1]["mean"]
        axis.axhline(level, color=plots.GREY, linestyle=line, linewidth=1.1, label=words, zorder=1)
    axis.set(xscale="log", xlim=(alphas[0], alphas[-1]))


def _draw_ranges(axis: Any, swept: dict[str, Any], kind: str) -> None:
    """Draw the good alphas of every batch size: within 2 points (pale), within 1 point (dark), the best (dot)."""
    curves = _curves(swept, kind)
    for rank, curve in enumerate(curves):
        colour = _SIZES[rank % len(_SIZES)][0]
        for within, opacity, height in (("2", 0.35, 0.62), ("1", 1.0, 0.28)):
            good = curve["good"][within]
            axis.barh(rank, good["high"] - good["low"], left=good["low"], height=height, color=colour, alpha=opacity)
        axis.plot(curve["best_alpha"], rank, marker="o", color="white", markeredgecolor=plots.BLACK, markersize=5)
    axis.set(yticks=range(len(curves)), yticklabels=[str(curve["batch_size"]) for curve in curves])
    axis.set(ylim=(len(curves) - 0.4, -0.6), ylabel="batch size")
    axis.grid(axis="y", visible=False)
    words = "good alphas (validation data): best (dot), within 1 (dark) and 2 points (pale) of it"
    axis.set_title(words, loc="left", fontsize=8.5)


def _curves(swept: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return one kind's curves by batch size."""
    return sorted((curve for curve in swept["curves"] if curve["kind"] == kind), key=lambda curve: curve["batch_size"])


def _tasks(record: dict[str, Any]) -> bytes:
    """Draw average accuracy after each task where there are many, and below what each arm forgets and pays."""
    scenarios = list(record["scenarios"].values())
    long = [scenario for scenario in scenarios if scenario["n_tasks"] > 2]
    figure = plots.pyplot().figure(figsize=(12, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = np.atleast_1d(above.subplots(1, len(long)))
    for axis, scenario in zip(axes, long, strict=True):
        _draw_stages(axis, scenario)
        axis.set_title(scenario["title"], loc="left", fontweight="bold")
    axes[0].set_ylabel("average test accuracy (%)")
    drawing.legend(above, axes[:1], 5)
    axes = below.subplots(1, len(scenarios), sharey=True)
    arms = {arm: words.replace("EWC,", "EWC or WPL,") for arm, words in ARMS.items() if arm != "joint"}
    colours = [ARM_LOOKS[arm][0] for arm in arms]
    for axis, scenario in zip(axes, scenarios, strict=True):
        found = {words: scenario["arms"].get(arm) for arm, words in arms.items()}
        pairs = {words: values and (values["forgetting"][-1], values["cost"]) for words, values in found.items()}
        words = ("forgetting of earlier tasks", "cost on new tasks against fine-tuning")
        drawing.balance(axis, pairs, colours, words)
        axis.set_xlabel("points lost")
        axis.set_title(scenario["title"].replace(", ", ",\n"), loc="left", fontsize=9, fontweight="bold")
    drawing.legend(below, axes[:1], 2)
    words = f"New data for one model (EWC), and a new model on the same data (WPL)  ({_data(record)})"
    return drawing.png(figure, words, 128)


def _draw_stages(axis: Any, scenario: dict[str, Any]) -> None:
    """Draw the average accuracy after each task."""
    for arm, (colour, marker, line) in ARM_LOOKS.items():
        stages = scenario["arms"][arm]["accuracy"]
        mean, std = ([stage[key] for stage in stages] for key in ("mean", "std"))
        look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": line, "label": ARMS[arm]}
        axis.errorbar(range(1, len(mean) + 1), mean, yerr=std, capsize=2, **look)
    axis.set(xlabel="tasks learnt", xticks=range(1, scenario["n_tasks"] + 1), ylim=(None, 101))


def _data(record: dict[str, Any]) -> str:
    """Say on what the runs were made."""
    return f"{record['data']['name']}, {seeds_of(record['settings']['seeds'])}"
