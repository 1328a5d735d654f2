"""What the two-model runs say: the choice of alpha, summaries, the table and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...plumbing import plots
from ...plumbing.markdown import heading, row
from ...plumbing.spread import points, spread
from .training import METHODS, TUNED, Run, Setup, Trained

_COLOURS = {
    "none": plots.VERMILLION,
    "wpl": plots.BLUE,
    "squared": plots.GREEN,
    "l2": plots.ORANGE,
    "frozen": plots.GREY,
}


def summarise(setup: Setup, trained: Sequence[Trained], runs: Sequence[Run]) -> dict[str, Any]:
    """Return one panel: what happened to A and B with each method, at the method's own best strength.

    The strength (alpha * mean F) is the grid value with the largest mean, over seeds and over A and B, of the
    validation accuracy at the end; the test split has no say. Forgetting is A's test accuracy before minus at the end
    of B's training, the cost B's test accuracy without any protection minus with it; both in points, paired by seed.
    """
    grid = {method: _scores([run for run in runs if run.method == method]) for method in TUNED}
    best = {method: max(scores, key=lambda row: row["score"])["strength"] for method, scores in grid.items()}
    chosen = {m: [r for r in runs if r.method == m and r.strength == best.get(m)] for m in METHODS}
    before = np.array([a.accuracy for a in trained])
    reference = np.array([_end(setup, run.accuracy_b) for run in chosen["none"]])
    methods = {}
    for method, picked in chosen.items():
        after = np.array([_end(setup, run.accuracy_a) for run in picked])
        reached = np.array([_end(setup, run.accuracy_b) for run in picked])
        methods[method] = {
            "strength": best.get(method),
            "forgetting": spread(100 * (before - after)),
            "worst_forgetting": spread(100 * (before - [min(run.accuracy_a) for run in picked])),
            "accuracy_b": spread(100 * reached),
            "cost_b": spread(100 * (reference - reached)),
            "runs": [_curves(run) for run in picked],
        }
    lost = methods["none"]["forgetting"]["mean"]
    for values in methods.values():
        values["reduction_percent"] = 100 * (1 - values["forgetting"]["mean"] / lost) if lost > 0 else None
    edges = [m for m, rows in grid.items() if best[m] in (rows[0]["strength"], rows[-1]["strength"])]
    return {
        "level": trained[0].level,
        "accuracy_a_before": spread(100 * before),
        "iterations_a": [a.iterations for a in trained],
        "iterations": chosen["none"][0].iterations,
        "methods": methods,
        "grid": grid,
        "best_at_edge_of_grid": edges,
    }


def table(panels: Sequence[dict[str, Any]]) -> str:
    """Return the table as text."""
    columns = (("A stopped at", -14), ("method", -22), ("A before", 9), ("A after", 9), ("forgetting", 15))
    columns += (("reduction", 11), ("B", 7), ("B's cost", 14))
    head = "".join(name.ljust(-width) if width < 0 else name.rjust(width) for name, width in columns)
    lines = [head, "-" * len(head)]
    for panel in panels:
        before = panel["accuracy_a_before"]["mean"]
        for index, (method, values) in enumerate(panel["methods"].items()):
            reduction = values["reduction_percent"]
            after = before - values["forgetting"]["mean"]
            lines.append(
                f"{'' if index else title(panel):<14}{METHODS[method]:<22}{before:>9.1f}{after:>9.1f}"
                f"{points(values['forgetting']):>15}"
                f"{'' if method == 'none' or reduction is None else f'{reduction:.0f} %':>11}"
                f"{values['accuracy_b']['mean']:>7.1f}{points(values['cost_b']):>14}"
            )
        lines.append("-" * len(head))
    lines += [
        "Accuracies on the test split in %; forgetting and cost in points, mean ± standard deviation over seeds.",
        "A negative forgetting (a reduction over 100 %): A ended better than it was before B's training.",
    ]
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """Return a section for a page: what was done, and a table of forgetting and of B's accuracy."""
    settings, data = record["settings"], record["data"]
    lines = [
        f"Model A ({settings['layers_a']} layers) is trained first, then model B ({settings['layers_b']} layers), "
        f"which shares A's first {settings['shared_layers']} layers, on the same {data['train']:,} "
        f"{data['name'].replace('digits', '').strip()} digits. Forgetting of A in points of test accuracy, mean ± "
        f"standard deviation over {settings['seeds']} seeds, and B's accuracy; each method at its own best alpha of "
        "one grid, chosen on a validation split:",
        "",
        *heading(["A stopped at", *METHODS.values()]),
    ]
    for panel in record["panels"]:
        cells = [f"{title(panel)} (A: {panel['accuracy_a_before']['mean']:.1f} %)"]
        for method in METHODS:
            values = panel["methods"][method]
            cells.append(f"{points(values['forgetting'])}, B {values['accuracy_b']['mean']:.1f} %".replace("±  ", "± "))
        lines.append(row(cells))
    return "\n".join(lines)


def title(panel: dict[str, Any]) -> str:
    """Name a panel by how A was stopped."""
    return "convergence" if panel["level"] is None else f"{100 * panel['level']:.3g} %"


def figure(panels: Sequence[dict[str, Any]], subtitle: str) -> bytes:
    """Draw the panels: accuracies over B's iterations, and below what A forgets and what B pays with every method."""
    plt = plots.pyplot()
    drawing, axes = plt.subplots(
        2,
        len(panels),
        figsize=(12, 6.4),
        sharex="row",
        sharey="row",
        height_ratios=(1.75, 1),
        squeeze=False,
        layout="constrained",
    )
    for column, panel in enumerate(panels):
        _draw_curves(axes[0, column], panel)
        _draw_balance(axes[1, column], panel)
        level = "trained to convergence" if panel["level"] is None else f"stopped at {title(panel)}"
        for axis in axes[:, column] if column else ():
            axis.tick_params(axis="y", length=0)
        axes[0, column].set_title(f"({'abcdefgh'[column]}) A {level}", loc="left", fontweight="bold")
    axes[0, 0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    dots, names = axes[1, 0].get_legend_handles_labels()
    drawing.legend(handles + dots, labels + names, loc="outside lower center", ncols=4, frameon=False)
    drawing.suptitle(f"Training B on shared layers: what A forgets, what B pays  ({subtitle})", fontsize=11)
    return plots.png(drawing)


def _draw_curves(axis: Any, panel: dict[str, Any]) -> None:
    """Draw A (solid) and B (dashed) without and with WPL."""
    for method, words in (("none", "without WPL"), ("wpl", "with WPL")):
        runs, colour = panel["methods"][method]["runs"], _COLOURS[method]
        for model, line in (("a", "-"), ("b", (0, (4, 1.6)))):
            curves = 100 * np.array([run[f"accuracy_{model}"] for run in runs])
            mean, std = curves.mean(0), curves.std(0, ddof=int(len(runs) > 1))
            axis.plot(panel["iterations"], mean, color=colour, linestyle=line, label=f"{model.upper()} {words}")
            axis.fill_between(panel["iterations"], mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    before = panel["accuracy_a_before"]["mean"]
    axis.axhline(before, color=plots.BLACK, linestyle=":", linewidth=1.2, label="A before B's training")
    axis.set(xlabel="iterations of B", ylim=(0, 100), xlim=(0, panel["iterations"][-1]))
    axis.locator_params(axis="x", nbins=4)


def _draw_balance(axis: Any, panel: dict[str, Any]) -> None:
    """Draw A's forgetting (filled) and B's cost (open) of every method, on one scale in points."""
    names = list(METHODS)
    for line, method in enumerate(names):
        values = panel["methods"][method]
        for key, shift, fill in (("forgetting", -0.16, _COLOURS[method]), ("cost_b", 0.16, "white")):
            mean, std = values[key]["mean"], values[key]["std"]
            axis.errorbar(
                mean,
                line + shift,
                xerr=std,
                fmt="o",
                markersize=6,
                color=_COLOURS[method],
                markerfacecolor=fill,
                linewidth=1.1,
            )
    for fill, label in ((plots.BLACK, "A's forgetting"), ("white", "B's cost against no penalty")):
        axis.errorbar([], [], fmt="o", markersize=6, color=plots.BLACK, markerfacecolor=fill, label=label)
    axis.axvline(0, color=plots.BLACK, linewidth=0.8)
    axis.set(xlabel="points of test accuracy lost", yticks=range(len(names)), yticklabels=METHODS.values())
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _scores(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the grid of one method in ascending order of strength."""
    rows = []
    for strength in sorted({run.strength for run in runs if run.strength is not None}):
        same = [run for run in runs if run.strength == strength]
        a, b = (100 * float(np.mean([getattr(run, f"validation_{model}") for run in same])) for model in "ab")
        alphas = [run.alpha for run in same]
        rows.append(
            {"strength": strength, "alphas": alphas, "validation_a": a, "validation_b": b, "score": (a + b) / 2}
        )
    return rows


def _end(setup: Setup, curve: Sequence[float]) -> float:
    """Return a curve's mean over the last evaluations."""
    return float(np.mean(curve[-setup.end_evaluations :]))


def _curves(run: Run) -> dict[str, Any]:
    """Return what the figure is drawn from."""
    accuracies = {f"accuracy_{m}": [round(v, 4) for v in getattr(run, f"accuracy_{m}")] for m in "ab"}
    return {"seed": run.seed, "alpha": run.alpha, **accuracies}
