"""What the integrations cost: a step with the callback over one without, and the Fisher of a Trainer's data.

Each package has a module of its own, ``benchmarks/integrations_NAME.py``, whose ``NAME_step`` times a training step
without the penalty, with the callback, and with the loop over parameters that users write into the loss.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .timing import Budget, quartiles, ratio

PACKAGES = ("transformers", "lightning")
WAYS = ("without", "callback", "loop")
WARM_UP = 1  # steps of each way that are not counted


def way_of(step: int) -> str:
    """Return the way of a step of a training in which all take turns, each in every place of a turn."""
    turn, place = divmod(step, len(WAYS))
    return WAYS[(place + turn) % len(WAYS)]


def record_of(case: str, model: nn.Module, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return what is recorded of a package's training step.

    Args:
        case: what was trained.
        model: that was.
        times: seconds of the steps of each way, of which as many count as all ways have.
    """
    rounds = min(map(len, times.values())) - WARM_UP
    times = {way: taken[WARM_UP : WARM_UP + rounds] for way, taken in times.items()}
    return {
        "case": case,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": rounds,
        "milliseconds": {way: quartiles(taken, 1e3) for way, taken in times.items()},
        "callback_over_without": ratio(times["callback"], times["without"]),
        "loop_over_callback": ratio(times["loop"], times["callback"]),
    }


def run(budget: Budget) -> dict[str, Any]:
    """Measure every package that is installed; return the records, and what is missing."""
    found: dict[str, Any] = {"steps": [], "fisher": None, "missing": []}
    for name in PACKAGES:
        try:
            part = importlib.import_module(f".integrations_{name}", __package__)
        except ImportError as error:
            found["missing"].append(f"{name}: {error}")
            continue
        found["steps"].append(getattr(part, f"{name}_step")(budget))
        if name == "transformers":
            found["fisher"] = part.fisher_epoch(budget)
    return found
