"""Incremental fine-tuning: few steps, a share of old data, wrong labels; and a penalty in place of old data.

A small network knows some classes. Then small update sets of one class each arrive, of known or of new
classes, and it is fine-tuned on each, warm, with a share lambda of old data in the minibatches. Studied are the number
of steps, lambda, wrong labels, and how far WPL (anchored after every update, with a running F) replaces old data.

    python -m benchmarks.experiments.fine_tuning                       # the digits that scikit-learn ships
    python -m benchmarks.experiments.fine_tuning --data DIR            # MNIST's IDX files
    python -m benchmarks.experiments.fine_tuning --data DIR --model cnn --width 32 --seeds 9 --device cuda
    python -m benchmarks.experiments.fine_tuning --others 5            # begin with what five other classes taught
    python -m benchmarks.experiments.fine_tuning --others 5 --pretraining 0   # the same five classes, from scratch

Writes fine_tuning.json and fine_tuning.png; prints tables. Setting: after Kaeding, Rodner, Freytag and
Denzler, "Fine-tuning deep neural networks in continuous learning scenarios", ACCV workshops 2016,
doi 10.1007/978-3-319-54526-4_43, on digits instead of photographs; its network was trained on ImageNet before, ours
only on other digits, and on request.
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
from ..harness.options import add_options, make_parser, positive, read, strength
from ..harness.runner import Runner
from ..harness.statistics import spread
from . import plan, report
from .model import WIDTHS
from .settings import METHODS, Setup
from .stream import N_CLASSES, N_UPDATES, SCENARIOS, Sizes, make_stream
from .training import pretrained_accuracy

MNIST = Sizes(update=100, start_known=50, start_new=150)
FEWEST = 4  # classes that arrive, so that a model can start with two and learn two


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    experiment = Experiment("fine_tuning", prepare, run, report.tables, report.figures, report.NOTES)
    return run_command(experiment, _parse(arguments))


def prepare(options: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Return the settings, and what the record says of the data, after all streams were made once.

    Raises:
        DataError: if the data are missing or damaged, or a class has too few samples for the sizes asked for.
    """
    sizes = Sizes(*options.sizes) if options.sizes else Sizes() if options.data is None else MNIST
    width = options.width or WIDTHS[options.model]
    setup = read(Setup(device=options.device), options, sizes=sizes, width=width)
    for seed in range(options.seeds):
        split = load_split(setup.data, seed)
        for scenario in options.scenarios:
            make_stream(split, scenario, setup.sizes, 0.0, setup.n_updates, seed, setup.n_others)
    return setup, {"name": split.name, **split.sizes}


def run(setup: Setup, options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Run all studies and return what they gave."""
    tuning = min(options.tuning_seeds, options.seeds)
    parts, runs = {}, 0
    for scenario in options.scenarios:
        studies = plan.studies(scenario, options.iterations, options.epochs)
        parts[scenario], done = plan.run(setup, studies, options.seeds, tuning, runner, options.methods)
        runs += done
        if setup.n_others and setup.pretraining:
            jobs = [(setup, scenario, seed) for seed in range(options.seeds)]
            found = runner.map("other classes", pretrained_accuracy, jobs)
            parts[scenario]["pretrained"] = spread([100 * accuracy for accuracy in found])
    grids = {"learning_rates": plan.LEARNING_RATES, "penalty_rates": plan.PENALTY_RATES, "pulls": plan.PULLS}
    settings = {**asdict(setup), "data": load_split(setup.data, 0).name, "seeds": options.seeds, "tuning_seeds": tuning}
    settings |= {"iterations": options.iterations, "epochs": options.epochs, "methods": options.methods, **grids}
    return {"settings": settings, "runs": runs, "scenarios": parts}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = make_parser("fine_tuning", __doc__, seeds=5)
    add_options(parser, Setup())
    add = parser.add_argument
    add("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="what arrives; default: both")
    add("--iterations", type=positive, default=30, help="SGD steps of an update; default: %(default)s")
    add("--epochs", type=strength, default=10.0, help="the longest updates; default: %(default)g")
    add("--width", type=positive, help="hidden units, or channels of the first convolution; default: 64, cnn 8")
    names = ("UPDATE", "KNOWN", "NEW")
    words = (
        "samples of an update set, and of a class at the start in each scenario; default: 30 20 60, MNIST 100 50 150"
    )
    add("--sizes", type=positive, nargs=3, metavar=names, help=words)
    add("--tuning-seeds", type=positive, default=2, metavar="N", help="seeds to choose on; default: %(default)s")
    words = "what is compared with no penalty; default: both"
    add("--methods", nargs="*", choices=[name for name in METHODS if name != "none"], default=list(METHODS), help=words)
    options = parser.parse_args(arguments)
    options.methods = [method for method in METHODS if method in ("none", *options.methods)]
    if options.updates > N_UPDATES:
        parser.error(f"argument --updates: expected at most {N_UPDATES}, got {options.updates}")
    if options.others == 1 or options.others > N_CLASSES - FEWEST:
        parser.error(f"argument --others: expected 0, or from 2 to {N_CLASSES - FEWEST}, got {options.others}")
    return options


if __name__ == "__main__":
    sys.exit(main())
