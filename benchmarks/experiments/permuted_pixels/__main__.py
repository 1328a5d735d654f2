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
from dataclasses import asdict
from itertools import combinations
from typing import Any

from ..data.digits import load_split
from ..harness.command import Experiment
from ..harness.command import main as run_command
from ..harness.options import add_grids, add_options, make_parser, positive, read, sort_grids, strength
from ..harness.runner import Runner
from . import report, summary, training
from .training import ARMS, FISHERS, Setup


def half_decades(first: int, count: int) -> tuple[float, ...]:
    """Return as many values, half a decade apart, from a power of ten on."""
    return tuple(float(f"{10 ** (first + half / 2):.3g}") for half in range(count))


#: what is tried by default: grids lie where each F's best alpha is in between
GRIDS = {
    "grid": (half_decades(1, 9), strength, "alphas of the Fishers; times the batch size for the batch-squared F"),
    "l2_grid": (half_decades(-5, 9), strength, "alphas of the L2 anchor, whose F is 1"),
    "batch_sizes": ((8, 64, 512), positive, "of the batch-squared F"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    experiment = Experiment("permuted_pixels", prepare, run, report.tables, report.figures, report.NOTES, ("arms",))
    return run_command(experiment, _parse(arguments))


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Return the settings, and what the record says of the data."""
    setup = read(Setup(device=options.device), options)
    split = load_split(setup.data, 0)
    return setup, {"name": split.name, **split.sizes}


def settings_of(arm: str, options: argparse.Namespace, layers: int) -> list[float | str | None]:
    """List what is tried of an arm."""
    if arm == "l2":
        return list(options.l2_grid)
    if arm in FISHERS:
        return list(options.grid)
    if arm.startswith("squared"):
        return [float(f"{alpha * int(arm.split()[1]):.6g}") for alpha in options.grid]
    if arm == "frozen":
        choices = [chosen for n in range(1, layers + 1) for chosen in combinations(range(1, layers + 1), n)]
        return ["+".join(map(str, chosen)) for chosen in choices]
    return [None]


def run(setup: Setup, options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Learn all sequences and return their summary."""
    arms = [a for a in options.arms if a != "squared"]
    if "squared" in options.arms:
        arms += [f"squared {size}" for size in options.batch_sizes]
    jobs = [
        (setup, seed, arm, setting)
        for seed in range(options.seeds)
        for arm in arms
        for setting in settings_of(arm, options, setup.layers + 1)
    ]
    runs = runner.map("sequences", training.run, jobs)
    grids = {name: getattr(options, name) for name in GRIDS}
    data = load_split(setup.data, 0).name
    return {
        "settings": {**asdict(setup), "data": data, "seeds": options.seeds, **grids},
        "arms": summary.summarise(runs, setup),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = make_parser("permuted_pixels", __doc__, seeds=5)
    add_options(parser, Setup())
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add_grids(parser, GRIDS)
    options = parser.parse_args(arguments)
    sort_grids(options, GRIDS)
    options.arms = [arm for arm in ARMS if arm in options.arms]
    if len(options.grid) != len(options.l2_grid):
        parser.error(f"--grid and --l2-grid must have as many values, got {len(options.grid)}, {len(options.l2_grid)}")
    if "none" not in options.arms:
        parser.error("--arms must hold none, which the others are compared with")
    return options


if __name__ == "__main__":
    sys.exit(main())
