"""What the two-model runs say: the choice of alpha, summaries, the tables and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...plumbing import plots
from ..harness import drawing
from ..harness.statistics import at_edge, best, grouped, points, seeds_of, spread
from ..harness.tables import Table
from .training import METHODS, TUNED, Run, Setup, Trained

NOTES = """Accuracies on the test split in %; forgetting and cost in points, mean ± standard deviation over seeds.
A negative forgetting (a reduction over 100 %): A ended better than it was before B's training."""

_COLOURS = (plots.VERMILLION, plots.BLUE, plots.GREEN, plots.ORANGE, plots.GREY)  # of the methods


def summarise(setup: Setup, trained: Sequence[Trained], runs: Sequence[Run]) -> dict[str, Any]:
    """Return one panel: what happened to A and B with each method, at the method's own best strength.

    The strength (alpha * mean F) is the grid value with the largest mean, over seeds and over A and B, of the
    validation accuracy at the end; the test split has no say. Forgetting is A's test accuracy before minus at the end
    of B's training, the cost B's test accuracy without any protection minus with it; both in points, paired by seed.
    """
    tried = {method: _grid([run for run in runs if run.method == method]) for method in TUNED}
    chosen = {method: best({row["strength"]: row["score"] for row in rows}) for method, rows in tried.items()}
    picked = {m: [r for r in runs if r.method == m and r.strength == chosen.get(m)] for m in METHODS}
    before = np.array([a.accuracy for a in trained])
    methods: dict[str, Any] = {}
    for method, same in picked.items():
        after, reached = (_ends(setup, [getattr(run, f"accuracy_{m}") for run in same]) for m in "ab")
        methods[method] = {
            "strength": chosen.get(method),
            "forgetting": spread(100 * (before - after)),
            "worst_forgetting": spread(100 * (before - [min(run.accuracy_a) for run in same])),
            "accuracy_b": spread(100 * reached),
            "cost_b": spread(100 * (_ends(setup, [run.accuracy_b for run in picked["none"]]) - reached)),
            "runs": [_curves(run) for run in same],
        }
    lost = methods["none"]["forgetting"]["mean"]
    for values in methods.values():
        values["reduction_percent"] = 100 * (1 - values["forgetting"]["mean"] / lost) if lost > 0 else None
    return {
        "level": trained[0].level,
        "accuracy_a_before": spread(100 * before),
        "iterations_a": [a.iterations for a in trained],
        "iterations": picked["none"][0].iterations,
        "methods": methods,
        "grid": tried,
        "best_at_edge_of_grid": [m for m, rows in tried.items() if at_edge(chosen[m], [r["strength"] for r in rows])],
    }


def _grid(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the validation accuracies of one method in ascending order of strength."""
    rows = []
    for strength, same in sorted(grouped(runs, lambda run: run.strength).items()):
        a, b = (100 * float(np.mean([getattr(run, f"validation_{model}") for run in same])) for model in "ab")
        row = {"strength": strength, "alphas": [run.alpha for run in same], "validation_a": a, "validation_b": b}
        rows.append({**row, "score": (a + b) / 2})
    return rows


def _ends(setup: Setup, curves: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mean of each curve over its last evaluations."""
    return np.array([np.mean(curve[-setup.end_evaluations :]) for curve in curves])


def _curves(run: Run) -> dict[str, Any]:
    """Return what the figure is drawn from."""
    accuracies = {f"accuracy_{m}": [round(v, 4) for v in getattr(run, f"accuracy_{m}")] for m in "ab"}
    return {"seed": run.seed, "alpha": run.alpha, **accuracies}


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """Return what A forgot and B reached, in short by level, and in full by method."""
    columns = ("method", "A before", "A after", "forgetting", "reduction", "B", "B's cost")
    short, full = [], []
    for panel in record["panels"]:
        before, methods = panel["accuracy_a_before"]["mean"], panel["methods"]
        cells = [f"{points(m['forgetting'])}, B {m['accuracy_b']['mean']:.1f} %" for m in methods.values()]
        short.append([f"{_title(panel)} (A: {before:.1f} %)", *cells])
        full.append([f"A stopped at {_title(panel)}"])
        for method, values in methods.items():
            cut, lost = values["reduction_percent"], values["forgetting"]
            cells = [METHODS[method], f"{before:.1f}", f"{before - lost['mean']:.1f}", points(lost)]
            cells += ["" if method == "none" or cut is None else f"{cut:.0f} %"]
            full.append([*cells, f"{values['accuracy_b']['mean']:.1f}", points(values["cost_b"])])
    return {"levels": Table(["A stopped at", *METHODS.values()], short), "methods": Table(columns, full)}


def figures(record: dict[str, Any]) -> dict[str, bytes]:
    """Draw accuracies over B's iterations at each level, and below what A forgets and B pays with every method."""
    panels, names = record["panels"], list(METHODS.values())
    share = {"sharex": "row", "sharey": "row", "height_ratios": (1.75, 1)}
    figure, axes = drawing.panels(2, len(panels), (max(6.4, 3 * len(panels)), 6.4), **share)
    for column, panel in enumerate(panels):
        _draw_curves(axes[0, column], panel)
        arms = [(panel["methods"][m]["forgetting"], panel["methods"][m]["cost_b"]) for m in METHODS]
        words = ("A's forgetting", "B's cost against no penalty")
        drawing.balance(axes[1, column], dict(zip(names, arms, strict=True)), _COLOURS, words)
        axes[1, column].set_xlabel("points of test accuracy lost")
        level = "trained to convergence" if panel["level"] is None else f"stopped at {_title(panel)}"
        drawing.letter(axes[0, column], column, f"A {level}")
    for axis in axes[:, 1:].flat:
        axis.tick_params(axis="y", length=0)
    axes[0, 0].set_ylabel("test accuracy (%)")
    drawing.legend(figure, axes[:, 0], min(4, 1 + len(panels)))
    where = f"{record['data']['name']}, {seeds_of(record['settings']['seeds'])}"
    apart = "  " if len(panels) > 2 else "\n"  # a narrow figure has two lines
    return {"": drawing.png(figure, f"Training B on shared layers: what A forgets, what B pays{apart}({where})")}


def _draw_curves(axis: Any, panel: dict[str, Any]) -> None:
    """Draw A (solid) and B (dashed) without and with WPL."""
    for method, words, colour in (("none", "without WPL", _COLOURS[0]), ("wpl", "with WPL", _COLOURS[1])):
        for model, line in (("a", "-"), ("b", (0, (4, 1.6)))):
            curves = [[100 * value for value in run[f"accuracy_{model}"]] for run in panel["methods"][method]["runs"]]
            look = {"color": colour, "linestyle": line, "label": f"{model.upper()} {words}"}
            drawing.band(axis, panel["iterations"], *drawing.over_runs(curves), **look)
    before = panel["accuracy_a_before"]["mean"]
    axis.axhline(before, color=plots.BLACK, linestyle=":", linewidth=1.2, label="A before B's training")
    axis.set(xlabel="iterations of B", ylim=(0, 100), xlim=(0, panel["iterations"][-1]))
    axis.locator_params(axis="x", nbins=4)


def _title(panel: dict[str, Any]) -> str:
    """Name a panel by how A was stopped."""
    return "convergence" if panel["level"] is None else f"{100 * panel['level']:.3g} %"
