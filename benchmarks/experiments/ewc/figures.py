"""Two figures: accuracy against alpha with the right and the batch-squared Fisher; and what every arm forgets."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from ...plumbing import plots
from .training import ARMS

#: of the sorted batch sizes: colour, line width and marker; narrower lines lie on wider ones, so that all can be seen
_SIZES = (
    (plots.ORANGE, 7.0, "o"),
    (plots.SKY, 4.6, "s"),
    (plots.BLUE, 2.4, "D"),
    (plots.BLACK, 1.0, "v"),
)
_COLUMNS = {"empirical": "right F", "squared": "batch-squared F"}
_OTHERS = {"exact": ("exact over classes", (0, (5, 2))), "mc": ("labels drawn from the model", (0, (1.2, 1.6)))}
_ARM_LOOKS = {
    "none": (plots.VERMILLION, "o", "-"),
    "ewc": (plots.BLUE, "s", "-"),
    "online": (plots.SKY, "D", "--"),
    "l2": (plots.ORANGE, "^", "-"),
    "joint": (plots.GREY, "v", ":"),
}


def figure(record: dict[str, Any]) -> bytes:
    """Draw the sweeps: a row for each scenario, the two Fishers side by side, the good ranges below each."""
    plt = plots.pyplot()
    names = list(record["sweep"])
    drawing, axes = plt.subplots(
        2 * len(names),
        2,
        figsize=(11, 4.3 * len(names) + 0.6),
        sharex=True,
        sharey="row",
        height_ratios=(3.4, 1) * len(names),
        squeeze=False,
        layout="constrained",
    )
    for index, name in enumerate(names):
        for column, kind in enumerate(_COLUMNS):
            _draw_sweep(axes[2 * index, column], record, name, kind)
            _draw_ranges(axes[2 * index + 1, column], record["sweep"][name], kind)
            letter = "abcdefgh"[2 * index + column]
            moves = record["sweep"][name]["batch_size"][kind]
            moved, sizes = abs(moves["shift"][-1]), f"{moves['sizes'][0]} to {moves['sizes'][-1]}"
            title = f"({letter}) {record['scenarios'][name]['title']}\n"
            title += f"{_COLUMNS[kind]}: moves by {moved:.1f} decades, batches {sizes}"
            axes[2 * index, column].set_title(title, loc="left", fontweight="bold")
        axes[2 * index, 0].set_ylabel("test accuracy over both tasks (%)")
    for axis in axes[-1]:
        axis.set_xlabel("alpha, as the user sets it")
    handles: dict[str, Any] = {}
    for axis in axes[::2].flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    seeds = record["settings"]["seeds"]
    drawing.suptitle(
        f"EWC's strength and the batch size that F is estimated with  ({record['data']['name']}, {seeds} "
        f"seed{'s' * (seeds > 1)}; bars: std at the best alpha)",
        fontsize=11,
    )
    return _png(drawing)


def _draw_sweep(axis: Any, record: dict[str, Any], name: str, kind: str) -> None:
    """Draw one kind's curves, one for each batch size, between fine-tuning and joint training."""
    swept = record["sweep"][name]
    alphas = swept["alphas"]
    for rank, curve in enumerate(_curves(swept, kind)):
        colour, width, marker = _SIZES[rank % len(_SIZES)]
        mean = curve["test"]
        width = 1.8 if kind == "squared" else width
        best = alphas.index(curve["best_alpha"])
        axis.errorbar(alphas[best], mean[best], yerr=curve["test_std"][best], color=colour, linewidth=1.2, capsize=3)
        size = f"{curve['batch_size']} sample{'s' * (curve['batch_size'] > 1)}"
        axis.plot(alphas, mean, color=colour, linewidth=width, solid_capstyle="round", zorder=3)
        axis.plot(alphas, mean, color=colour, linestyle="", marker=marker, markersize=4 + 0.5 * width, zorder=3 + rank)
        axis.plot([], [], color=colour, linewidth=min(width, 3.5), marker=marker, label=f"F in batches of {size}")
    for other, (words, line) in _OTHERS.items() if kind == "empirical" else ():
        for curve in _curves(swept, other):
            axis.plot(alphas, curve["test"], color=plots.VERMILLION, linestyle=line, label=f"right F, {words}")
    for arm, words, line in (("none", "no penalty", ":"), ("joint", "joint training", "-.")):
        level = record["scenarios"][name]["arms"][arm]["accuracy"][1]["mean"]
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
    axis.set_ylim(len(curves) - 0.4, -0.6)
    axis.set_ylabel("batch size")
    axis.grid(axis="y", visible=False)
    words = "good alphas (validation data): best (dot), within 1 (dark) and 2 points (pale) of it"
    axis.set_title(words, loc="left", fontsize=8.5)


def _curves(swept: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return one kind's curves by batch size."""
    return sorted((curve for curve in swept["curves"] if curve["kind"] == kind), key=lambda curve: curve["batch_size"])


def tasks_figure(record: dict[str, Any]) -> bytes:
    """Draw average accuracy after each task where there are many, and below what each arm forgets and pays."""
    plt = plots.pyplot()
    scenarios = record["scenarios"]
    long = [name for name, scenario in scenarios.items() if scenario["n_tasks"] > 2]
    drawing = plt.figure(figsize=(12, 6.6 if long else 3.4), layout="constrained")
    parts = drawing.subfigures(2, 1, height_ratios=(1.25, 1)) if long else [drawing]
    if long:
        for column, (axis, name) in enumerate(zip(np.atleast_1d(parts[0].subplots(1, len(long))), long, strict=True)):
            _draw_stages(axis, scenarios[name])
            axis.set_title(scenarios[name]["title"], loc="left", fontweight="bold")
            if column == 0:
                axis.set_ylabel("average test accuracy (%)")
                parts[0].legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    axes = np.atleast_1d(parts[-1].subplots(1, len(scenarios), sharey=True))
    for axis, scenario in zip(axes, scenarios.values(), strict=True):
        _draw_balance(axis, scenario)
        axis.set_title(scenario["title"].replace(", ", ",\n"), loc="left", fontsize=9, fontweight="bold")
    parts[-1].legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    seeds = record["settings"]["seeds"]
    words = f"({record['data']['name']}, {seeds} seed{'s' * (seeds > 1)})"
    drawing.suptitle(f"New data for one model (EWC), and a new model on the same data (WPL)  {words}", fontsize=11)
    return _png(drawing)


def arm_title(scenario: dict[str, Any], arm: str) -> str:
    """Return what an arm is called in a scenario."""
    return scenario["method"] if arm == "ewc" and scenario["n_tasks"] == 2 else ARMS[arm]


def _draw_stages(axis: Any, scenario: dict[str, Any]) -> None:
    """Draw the average accuracy over the tasks seen, after each task."""
    for arm, values in scenario["arms"].items():
        colour, marker, line = _ARM_LOOKS[arm]
        mean, std = (np.array([stage[key] for stage in values["accuracy"]]) for key in ("mean", "std"))
        steps = range(1, len(mean) + 1)
        axis.errorbar(
            steps, mean, yerr=std, color=colour, marker=marker, markersize=5, linestyle=line, capsize=2, label=ARMS[arm]
        )
    axis.set(xlabel="tasks learnt", xticks=range(1, scenario["n_tasks"] + 1), ylim=(None, 101))


def _draw_balance(axis: Any, scenario: dict[str, Any]) -> None:
    """Draw forgetting (filled) and the cost on new tasks (open) of every arm but joint training."""
    arms = [arm for arm in ARMS if arm != "joint"]
    for index, arm in enumerate(arms):
        if arm not in scenario["arms"]:
            continue
        values, colour = scenario["arms"][arm], _ARM_LOOKS[arm][0]
        for spread, shift, fill in ((values["forgetting"][-1], -0.17, colour), (values["cost"], 0.17, "white")):
            axis.errorbar(
                spread["mean"],
                index + shift,
                xerr=spread["std"],
                fmt="o",
                markersize=5.5,
                color=colour,
                markerfacecolor=fill,
                linewidth=1.1,
            )
    for fill, label in (
        (plots.BLACK, "forgetting of earlier tasks"),
        ("white", "cost on new tasks against fine-tuning"),
    ):
        axis.errorbar([], [], fmt="o", markersize=5.5, color=plots.BLACK, markerfacecolor=fill, label=label)
    axis.axvline(0, color=plots.BLACK, linewidth=0.8)
    names = [ARMS[arm].replace("EWC,", "EWC or WPL,") for arm in arms]
    axis.set(xlabel="points lost", yticks=range(len(arms)), yticklabels=names)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _png(drawing: Any) -> bytes:
    """Render with 128 colours, which line art does not miss and which make the file a third as large."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.open(io.BytesIO(plots.png(drawing))).convert("RGB").quantize(128).save(buffer, "png", optimize=True)
    return buffer.getvalue()
