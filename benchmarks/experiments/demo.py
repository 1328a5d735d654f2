"""What an anchor buys, in a minute or two: a row of tasks, two models on one trunk, and what they showed in words.

    python -m benchmarks.experiments.demo         # A trained to convergence
    python -m benchmarks.experiments.demo --all   # and stopped early too, as in the paper's four panels

The row of tasks is learnt with the strengths that the record of the whole experiment chose; ``two_models`` chooses its
own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plumbing.markdown import RESULTS
from .permuted_pixels import __main__ as permuted_pixels
from .two_models import __main__ as two_models

CHOSEN = RESULTS / "permuted_pixels_digits.json"
CLEAR = 2.0  # points; less is called no difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both experiments; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments.demo", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--all", action="store_true", help="all four levels at which the paper stops A")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seeds", default="2", metavar="N", help="of each; default: %(default)s")
    options = parser.parse_args(arguments)
    common = ["--out", str(options.out), "--seeds", options.seeds]
    alphas = {arm: str(found["setting"]) for arm, found in json.loads(CHOSEN.read_text())["arms"].items()}
    print("1. One network learns four tasks in a row: digits, their pixels in another order each time.\n", flush=True)
    row = ["--arms", "none", "l2", "mc", "--grid", alphas["mc"], "--l2-grid", alphas["l2"]]
    if code := permuted_pixels.main([*common, *row]):
        return code
    print("\n2. Model B is trained on layers that it shares with model A, which was trained before.\n", flush=True)
    if code := two_models.main([*common, *(() if options.all else ("--levels", "convergence"))]):
        return code
    files = (options.out / f"{name}.json" for name in ("permuted_pixels", "two_models"))
    tasks, models = (json.loads(path.read_text()) for path in files)
    print("\nWhat this showed", *of_tasks(tasks), *of_models(models), *of_both(tasks, models), sep="\n")
    return 0


def of_tasks(record: dict[str, Any]) -> list[str]:
    """Say what the row of tasks showed."""
    arms = [record["arms"][arm] for arm in ("none", "l2", "mc")]
    every, first = ([values["mean"] for values in many] for many in zip(*map(_of_all_and_first, arms), strict=True))
    gained = gain(record)
    said = f"the Fisher's weights are worth {gained:.0f} points" if gained > CLEAR else "the Fisher buys little here"
    return [
        f"1. {record['settings']['tasks']} tasks in a row: in the end the network tells {every[0]:.0f} % of all their"
        " digits rightly without a penalty,",
        f"   {every[1]:.0f} % with an L2 anchor, {every[2]:.0f} % with the Fisher: {said}.",
        f"   Of the first task's digits: {first[0]:.0f}, {first[1]:.0f} and {first[2]:.0f} %.",
    ]


def _of_all_and_first(arm: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the accuracy over all tasks, and on the first one."""
    return arm["accuracy"], arm["tasks"][0]


def of_models(record: dict[str, Any]) -> list[str]:
    """Say what two models on one trunk showed, where A was trained to convergence."""
    methods = record["panels"][0]["methods"]
    lost = {m: round(methods[m]["forgetting"]["mean"], 1) + 0.0 for m in ("none", "wpl", "l2", "frozen")}
    apart = difference(record)
    said = "any anchor does" if apart < CLEAR else f"they differ by {apart:.0f} points"
    return [
        f"2. Two models on one trunk: training B costs A {lost['none']:.1f} points without a penalty,",
        f"   {lost['wpl']:.1f} with WPL, {lost['l2']:.1f} with an L2 anchor, {lost['frozen']:.1f} with frozen layers: "
        f"{said}.",
    ]


def of_both(tasks: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """Say what follows, where the first makes a difference and the second none."""
    if gain(tasks) <= CLEAR or difference(models) >= CLEAR:
        return []
    return [
        "So the Fisher's weights matter where the same parameters must learn the next task, not where the new model",
        "has layers of its own to learn it with.",
    ]


def gain(tasks: dict[str, Any]) -> float:
    """Return the points that the Fisher ends above the L2 anchor."""
    return float(tasks["arms"]["mc"]["accuracy"]["mean"] - tasks["arms"]["l2"]["accuracy"]["mean"])


def difference(models: dict[str, Any]) -> float:
    """Return how many points of forgetting lie between WPL and the L2 anchor."""
    methods = models["panels"][0]["methods"]
    return abs(methods["wpl"]["forgetting"]["mean"] - methods["l2"]["forgetting"]["mean"])


if __name__ == "__main__":
    sys.exit(main())
