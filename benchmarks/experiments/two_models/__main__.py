"""Two models that share layers, trained one after the other: what A forgets, without and with the penalty.

Model A (4 layers) and model B (6 layers) share their first 3 layers. A is trained to a level, its Fisher estimated,
then B is trained on the same data, once per method: no penalty, WPL, WPL with the batch-squared Fisher, an L2 anchor,
frozen layers. Each penalty gets its own best alpha from one grid of alpha * mean(F), chosen on a validation split.

    python -m benchmarks.experiments.two_models                       # the digits that scikit-learn ships
    python -m benchmarks.experiments.two_models --data DIR --seeds 5  # MNIST's IDX files

Writes two_models.json and two_models.png; prints a table. Setting: that of arXiv:1902.08232, section on MNIST.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..data.digits import load_split
from ..harness.command import Experiment
from ..harness.command import main as run_command
from ..harness.options import add_options, make_parser, read, share, strength
from ..harness.runner import Runner
from . import report, training
from .training import METHODS, TUNED, Setup

LEVELS = (None, 0.56, 0.435, 0.36)  # A's accuracy in the paper's panels; None: to convergence
GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # alpha * mean(F)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    parser = make_parser("two_models", __doc__, seeds=3)
    add_options(parser, Setup())
    words = "values of alpha * mean(F); default: %(default)s"
    parser.add_argument("--grid", type=strength, nargs="+", default=GRID, help=words)
    words = "A's validation accuracy at its end, from 0 to 1, or convergence; default: those of the paper"
    parser.add_argument("--levels", type=level, nargs="+", default=LEVELS, help=words, metavar="LEVEL")
    experiment = Experiment("two_models", prepare, run, report.tables, report.figures, report.NOTES, ("methods",))
    return run_command(experiment, parser.parse_args(arguments))


def level(text: str) -> float | None:
    """Read when A's training ends."""
    return None if text == "convergence" else share(text)


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Return the settings, and what the record says of the data."""
    split = load_split(options.data, 0)
    setup = read(Setup(device=options.device), options, iterations_b=options.iterations)
    return setup, {"name": split.name, **split.sizes}


def run(setup: Setup, options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Train all models and return one panel for each level."""
    starts = [(setup, level, seed) for level in options.levels for seed in range(options.seeds)]
    trained = runner.map("training A", training.train_a, starts)
    arms = [(m, value) for m in METHODS for value in (options.grid if m in TUNED else (None,))]
    runs = runner.map("training B", training.train_b, [(setup, a, *arm) for a in trained for arm in arms])
    panels = []
    for first in range(0, len(starts), options.seeds):
        last = first + options.seeds
        panels.append(report.summarise(setup, trained[first:last], runs[first * len(arms) : last * len(arms)]))
    data = load_split(setup.data, 0).name
    settings = {**asdict(setup), "data": data, "seeds": options.seeds, "levels": options.levels, "grid": options.grid}
    return {"settings": settings, "panels": panels}


if __name__ == "__main__":
    sys.exit(main())
