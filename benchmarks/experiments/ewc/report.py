"""What the runs say as text: tables for the terminal, and a section of the page of results, from the record alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...plumbing import spread
from ...plumbing.markdown import RESULTS, heading, row
from .figures import arm_title, figure, tasks_figure
from .fishers import KINDS
from .summary import forgets
from .verdicts import verdicts

__all__ = ["figure", "markdown", "table", "tasks_figure"]

_ARM_COLUMNS = ("accuracy", "forgetting", "cut by", "new tasks", "cost on them", "below joint", "alpha")
_SWEEP_COLUMNS = ("batch", "mean F", "best alpha", "good: 1 point", "good: 2 points", "decades", "accuracy", "shift")


def table(record: dict[str, Any]) -> str:
    """Return both tables as text."""
    lines = []
    for scenario in record["scenarios"].values():
        rows = [(arm_title(scenario, arm), _arm_cells(scenario, values)) for arm, values in scenario["arms"].items()]
        lines += [*_aligned(scenario["title"], _ARM_COLUMNS, rows), ""]
    for name, swept in record["sweep"].items():
        rows = [(KINDS[curve["kind"]], cells) for curve, cells in _sweep_rows(swept)]
        lines += [*_aligned(f"{_title(record, name)}, 2 tasks", _SWEEP_COLUMNS, rows), ""]
    lines += [
        "Test accuracies in %, averaged over tasks at the end; forgetting (best earlier minus final accuracy) and cost",
        "(fine-tuning's accuracy on new tasks right after they were learnt, minus this) in points; mean ± standard",
        "deviation over seeds.",
        "Good: the alphas whose validation accuracy is within so many points of the best; < or >: to the grid's end.",
        "Shift: how far the curve lies from that of the smallest batch size, in decades of alpha.",
        "",
        *(f"- {line}" for line in verdicts(record)),
    ]
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """Return the section of one record."""
    slug = "digits" if "digits" in record["data"]["name"] else "mnist"
    seeds = record["settings"]["seeds"]
    lines = [
        f"Accuracy over two tasks against alpha, mean over {seeds} seeds. Good alphas: those whose validation accuracy "
        "is within 1 or 2 points of the best one's (< or >: up to the grid's end).",
        "",
        *heading(["F of the first task", *_SWEEP_COLUMNS]),
    ]
    for name, swept in record["sweep"].items():
        lines.append(row([f"**{_title(record, name)}**", *[""] * len(_SWEEP_COLUMNS)]))
        lines += [row([KINDS[curve["kind"]], *cells]) for curve, cells in _sweep_rows(swept)]
    lines += ["", *(f"- {line}" for line in verdicts(record)), ""]
    if (RESULTS / f"ewc_{slug}_tasks.png").exists():
        lines += [f"![Accuracy after each task; forgetting and cost of every arm](results/ewc_{slug}_tasks.png)", ""]
    lines += [
        "EWC learns new data with one model and anchors all of it; WPL learns the same data with a new model and",
        "anchors what they share:",
        "",
        *heading(["", "method", "model", "data", "anchored", "forgotten without, with it", "cost on the new"]),
    ]
    for scenario in record["scenarios"].values():
        none, ewc = scenario["arms"]["none"], scenario["arms"]["ewc"]
        lost = f"{_points(none['forgetting'][-1])}, {_points(ewc['forgetting'][-1])}"
        cells = [scenario[key] for key in ("title", "method", "model", "data", "anchored")]
        lines.append(row([*cells, lost, _points(ewc["cost"])]))
    lines += ["", *heading(["", *_ARM_COLUMNS])]
    for scenario in record["scenarios"].values():
        lines.append(row([f"**{scenario['title']}**", *[""] * len(_ARM_COLUMNS)]))
        lines += [
            row([arm_title(scenario, arm), *_arm_cells(scenario, values)]) for arm, values in scenario["arms"].items()
        ]
    lines += [
        "",
        "Test accuracy averaged over tasks at the end, in %; forgetting after Chaudhry et al. "
        "([arXiv:1801.10112](https://arxiv.org/abs/1801.10112)), in points; cost: accuracy on new tasks right after "
        "they were learnt, fine-tuning's minus this; mean ± standard deviation over seeds. Each penalty at the best of "
        f"{len(record['settings']['grid'])} alphas on validation data.",
    ]
    return "\n".join(lines)


def _points(values: dict[str, Any]) -> str:
    """Format mean and standard deviation without padding, which the columns bring."""
    return spread.points(values).replace("±  ", "± ")


def _title(record: dict[str, Any], name: str) -> str:
    """Return a scenario's title."""
    return record["scenarios"][name]["title"]


def _arm_cells(scenario: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Return an arm's row."""
    cut, alpha = values["reduction_percent"] if forgets(scenario) else None, values["alpha"]
    return [
        _points(values["accuracy"][-1]),
        _points(values["forgetting"][-1]),
        "" if cut is None or alpha is None else f"{cut:.0f} %",
        _points(values["new_task_accuracy"]),
        _points(values["cost"]),
        _points(values["gap"]),
        "" if alpha is None else f"{alpha:g}{' (edge)' * values['at_edge_of_grid']}",
    ]


def _sweep_rows(swept: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the curves of a sweep with their rows."""
    rows = []
    for curve in swept["curves"]:
        one, two = curve["good"]["1"], curve["good"]["2"]
        moves = swept["batch_size"].get(curve["kind"])
        shift = "" if moves is None else f"{moves['shift'][moves['sizes'].index(curve['batch_size'])]:.2f}"
        rows.append(
            (
                curve,
                [
                    str(curve["batch_size"]),
                    f"{curve['mean_fisher']:.2g}",
                    f"{curve['best_alpha']:.3g}",
                    _range(one),
                    _range(two),
                    f"{one['decades']:.1f}, {two['decades']:.1f}",
                    f"{curve['best_test']:.1f}",
                    shift,
                ],
            )
        )
    return rows


def _range(good: dict[str, Any]) -> str:
    """Format a range of alphas."""
    below, above = "< " * good["open_low"], "> " * good["open_high"]
    return f"{below}{good['low']:.1e} to {above}{good['high']:.1e}"


def _aligned(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lay out a table on the terminal."""
    widths = [max(len(cells[index]) for cells in (columns, *(row for _, row in rows))) for index in range(len(columns))]
    lines = [(title, columns), *((f"  {name}", cells) for name, cells in rows)]
    return [
        f"{name:<50}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in lines
    ]
