"""LoRA in a row of domains: a language model's adapters learn texts one after the other, with and without F.

A small transformer over bytes is trained on one text first. Then adapters of low rank, beside all linear layers of its
blocks, learn the domains one after the other; all else stays as it is. After each domain its F is estimated and
consolidated. Arms: no penalty, the adapters of some blocks frozen after the first domain, an L2 anchor (F = 1), the
Fisher (labels drawn from the model, empirical), F from squares of batch gradients, and all domains at once. Each
penalty gets its own best alpha of as many values, half a decade apart, and freezing its own best choice of blocks, all
by the mean validation bits per byte over all domains at the end.

    python -m benchmarks.experiments.lora_domains                # texts that are on every machine
    python -m benchmarks.experiments.lora_domains --data DIR     # *.txt: the first text, then the domains, by name
    python -m benchmarks.experiments.lora_domains --quick        # does it run? in seconds, and shows nothing else

Writes lora_domains.json, lora_domains.png (every domain while the next are learnt) and lora_domains_alphas.png; prints
two tables. Adapters: arXiv:2106.09685.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.domains import load_domains, split_windows
from ..harness.command import Experiment
from ..harness.command import main as run_command
from ..harness.options import OptionError, make_parser, read
from ..harness.runner import Runner
from ..row import command
from ..row.arms import FISHERS
from . import report, training
from .training import Setup

#: what is tried by default: grids lie where each F's best alpha is in between
GRIDS = command.grids(7, first=-1.5, l2_first=-2, batch_sizes=(32,))
QUICK = {
    "base_size": 20_000,
    "size": 6_000,
    "length": 32,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "rank": 2,
    "base_epochs": 1,
    "epochs": 1,
    "fisher_windows": 32,
    "seeds": 2,
    "grid": (1.0, 100.0),
    "l2_grid": (0.1, 10.0),
    "workers": 0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    experiment = Experiment("lora_domains", prepare, run, report.tables, report.figures, report.NOTES)
    return run_command(experiment, _parse(arguments))


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Return the settings, and what the record says of the data."""
    setup = read(Setup(device=options.device), options)
    if setup.width % setup.heads:
        raise OptionError(f"--heads must divide --width, got {setup.heads} and {setup.width}")
    first, *row = load_domains(setup.data, setup.base_size, setup.size)
    sizes = [split_windows(domain, setup.length, 0).sizes for domain in (first, *row)]  # DataError: one is too short
    name = "texts of Python, scikit-learn and PyTorch" if setup.data is None else "texts of a folder"
    described = [{**one.describe(), "windows": windows} for one, windows in zip((first, *row), sizes, strict=True)]
    return setup, {"name": name, "tasks": [domain.name for domain in row], "texts": described}


def run(setup: Setup, options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Train the base models, learn all sequences and return their summary."""
    measured = [arm for arm in options.arms if arm in FISHERS]
    if "squared" in options.arms:
        measured += [f"squared {size}" for size in options.batch_sizes]
    jobs = [(setup, seed, tuple(measured)) for seed in range(options.seeds)]
    starts = runner.map("base models", training.start, jobs)
    found = command.run_all(report.ROW, setup, options, runner, training.run, starts, setup.depth)
    return {
        **found,
        "base_bits": np.round([start.base_bits for start in starts], 4).tolist(),
        "mean_f": {arm: float(f"{np.mean([start.mean_f[arm] for start in starts]):.4g}") for arm in measured},
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("lora_domains", __doc__, seeds=5)
    command.add_row(parser, Setup(), report.ROW, GRIDS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes unless others are given")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    return command.parse(parser, arguments, report.ROW, GRIDS)


if __name__ == "__main__":
    sys.exit(main())
