"""EWC beside WPL: what is anchored, what is forgotten, and how carefully alpha must be chosen.

EWC: one model learns new data, task after task, and all its parameters are anchored (split digits, permuted pixels).
WPL: a new model that shares layers learns the same data, and the shared layers alone are anchored. Arms: fine-tuning,
EWC with all anchors merged exactly, online EWC, an L2 anchor (F = 1), joint training; each penalty at its own best
alpha of as many values, chosen on a validation split. Then a sweep: accuracy against alpha, with the right Fisher and
with the batch-squared one, estimated in batches of several sizes.

    python -m benchmarks.experiments.ewc              # the digits that scikit-learn ships
    python -m benchmarks.experiments.ewc --data DIR   # MNIST's IDX files
    python -m benchmarks.experiments.ewc --data DIR --device cuda --hidden 400 --permutations 10 --iterations 5000

Writes ewc.json, ewc.png (the sweep) and ewc_tasks.png; prints tables. Settings: arXiv:1902.08232, figure 2, and
arXiv:1612.00796.
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
from ..harness.options import add_grids, add_options, make_parser, positive, read, sort_grids, strength
from ..harness.runner import Runner
from . import report, summary, sweep, training
from .scenarios import SCENARIOS, Setup, tasks
from .training import TUNED

#: what is tried by default, and where
GRIDS = {
    "grid": ((1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7), strength, "alphas of both EWC arms"),
    "l2_grid": ((1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3), strength, "alphas of the L2 arm"),  # F = 1, not about 1e-4
    "sweep_grid": (tuple(float(f"{10 ** (half / 2):.3g}") for half in range(2, 17)), strength, "alphas of the sweep"),
    "batch_sizes": ((1, 8, 64, 512), positive, "of the sweep's F"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    experiment = Experiment("ewc", prepare, run, report.tables, report.figures, report.NOTES)
    return run_command(experiment, _parse(arguments))


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Return the settings, and what the record says of the data."""
    setup = read(Setup(device=options.device), options)
    split = load_split(setup.data, 0)
    for seed in range(options.seeds):
        tasks(setup, "split5", seed)  # the smallest tasks
    return setup, {"name": split.name, **split.sizes}


def run(setup: Setup, options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Learn all sequences and sweeps and return their summaries."""
    seeds, kinds = range(options.seeds), sweep.curves(options.batch_sizes)
    grids = {"ewc": options.grid, "online": options.grid, "l2": options.l2_grid}
    sequences = [
        (setup, scenario, seed, arm, alpha)
        for scenario in SCENARIOS
        for seed in seeds
        for arm in training.arms(len(tasks(setup, scenario, 0)))
        for alpha in (grids[arm] if arm in TUNED else (None,))
    ]
    grid = options.sweep_grid
    sweeps = [(setup, name, seed, *kind, grid) for name in sweep.SWEPT for seed in seeds for kind in kinds]
    learnt = runner.map("tasks", training.run, sequences)
    swept = runner.map("sweep", sweep.sweep, sweeps)
    return {
        "settings": {
            **asdict(setup),
            "data": load_split(setup.data, 0).name,
            "seeds": options.seeds,
            **{name: getattr(options, name) for name in GRIDS},
            "fisher_batch": training.FISHER_BATCH,
        },
        "scenarios": {name: summary.summarise(name, [r for r in learnt if r.scenario == name]) for name in SCENARIOS},
        "sweep": {name: sweep.summarise([r for r in swept if r.scenario == name], grid) for name in sweep.SWEPT},
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = make_parser("ewc", __doc__, seeds=5)
    add_options(parser, Setup())
    add_grids(parser, GRIDS)
    options = parser.parse_args(arguments)
    sort_grids(options, GRIDS)
    if len(options.grid) != len(options.l2_grid):
        parser.error(f"--grid and --l2-grid must have as many values, got {len(options.grid)}, {len(options.l2_grid)}")
    if len(options.sweep_grid) < 2 or len(options.batch_sizes) < 2:
        parser.error("--sweep-grid and --batch-sizes must have at least 2 values each")
    return options


if __name__ == "__main__":
    sys.exit(main())
