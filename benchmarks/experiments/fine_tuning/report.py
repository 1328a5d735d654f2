"""The tables of the experiment, for the terminal and for a page, both made from the record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...plumbing.markdown import heading, row
from ...plumbing.spread import points
from . import figure as _figure
from .results import Scenario, name
from .settings import METHODS
from .stream import SCENARIOS
from .verdicts import verdicts

_STUDIES = {
    "steps": "steps of an update",
    "share": "lambda, the share of old data",
    "noise": "wrong labels",
    "memory": "old samples that are kept",
}
_MISSING = "-"


def figure(record: Mapping[str, Any]) -> bytes:
    """Draw the record."""
    return _figure.draw(record)


def table(record: Mapping[str, Any]) -> str:
    """Return tables and verdicts as text."""
    lines = []
    for scenario in _scenarios(record):
        unchanged = points(scenario.unchanged["mean"])
        lines += [f"Update sets of {SCENARIOS[scenario.name]}; never updated: {unchanged}", ""]
        head = f"{'':<32}{'iterations':>11}" + "".join(f"{words:>20}" for words in METHODS.values())
        for study, title in _STUDIES.items():
            lines += [f"{title}:".ljust(len(head)), head, "-" * len(head)]
            for words, iterations, cells in _rows(scenario, study):
                lines.append(f"{words:<32}{iterations:>11}" + "".join(f"{cell:>20}" for cell in cells))
            lines.append("")
        lines += [f"- {line}" for line in (*verdicts(scenario), _edges(scenario))]
        lines.append("")
    return "\n".join([*lines, _legend(record)])


def markdown(record: Mapping[str, Any]) -> str:
    """Return a section for the page of results: tables, verdicts."""
    data, settings = record["data"], record["settings"]
    lines = [
        f"### Incremental fine-tuning: {data['name']}",
        "",
        "After Kaeding, Rodner, Freytag and Denzler (2016). Update sets of "
        f"{settings['sizes']['update']} samples of one class arrive one after the other. SGD with momentum "
        f"{settings['momentum']:g}, weight decay {settings['weight_decay']:g} and minibatches of "
        f"{settings['batch_size']}; {settings['iterations']} steps an update and a share lambda = 0.5 of old data "
        f"unless said otherwise. {_legend(record)}",
        "",
    ]
    for scenario in _scenarios(record):
        lines += [f"**Update sets of {SCENARIOS[scenario.name]}** (a model that is never updated has "]
        lines[-1] += f"{points(scenario.unchanged['mean'])} %)"
        lines += ["", *heading(["", "iterations", *METHODS.values()])]
        for study, title in _STUDIES.items():
            lines.append(row([f"*{title}*", "", *("" for _ in METHODS)]))
            lines += [row([words, iterations, *cells]) for words, iterations, cells in _rows(scenario, study)]
        lines += ["", *(f"- {line}" for line in (*verdicts(scenario), _edges(scenario))), ""]
    return "\n".join(lines)


def _scenarios(record: Mapping[str, Any]) -> list[Scenario]:
    """Return the scenarios of a record."""
    return [Scenario(record, name) for name in record["scenarios"]]


def _rows(scenario: Scenario, study: str) -> list[tuple[str, str, list[str]]]:
    """Return name, number of iterations and the methods' accuracies of every condition of a study."""
    rows = []
    for found in scenario.study(study):
        cells = [_cell(found["methods"].get(method)) for method in METHODS]
        rows.append((name(study, found["condition"]), f"{found['iterations_per_update']:g}", cells))
    return rows


def _cell(found: Mapping[str, Any] | None) -> str:
    """Format an accuracy, and how many runs diverged."""
    if found is None:
        return _MISSING
    lost = f" ({found['diverged']} diverged)" if found["diverged"] else ""
    return f"{points(found['mean'])}{lost}"


def _edges(scenario: Scenario) -> str:
    """Say how many learning rates were chosen at an end of their grid."""
    parts = []
    for method, words in METHODS.items():
        chosen = scenario.chosen(method)
        parts.append(f"{words} {sum(outcome['lr_at_edge'] for outcome in chosen)} of {len(chosen)}")
    return f"Learning rates chosen at an end of their grid: {', '.join(parts)}."


def _legend(record: Mapping[str, Any]) -> str:
    """Say what the numbers are."""
    settings = record["settings"]
    trials, seeds, tuning = len(settings["learning_rates"]), settings["seeds"], settings["tuning_seeds"]
    return (
        f"Test accuracy in % on all classes so far, mean over updates, then mean ± standard deviation over {seeds} "
        f"seeds; each cell at its best of {trials} settings (learning rates; for penalties pairs of learning rate and "
        f"alpha), chosen on the validation data of {tuning} seeds, those with wrong labels as without. Differences are "
        "paired by seed, with 95 % intervals of each alone."
    )
