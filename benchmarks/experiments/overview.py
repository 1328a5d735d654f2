"""The top of the page of results: the papers' claims held against all records, and records against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..plumbing.markdown import heading, row
from ..plumbing.spread import difference, signed
from .ewc.summary import GOAL_COST, GOAL_REDUCTION, forgets, reaches_goal
from .fine_tuning.results import Scenario
from .fine_tuning.stream import SCENARIOS
from .fine_tuning.verdicts import findings
from .search.summary import GOALS

#: Records by name; those that were not made are missing.
Records: TypeAlias = Mapping[str, dict[str, Any]]

_MEASURES = {"mean": "mean difference", "best5": "best five", "max": "largest"}
#: Worst epoch and final reward of the published figure, without and with WPL, read by eye.
_PAPER = ("57 to 14 (75 % less)", "80 to 44 (45 % less)", "190 to 107 (44 % less)", "0.44 to 0.54")
#: Pairs of searches, each with an arm, and in what the first differs from the second.
_COMPARED = (
    (
        "image_search_digits",
        "image_search_digits_cells",
        "wpl",
        "the penalty on all weights in use, not the cells' alone",
    ),
    ("text_search_help_used", "text_search_help", "wpl", "the penalty on all weights in use, not the cells' alone"),
    ("text_search_help_strong", "text_search_help", "wpl", "a stronger penalty"),
    ("text_search_ptb_strong", "text_search_ptb", "wpl", "a stronger penalty"),
    ("text_search_help_norm", "text_search_help", "ce", "the cells' outputs normalised, no penalty"),
)


def overview(records: Records) -> list[str]:
    """Return the lines of the overview."""
    parts = (_searches(records), _ewc(records), _fine_tuning(records))
    return ["## In short", "", *(line for part in parts if part for line in (*part, ""))]


def _searches(records: Records) -> list[str]:
    """Hold the searches against the paper's curves, and against each other."""
    found = {name: record for name, record in records.items() if "search" in name and "verdicts" in record["summary"]}
    if not found:
        return []
    goals = ", ".join(f"{GOALS[measure]:.0f}" for measure in _MEASURES)
    lines = [
        "**Architecture search** (arXiv:1902.08232): what sampled models forget in the epoch in which cross-entropy "
        "alone forgets most, and the mean reward of the last epochs, without and with WPL. Goals: "
        f"{goals} % less, and a reward that is not lower; bold: reached. Means over seeds, which scatter by as much in "
        "that epoch; since cross-entropy's figures pick it, chance favours WPL in it.",
        "",
        *heading(["", "penalty on", *_MEASURES.values(), "reward"]),
        row(["recurrent cells, Penn Treebank, 150 epochs (the paper's figure, read by eye)", "cells", *_PAPER]),
        *(_search_row(record) for record in found.values()),
    ]
    compared = [_compared(found[a], found[b], arm, words) for a, b, arm, words in _COMPARED if {a, b} <= found.keys()]
    if compared:
        lines += [
            "",
            "Searches that differ in one thing, and in the settings that their tuning chose: the mean difference over "
            "the epochs with the penalty, and the reward, with changes paired by seed and their 95 % intervals:",
            "",
            *heading(["", "what differs", "learning rate", "alpha", "mean difference", "reward"]),
            *compared,
        ]
    return lines


def _search_row(record: dict[str, Any]) -> str:
    """Return one search's line of the table."""
    verdicts, task = record["summary"]["verdicts"], record["settings"]["task"]
    name = _name(record) + ", outputs normalised" * task["sizes"].get("layer_norm", False)
    cells = []
    for measure in _MEASURES:
        one = verdicts[measure]
        cut = one["reduction_percent"]
        words = "nothing forgotten" if cut is None else f"{abs(cut):.0f} % {'less' if cut >= 0 else 'more'}"
        cells.append(_marked(f"{one['ce']:.3g} to {one['wpl']:.3g} ({words})", one["reached"]))
    reward = verdicts["reward"]
    cells.append(_marked(f"{reward['ce']:.3g} to {reward['wpl']:.3g}", reward["reached"]))
    covered = "all in use" if task["cover"] == "used" else "cells"
    return row([name, f"{covered}, alpha {record['tuning']['alpha']['chosen']:g}", *cells])


def _compared(a: dict[str, Any], b: dict[str, Any], arm: str, words: str) -> str:
    """Return the line of two searches that differ in something."""
    one, other = (record["summary"]["arms"][arm] for record in (a, b))
    settings = [
        " to ".join(dict.fromkeys(f"{r['tuning'][what]['chosen']:g}" for r in (b, a))) for what in ("lr", "alpha")
    ]
    if arm == "ce":
        settings[1] = ""
    changes = []
    for part, measure, digits in (("after_start", "mean", 1), ("end", "reward", 2)):
        after, before = one[part][measure], other[part][measure]
        change = signed(*difference(after, before), digits)
        changes.append(f"{before['mean']:.{digits}f} to {after['mean']:.{digits}f} ({change})")
    return row([_name(a), words, *settings, *changes])


def _name(record: dict[str, Any]) -> str:
    """Name a search by its space and its data."""
    kind = "recurrent cells" if record["experiment"] == "text_search" else "convolution cells"
    return f"{kind}, {record['data']['name']}"


def _ewc(records: Records) -> list[str]:
    """List the goals of EWC and WPL."""
    found = [record for name, record in records.items() if name.startswith("ewc")]
    if not found:
        return []
    titles = {name: one["title"] for record in found for name, one in record["scenarios"].items()}
    lines = [
        f"**EWC beside WPL**: forgetting cut, and its cost on new tasks. Goal: {GOAL_REDUCTION:.0f} % at a cost of at "
        f"most {GOAL_COST:.0f} points; bold: reached.",
        "",
        *heading(["", *(f"{record['data']['name']}, width {record['settings']['hidden']}" for record in found)]),
    ]
    for name, title in titles.items():
        lines.append(row([title, *(_goal(record["scenarios"].get(name)) for record in found)]))
    return lines


def _goal(scenario: dict[str, Any] | None) -> str:
    """Render one goal."""
    if scenario is None:
        return "-"
    if not forgets(scenario):
        return "nothing to cut: fine-tuning forgets no more than its seeds scatter"
    arm = scenario["arms"]["ewc"]
    return _marked(
        f"{arm['reduction_percent']:.0f} % at {round(arm['cost']['mean'], 1) + 0.0:.1f} points", reaches_goal(arm)
    )


def _fine_tuning(records: Records) -> list[str]:
    """List the findings of the paper on incremental fine-tuning."""
    scenarios = [
        (f"{record['data']['name']}, {SCENARIOS[name]}", Scenario(record, name))
        for key, record in records.items()
        if key.startswith("fine_tuning")
        for name in record["scenarios"]
    ]
    if not scenarios:
        return []
    found = [findings(scenario) for _, scenario in scenarios]
    lines = [
        "**Incremental fine-tuning** (Kaeding et al., 2016): what the paper found, whether the means here agree, and "
        "by how many points of accuracy, paired by seed, with 95 % intervals (of a lambda in between: the best one).",
        "",
        *heading(["", *(name for name, _ in scenarios)]),
    ]
    for same in zip(*found, strict=True):
        words = (f"{_marked('yes', True) if one.holds else 'no'} ({one.figure})" for one in same)
        lines.append(row([same[0].claim, *words]))
    return [
        *lines,
        "",
        "Where they do not, the network may be why: the paper's is AlexNet, trained on ImageNet before; here a "
        "perceptron learns from scratch, from tens to hundreds of samples a class, so that updates go on teaching it.",
    ]


def _marked(words: str, reached: bool | None) -> str:
    """Put what was reached in bold."""
    return f"**{words}**" if reached else words
