"""What the paper found, held against the figures of a record; and whether WPL replaces old data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...plumbing.markdown import several
from ...plumbing.spread import signed
from .results import Scenario, difference

AS_GOOD = 1.0  # points of accuracy that may be lost where something is said to do as well
ABOUT_AS_GOOD = 2.0  # the same, for "about as well"
NOISE_LOSS = 3.0  # points; the paper lost about 2


@dataclass(frozen=True)
class Verdict:
    """A claim, whether the figures bear it out (None: no claim of the paper), the figures, and the one that decides."""

    claim: str
    holds: bool | None
    figures: str
    figure: str = ""

    def __str__(self) -> str:
        """Return a line."""
        words = {True: "confirmed. ", False: "NOT confirmed. ", None: ""}[self.holds]
        return f"{self.claim}: {words}{self.figures}"


def verdicts(scenario: Scenario) -> list[Verdict]:
    """Return all verdicts of a scenario, each from the figures of its record."""
    return [*findings(scenario), *_replacement(scenario)]


def findings(scenario: Scenario) -> list[Verdict]:
    """Return the verdicts on what the paper found: the same claims for every scenario."""
    return [*_steps(scenario), *_share(scenario), *_noise(scenario)]


def _steps(scenario: Scenario) -> list[Verdict]:
    """Do few steps suffice, and do only far too few hurt?"""
    longest, *rest = scenario.study("steps")
    usual = scenario.share(0.5)
    mean, half = _between(usual, longest)
    change = signed(mean, half)
    few = f"{_steps_of(usual)} instead of {_steps_of(longest)}: {change} points"
    found = [Verdict("a small constant number of steps does as well as many epochs", mean >= -AS_GOOD, few, change)]
    tenth = [row for row in rest if row["condition"]["unit"] == "epochs" and row["condition"]["steps"] < 1]
    for row in tenth:
        mean, half = _between(row, longest)
        change = signed(mean, half)
        words = f"{_steps_of(row)}: {change} points"
        found.append(Verdict("a tenth of an epoch is too few", mean < -AS_GOOD and mean + half < 0, words, change))
    return found


def _share(scenario: Scenario) -> list[Verdict]:
    """Is lambda in between best, does 0 overfit, does 1 only delay?"""
    rows = scenario.study("share")
    means = {row["condition"]["share_old"]: row["methods"]["none"]["mean"]["mean"] for row in rows}
    best = max(means, key=means.__getitem__)
    words = ", ".join(f"{share:g}: {mean:.1f} %" for share, mean in means.items())
    lost, half = _between(scenario.share(0.0), scenario.share(best))
    gain = difference(scenario.share(0.0)["methods"]["none"], scenario.unchanged)
    rate = scenario.share(best)["methods"]["none"]["lr"]
    (same,) = [t["validation"] for t in scenario.share(0.0)["methods"]["none"]["grid"] if t["lr"] == rate]
    zero = (
        f"Against lambda = {best:g}: {signed(lost, half)} points; against no update at all: {signed(*gain)}, by a "
        f"learning rate of {scenario.share(0.0)['methods']['none']['lr']:g}; at lambda = {best:g}'s rate of {rate:g} "
        f"the validation accuracy is {same:.0f} %"
    )
    late, late_half = _between(scenario.share(1.0), scenario.share(0.75))
    end, end_half = _between(scenario.share(1.0), scenario.share(0.75), "final")
    one = f"Mean over updates {signed(late, late_half)} points, after the last one {signed(end, end_half)}"
    return [
        Verdict("a lambda in between is best", 0 < best < 1, f"Best: {best:g} ({words})", f"{best:g}"),
        Verdict("lambda = 0 overfits the update set", lost + half < -AS_GOOD, zero, signed(lost, half)),
        Verdict("lambda = 1 does about as well as 0.75", late >= -ABOUT_AS_GOOD, one, signed(late, late_half)),
    ]


def _noise(scenario: Scenario) -> list[Verdict]:
    """Do 10 % wrong labels cost little?"""
    clean, *noisy = scenario.study("noise")
    lost = {row["condition"]["noise"]: _between(row, clean) for row in noisy}
    words = ", ".join(f"{100 * share:.0f} %: {signed(*change)}" for share, change in lost.items())
    words = f"With {_steps_of(clean)} an update, points by share of wrong labels: {words}"
    claim = "10 % wrong labels cost little (paper: about 2 points)"
    return [Verdict(claim, lost[0.1][0] >= -NOISE_LOSS, words, signed(*lost[0.1]))]


def _replacement(scenario: Scenario) -> list[Verdict]:
    """Where does WPL help, and how much old data is it worth?"""
    sorts: dict[str, list[str]] = {"helps": [], "hurts": [], "makes no clear difference": []}
    for row in [*scenario.study("share"), *scenario.study("memory")[1:-1]]:
        mean, half = difference(row["methods"]["wpl"], row["methods"]["none"])
        sort = "makes no clear difference" if abs(mean) <= half else "helps" if mean > 0 else "hurts"
        idle = sort == "helps" and not _above(row["methods"]["wpl"], scenario.unchanged)
        words = ", but is not clearly above no update" if idle else ""
        sorts[sort].append(f"{old_data(row)} ({signed(mean, half)}{words})")
    where = [Verdict(f"WPL {sort} at", None, several(names)) for sort, names in sorts.items() if names]
    without = scenario.study("memory")
    worth = [_worth(scenario, row, following) for row, following in pairwise(without)]
    return [*where, *worth, *_controls(scenario)]


def _worth(scenario: Scenario, row: Mapping[str, Any], following: Mapping[str, Any]) -> Verdict:
    """Tell whether WPL makes up for less old data: clearly above no penalty, and as good as that with more of them.

    There is nothing to make up for where more old data bring no clear gain, or none over a model that is not updated.
    """
    step, step_half = difference(following["methods"]["none"], row["methods"]["none"])
    gain, half = difference(row["methods"]["wpl"], row["methods"]["none"])
    claim = f"WPL with {old_data(row)} replaces the step to {old_data(following)}"
    words = f"The step brings {signed(step, step_half)} points, WPL {signed(gain, half)}"
    if step <= step_half:
        return Verdict(claim, None, f"there is no clear step to replace. {words}")
    if not _above(following["methods"]["none"], scenario.unchanged):
        return Verdict(claim, None, f"the step does not lead clearly above no update at all. {words}")
    return Verdict(claim, gain > half and gain >= step - AS_GOOD, words)


def _controls(scenario: Scenario) -> list[Verdict]:
    """Compare WPL with a plain anchor, and without old data with no update at all."""
    rows = scenario.study("memory")
    bare = rows[0]["methods"]["wpl"]
    mean, half = difference(bare, scenario.unchanged)
    found = [
        Verdict("Without old data, WPL does better than no update at all", mean > half, f"{signed(mean, half)} points")
    ]
    plain = {old_data(row): difference(row["methods"]["wpl"], row["methods"]["l2"]) for row in rows}
    above, below = (sum(sign * mean > half for mean, half in plain.values()) for sign in (1, -1))
    words = ", ".join(f"{name}: {signed(*change)}" for name, change in plain.items())
    claim = f"WPL against a plain L2 anchor, clearly above in {above} of {len(rows)} and clearly below in {below}"
    return [*found, Verdict(claim, None, f"points {words}")]


def old_data(row: Mapping[str, Any]) -> str:
    """Say how much old data a condition has."""
    condition = row["condition"]
    if condition["memory"] is not None:
        return f"{condition['memory']} old samples of a class"
    return "no old data" if condition["share_old"] == 0 else f"lambda = {condition['share_old']:g}"


def _above(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Tell whether an outcome is clearly above another."""
    mean, half = difference(a, b)
    return mean > half


def _between(a: Mapping[str, Any], b: Mapping[str, Any], key: str = "mean") -> tuple[float, float]:
    """Return the difference of two conditions without a penalty."""
    return difference(a["methods"]["none"], b["methods"]["none"], key)


def _steps_of(row: Mapping[str, Any]) -> str:
    """Say how long an update is."""
    condition = row["condition"]
    name = f"{condition['steps']:g} {condition['unit']}"
    return name if condition["unit"] == "iterations" else f"{name} ({row['iterations_per_update']:g} iterations)"
