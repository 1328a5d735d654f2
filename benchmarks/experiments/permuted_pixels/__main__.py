"""Permuted pixels: one perceptron learns a row of tasks; what is left of the first ones, with and without F.

A task is the same digits with their pixels in another order. After each task its F is estimated and consolidated:
anchors are merged, so that the penalty is the exact sum over all earlier tasks. Arms: no penalty, layers frozen after
the first task, an L2 anchor (F = 1), the Fisher (labels drawn from the model, exact over classes, empirical), F from
squares of batch gradients at several batch sizes, and all tasks at once. Each penalty gets its own best alpha of as
many values, half a decade apart, and freezing its own best choice of layers, all by the mean validation accuracy over
all tasks at the end.

    python -m benchmarks.experiments.permuted_pixels                       # the digits that scikit-learn ships
    python -m benchmarks.experiments.permuted_pixels --data DIR --epochs 4 # MNIST's IDX files
    python -m benchmarks.experiments.permuted_pixels --tasks 10 --arms none l2 mc

Writes permuted_pixels.json, permuted_pixels.png (every task while the next are learnt) and permuted_pixels_alphas.png;
prints a table. Setting: arXiv:1612.00796, figure 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..data.digits import load_split
from ..harness.command import Experiment
from ..harness.command import main as run_command
from ..harness.options import make_parser, read
from ..harness.runner import Runner
from ..row import command
from . import report, training
from .training import Setup

#: what is tried by default: grids lie where each F's best alpha is in between
GRIDS = command.grids(9, first=1, l2_first=-5, batch_sizes=(8, 64, 512))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    experiment = Experiment("permuted_pixels", prepare, run, report.tables, report.figures, report.NOTES, ("arms",))
    return run_command(experiment, _parse(arguments))


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Return the settings, and what the record says of the data."""
    setup = read(Setup(device=options.device), options)
    split = load_split(setup.data, 0)
    return setup, {"name": split.name, **split.sizes}


def run(setup: Setup, options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Learn all sequences and return their summary."""
    seeds, layers = range(options.seeds), setup.layers + 1
    found = command.run_all(report.ROW, setup, options, runner, training.run, seeds, layers)
    found["settings"]["data"] = load_split(setup.data, 0).name
    return found


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("permuted_pixels", __doc__, seeds=5)
    command.add_row(parser, Setup(), report.ROW, GRIDS)
    return command.parse(parser, arguments, report.ROW, GRIDS)


if __name__ == "__main__":
    sys.exit(main())
