"""The record of a scenario, and what the report and the figure read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...plumbing.spread import difference as paired
from ...plumbing.spread import spread
from .plan import Key, Outcome
from .settings import Condition, Run


def title(condition: Condition) -> str:
    """Name a condition in full."""
    memory = "all old data" if condition.memory is None else f"{condition.memory} old samples of a class"
    steps = f"{condition.steps:g} {condition.unit}"
    return f"{steps}, lambda {condition.share_old:g}, noise {condition.noise:g}, {memory}"


def name(study: str, condition: Mapping[str, Any]) -> str:
    """Name a condition by what its study varies."""
    unit = condition["unit"].removesuffix("s") if condition["steps"] == 1 else condition["unit"]
    steps = f"{condition['steps']:g} {unit}"
    if study == "steps":
        return steps
    if study == "noise":
        return f"{100 * condition['noise']:.0f} % wrong, {steps}"
    if study == "memory" and condition["memory"] is not None:
        return f"{condition['memory']} of a class"
    if study == "memory":
        return "none" if condition["share_old"] == 0 else "all"
    return f"lambda = {condition['share_old']:g}"


def summarise(
    studies: Mapping[str, Sequence[Condition]], outcomes: Mapping[Key, Outcome], unchanged: Sequence[Run]
) -> dict[str, Any]:
    """Return the record of one scenario: the conditions of each study by title, and every outcome.

    Accuracies are in %; "mean" is over updates first. Curves begin with the model of the start.
    """
    results: dict[str, Any] = {}
    for (condition, method), outcome in outcomes.items():
        row = results.setdefault(title(condition), {"condition": asdict(condition), "methods": {}})
        row["iterations_per_update"] = round(
            max(run.iterations for run in outcome.runs) / (len(outcome.runs[0].test) - 1), 1
        )
        tried = [{**asdict(arm), "validation": round(100 * score, 2)} for arm, score in outcome.grid]
        rates = [arm.lr for arm, _ in outcome.grid]
        edge = {"lr_at_edge": outcome.arm.lr in (min(rates), max(rates))} if rates else {}
        row["methods"][method] = {**asdict(outcome.arm), **edge, "grid": tried, **_accuracies(outcome.runs)}
    names = {study: [title(condition) for condition in conditions] for study, conditions in studies.items()}
    return {"studies": names, "unchanged": _accuracies(unchanged), "results": results}


def _accuracies(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the curves of runs and what they come to."""
    curves = 100 * np.array([run.test for run in runs])
    return {
        "mean": spread(curves[:, 1:].mean(1)),
        "final": spread(curves[:, -1]),
        "diverged": sum(run.diverged for run in runs),
        "curves": curves.round(2).tolist(),
    }


class Scenario:
    """Reads one scenario of a record."""

    def __init__(self, record: Mapping[str, Any], name: str) -> None:
        """Refer to a part of a record."""
        self._part = record["scenarios"][name]
        self.name = name
        self.unchanged = self._part["unchanged"]

    def study(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a study in order."""
        return [self._part["results"][title] for title in self._part["studies"][name]]

    def chosen(self, method: str) -> list[dict[str, Any]]:
        """Return what was chosen for a method on a grid, in all conditions."""
        found = (row["methods"].get(method, {"grid": []}) for row in self._part["results"].values())
        return [outcome for outcome in found if outcome["grid"]]

    def share(self, value: float) -> dict[str, Any]:
        """Return the row of the study of lambda with this value."""
        return next(row for row in self.study("share") if row["condition"]["share_old"] == value)


def difference(a: Mapping[str, Any], b: Mapping[str, Any], key: str = "mean") -> tuple[float, float]:
    """Return the mean of a - b in points, paired by seed, and the half width of its 95 % interval (Student's t).

    Args:
        a: accuracies of one outcome in a record.
        b: of another, with the same seeds.
        key: "mean" over updates, or "final".
    """
    return paired(a[key], b[key])
