"""The top of the page of results: the papers' claims held against all records, and what seems to explain the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..plumbing.markdown import heading, row
from .ewc.summary import GOAL_COST, GOAL_REDUCTION, forgets, reaches_goal
from .fine_tuning.results import Scenario
from .fine_tuning.stream import SCENARIOS
from .fine_tuning.verdicts import findings

#: Records by name; those that were not made are missing.
Records: TypeAlias = Mapping[str, dict[str, Any]]

_MEASURES = {"mean": "mean difference", "best5": "best five", "max": "largest"}
#: Read off the figure of the published repository: worst epoch and final reward, without and with WPL.
_PAPER = ("57 to 14 (75 % less)", "80 to 44 (45 % less)", "190 to 107 (44 % less)", "0.44 to 0.54")


def overview(records: Records) -> list[str]:
    """Return the lines of the overview."""
    parts = (_searches(records), _ewc(records), _fine_tuning(records))
    return ["## In short", "", *(line for part in parts if part for line in (*part, ""))]


def _searches(records: Records) -> list[str]:
    """Hold the searches against the paper's curves."""
    found = {name: record for name, record in records.items() if "search" in name and "verdicts" in record["summary"]}
    if not found:
        return []
    lines = [
        "**Architecture search** (arXiv:1902.08232): what sampled models forget in the epoch in which cross-entropy "
        "alone forgets most, without and with WPL. The goals are 60, 40 and 40 % less, and a reward that is not lower; "
        "bold: reached.",
        "",
        *heading(["", "penalty on", *_MEASURES.values(), "final reward"]),
        row(["recurrent cells, Penn Treebank, 150 epochs on a GPU (the paper)", "cells", *_PAPER]),
    ]
    for record in found.values():
        lines.append(_search_row(record))
    return [*lines, "", *_why_searches(records)]


def _search_row(record: dict[str, Any]) -> str:
    """Return one search's line of the table."""
    verdicts, task = record["summary"]["verdicts"], record["settings"]["task"]
    kind = "recurrent cells" if record["experiment"] == "text_search" else "convolution cells"
    name = f"{kind}, {record['data']['name'].partition(' (')[0]}"
    if task["sizes"].get("layer_norm"):
        name += ", outputs normalised"
    cells = []
    for measure in _MEASURES:
        one = verdicts[measure]
        cut = one["reduction_percent"]
        words = "nothing forgotten" if cut is None else f"{abs(cut):.0f} % {'less' if cut >= 0 else 'more'}"
        cells.append(_marked(f"{one['ce']:.3g} to {one['wpl']:.3g} ({words})", one["reached"]))
    reward = verdicts["reward"]
    cells.append(_marked(f"{reward['ce']:.3g} to {reward['wpl']:.3g}", reward["reached"]))
    alpha = record["tuning"]["alpha"]["chosen"]
    covered = "all in use" if task["cover"] == "used" else "cells"
    return row([name, f"{covered}, alpha {alpha:g}", *cells])


def _why_searches(records: Records) -> list[str]:
    """Say what the pairs of searches that differ in one thing show."""
    lines = []
    wide, narrow = (records.get(f"image_search_digits{part}") for part in ("", "_cells"))
    if wide and narrow:
        lines.append(
            "- What the penalty covers decides. On images it has to hold all weights that an architecture uses: the "
            f"mean difference over all epochs is then {_lost(wide, 'wpl')}, against {_lost(narrow, 'wpl')} where it "
            f"covers the cells' weights alone, as in the published code, and {_lost(wide, 'ce')} without it. First "
            "convolution and classifier are trained by every architecture and would drift."
        )
    edges, all_used = (records.get(f"text_search_help{part}") for part in ("", "_used"))
    if edges and all_used:
        lines.append(
            "- On text the cells' edges are the better choice: the embedding, which is most of the model, is still "
            f"learning. The mean difference over all epochs is then {_lost(edges, 'wpl')}, {_lost(all_used, 'wpl')} "
            f"with the embedding under the penalty too, {_lost(edges, 'ce')} without any; rewards are "
            f"{_reward(edges, 'wpl')}, {_reward(all_used, 'wpl')} and {_reward(edges, 'ce')}."
        )
    chosen, strong = (records.get(f"text_search_ptb{part}") for part in ("", "_strong"))
    if chosen and strong:
        alphas = [record["tuning"]["alpha"]["chosen"] for record in (chosen, strong)]
        lines.append(
            f"- Strength trades forgetting for reward. On Penn Treebank alpha = {alphas[0]:g}, which its tuning chose, "
            f"has a mean difference over all epochs of {_lost(chosen, 'wpl')} at a reward of {_reward(chosen, 'wpl')}; "
            f"alpha = {alphas[1]:g} has {_lost(strong, 'wpl')} at {_reward(strong, 'wpl')}; cross-entropy alone "
            f"{_lost(chosen, 'ce')} at {_reward(chosen, 'ce')}. The paper's reward rose with WPL; after 6 epochs the "
            "models here are still learning, and what is held fast learns less."
        )
    normal = records.get("text_search_help_norm")
    if edges and normal:
        lines.append(
            "- In the recurrent space much of what is measured as forgetting is the scale of the cells' outputs: with "
            f"a layer normalisation before the decoder, cross-entropy alone loses {_lost(normal, 'ce')} instead of "
            f"{_lost(edges, 'ce')}, at a reward of {_reward(normal, 'ce')} instead of {_reward(edges, 'ce')}. Single "
            "cells of ReLUs and identities overshoot by hundreds otherwise, so that one seed can decide an epoch."
        )
    return lines


def _ewc(records: Records) -> list[str]:
    """List the goals of EWC and WPL."""
    found = {record["data"]["name"]: record for name, record in records.items() if name.startswith("ewc")}
    if not found:
        return []
    names = [f"{name}, width {record['settings']['hidden']}" for name, record in found.items()]
    lines = [
        f"**EWC beside WPL**: forgetting cut, and its cost on new tasks. Goal: {GOAL_REDUCTION:.0f} % at a cost of at "
        f"most {GOAL_COST:.0f} points; bold: reached.",
        "",
        *heading(["", *names]),
    ]
    for scenario in next(iter(found.values()))["scenarios"]:
        title = next(iter(found.values()))["scenarios"][scenario]["title"]
        lines.append(row([title, *(_goal(record["scenarios"][scenario]) for record in found.values())]))
    return lines


def _goal(scenario: dict[str, Any]) -> str:
    """Render one goal."""
    arm = scenario["arms"]["ewc"]
    if not forgets(scenario):
        return "nothing to cut: fine-tuning forgets no more than seeds scatter"
    words = f"{arm['reduction_percent']:.0f} % at {round(arm['cost']['mean'], 1) + 0.0:.1f} points"
    return _marked(words, reaches_goal(arm))


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
        "**Incremental fine-tuning** (Kaeding et al., 2016): what the paper found, and whether it was confirmed here.",
        "",
        *heading(["", *(name for name, _ in scenarios)]),
    ]
    lines += [
        row([same[0].claim, *("**yes**" if one.holds else "no" for one in same)]) for same in zip(*found, strict=True)
    ]
    return [
        *lines,
        "",
        "- The paper's network is AlexNet, trained on ImageNet before; here a perceptron learns from scratch, from "
        "some tens to hundreds of samples a class. Updates then go on teaching rather than adjust, so that more steps "
        "help and wrong labels weigh more.",
    ]


def _marked(words: str, reached: bool | None) -> str:
    """Put what was reached in bold."""
    return f"**{words}**" if reached else words


def _lost(record: dict[str, Any], arm: str) -> str:
    """Render an arm's mean difference over the epochs with the penalty."""
    return f"{record['summary']['arms'][arm]['after_start']['mean']['mean']:.1f}"


def _reward(record: dict[str, Any], arm: str) -> str:
    """Render an arm's final reward."""
    return f"{record['summary']['arms'][arm]['end']['reward']['mean']:.2f}"
