"""What the integrations cost: a step with the callback over one without, and the Fisher of a Trainer's data.

Each package has a module of its own, ``benchmarks/integrations_NAME.py``, whose ``NAME_step`` times a training step
without the penalty, with the callback, and with the loop over parameters that users write into the loss.
"""

from __future__ import annotations

import importlib
from typing import Any

from .timing import Budget

PACKAGES = ("transformers", "lightning")


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
