"""One capture rule: a steady Fisher pass over the unit, with the rule and without it, where the generic one serves.

    python -m benchmarks rule linear           # a case of benchmarks/rules.py
    python -m benchmarks rule MODULE:CASE      # a function of yours that returns (model, batch, loss_fn)

``batch`` is (inputs, targets) with the samples on their first axis, ``loss_fn(outputs, targets)`` gives one loss per
sample. The unit is one ordinary ``loss_fn(model(inputs), targets).mean().backward()``.
"""

from __future__ import annotations

import copy
import importlib
import time
from dataclasses import replace
from unittest import mock

import torch

from wplfast.capture import rules as capture_rules

from .fisher import Subject, memory, steady, timed
from .rules import CASES, Case
from .timing import Budget

SECONDS = 20.0  # for all of it
SLOW = 8  # a pass that takes more than this part of the time is not repeated


def find(name: str) -> tuple[str, Case]:
    """Return a built-in case, or a module's, with its name.

    Raises:
        ValueError: if there is none.
    """
    module, colon, function = name.partition(":")
    if not colon and name in CASES:
        return name, CASES[name]
    try:
        return name, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"expected MODULE:CASE or one of {', '.join(CASES)}, got {name!r}") from None


def measure(subject: Subject, budget: Budget) -> dict:
    """Time the steady pass and the unit, interleaved, with the rules that are there; return the record."""
    started = time.perf_counter()
    with steady(subject, strict=False) as fisher_pass:
        warm = time.perf_counter()
        fisher_pass()
        once = time.perf_counter() - warm
        left = budget.seconds - (time.perf_counter() - started)
        rounds = budget.rounds if SLOW * once < left else 1
        found = timed(subject, fisher_pass, replace(budget, rounds=rounds, seconds=left))
        peaks = memory(subject, fisher_pass, budget.device)
    return {
        "rules": {name: list(served) for name, served in subject.report.rules.items()},
        **found,
        "relative_error": subject.error,
        "extra_bytes": peaks["fisher_pass"] - peaks["unit"],
        "one_fisher_bytes": peaks["one_fisher"],
    }


def run(named: tuple[str, Case], budget: Budget) -> dict:
    """Measure a case with the rules that serve it, and without them."""
    torch.manual_seed(0)
    name, case = named
    model, batch, loss_fn = case()
    model, batch = model.to(budget.device), tuple(part.to(budget.device) for part in batch)
    half = replace(budget, seconds=budget.seconds / 2)
    found = {"on": measure(Subject(copy.deepcopy(model), [batch], loss_fn, name), half)}
    generic, served = capture_rules.GENERIC, {rule for rules in found["on"]["rules"].values() for rule in rules}
    if served - {generic.name}:
        rest = [rule for rule in capture_rules.RULES if rule.name not in served or rule is generic]
        with mock.patch.object(capture_rules, "RULES", rest):
            found["off"] = measure(Subject(model, [batch], loss_fn, name), half)
    return {"case": name, **found}
