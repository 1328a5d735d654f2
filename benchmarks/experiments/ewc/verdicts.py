"""What the record says about the claims and goals, computed from its figures, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plumbing.markdown import several
from .summary import GOAL_COST, GOAL_REDUCTION, forgets, reaches_goal

_SAME_SHIFT, _SAME_POINTS = 0.05, 0.1  # decades, points: below them a strength counts as independent of the batch size


def verdicts(record: dict[str, Any]) -> list[str]:
    """Return one sentence for each claim, agreeing or not."""
    lines = []
    for name, swept in record["sweep"].items():
        title = record["scenarios"][name]["title"].split(",")[0]
        lines += [_right(title, swept), _squared(title, swept), _widths(title, swept)]
    lines += [_goal(scenario) for scenario in record["scenarios"].values()]
    lines += [_compared(record, "online", "online EWC"), _compared(record, "l2", "the L2 anchor")]
    return lines


def strengths(record: dict[str, Any]) -> list[str]:
    """Return what is said about the right and about the batch-squared Fisher's strength, in each sweep."""
    titles = {name: record["scenarios"][name]["title"].split(",")[0] for name in record["sweep"]}
    swept = record["sweep"].items()
    return [claim(titles[name], found) for name, found in swept for claim in (_right, _squared)]


def _right(title: str, swept: dict[str, Any]) -> str:
    """Say whether the right Fisher's strength is independent of the batch size."""
    moves = swept["batch_size"]["empirical"]
    furthest = max(abs(shift) for shift in moves["shift"])
    reached = furthest <= _SAME_SHIFT and moves["lost_points"] <= _SAME_POINTS
    return (
        f"{title}, right F: estimates in batches of {_sizes(moves)} differ by up to "
        f"{max(moves['fisher_difference']):.0e} of F's norm; the best alpha is {_best(swept, 'empirical')}, the curve "
        f"moves by up to {furthest:.2f} decades, and an alpha chosen at one batch size loses at most "
        f"{moves['lost_points']:.1f} points at another. "
        f"Goal, an alpha that does not depend on the batch size: {'reached' if reached else 'NOT reached'}."
    )


def _squared(title: str, swept: dict[str, Any]) -> str:
    """Say how the batch-squared Fisher's strength moves."""
    moves = swept["batch_size"]["squared"]
    return (
        f"{title}, batch-squared F: from batches of {moves['sizes'][0]} to {moves['sizes'][-1]} its mean falls to "
        f"1/{1 / moves['mean_ratio'][-1]:.0f}, the best alpha is {_best(swept, 'squared')}, and the curve moves by "
        f"{moves['shift'][-1]:.1f} decades: {moves['shift_per_decade']:.2f} for each decade of batch size (1: as 1/B). "
        f"An alpha chosen at one batch size loses up to {moves['lost_points']:.1f} points at another."
    )


def _widths(title: str, swept: dict[str, Any]) -> str:
    """Compare how wide the ranges of good alphas are, and how good the best ones."""
    right = next(curve for curve in swept["curves"] if curve["kind"] == "empirical")
    squared = [curve for curve in swept["curves"] if curve["kind"] == "squared"]
    widths = [f"{_decades(curve)} ({curve['batch_size']})" for curve in squared]
    gains = [right["best_test"] - curve["best_test"] for curve in squared]
    return (
        f"{title}: good alphas (within 2 points) span {_decades(right)} decades with the right F, and "
        f"{several(widths)} with the batch-squared one (batch size). With each one's own best alpha, the right F's "
        f"accuracy is {min(gains):+.1f} to {max(gains):+.1f} points above the others'."
    )


def _goal(scenario: dict[str, Any]) -> str:
    """Say whether EWC or WPL reaches the goal."""
    arm, none = scenario["arms"]["ewc"], scenario["arms"]["none"]
    lost = none["forgetting"][-1]
    if not forgets(scenario):
        return (
            f"{scenario['title']}: fine-tuning forgets {lost['mean']:.1f} ± {lost['std']:.1f} points, no more than its "
            "seeds scatter, so there is nothing to cut."
        )
    cut = arm["reduction_percent"]
    return (
        f"{scenario['title']}, goal of {GOAL_REDUCTION:.0f} % less forgetting at a cost of at most {GOAL_COST:.0f} "
        f"points: {cut:.0f} % (from {lost['mean']:.1f} to {arm['forgetting'][-1]['mean']:.1f}) at "
        f"{round(arm['cost']['mean'], 1) + 0.0:.1f} points with {scenario['method']}, "
        f"{'reached' if reaches_goal(arm) else 'NOT reached'}."
    )


def _compared(record: dict[str, Any], arm: str, words: str) -> str:
    """Compare average accuracy at the end with merged anchors' and another arm, paired by seed."""
    found = []
    for scenario in record["scenarios"].values():
        if arm not in scenario["arms"]:
            continue
        ends = [scenario["arms"][name]["accuracy"][-1]["seeds"] for name in ("ewc", arm)]
        gain = np.subtract(*ends)
        std = float(gain.std(ddof=1)) if len(gain) > 1 else 0.0
        found.append(f"{gain.mean():+.1f} ± {std:.1f} ({scenario['title']})")
    return f"Average accuracy with all anchors merged minus that of {words}, paired by seed: {'; '.join(found)}."


def _best(swept: dict[str, Any], kind: str) -> str:
    """List the best alpha of every batch size, or the one that they all have."""
    best = [f"{curve['best_alpha']:.3g}" for curve in swept["curves"] if curve["kind"] == kind]
    return best[0] if len(set(best)) == 1 else several(best)


def _sizes(moves: dict[str, Any]) -> str:
    """List the batch sizes."""
    return several([str(size) for size in moves["sizes"]])


def _decades(curve: dict[str, Any]) -> str:
    """Format a width, which is a lower bound where the range reaches the grid's end."""
    good = curve["good"]["2"]
    return f"{'at least ' * (good['open_low'] or good['open_high'])}{good['decades']:.1f}"
