"""Incremental fine-tuning: few steps, a share of old data, wrong labels; and a penalty in place of old data.

A small network knows some classes. Then small update sets of one class each arrive, of known or of new
classes, and it is fine-tuned on each, warm, with a share lambda of old data in the minibatches. Studied are the number
of steps, lambda, wrong labels, and how far WPL (anchored after every update, with a running F) replaces old data.

    python -m benchmarks.experiments.fine_tuning                       # the digits that scikit-learn ships
    python -m benchmarks.experiments.fine_tuning --data DIR            # MNIST's IDX files
    python -m benchmarks.experiments.fine_tuning --data DIR --model cnn --width 32 --seeds 9 --device cuda

Writes fine_tuning.json and fine_tuning.png; prints tables and verdicts. Setting: after Kaeding, Rodner, Freytag and
Denzler, "Fine-tuning deep neural networks in continuous learning scenarios", ACCV workshops 2016,
doi 10.1007/978-3-319-54526-4_43, on digits instead of photographs and without a pre-trained network.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from tqdm.auto import tqdm

from ...plumbing.data import DataError, load_split
from ...plumbing.options import DeviceError, add_common, positive, resolve, strength
from ...plumbing.record import environment, write_bytes, write_json
from ...plumbing.workers import Workers
from . import figure, plan, report
from .model import WIDTHS
from .results import summarise
from .settings import Setup
from .stream import SCENARIOS, Sizes, make_stream

DIGITS = Sizes(update=30, start_known=20, start_new=60)
MNIST = Sizes(update=100, start_known=50, start_new=150)
MOST = 10  # update sets: one of each class, or two of each new one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    options = _parse(arguments)
    sizes = Sizes(*options.sizes) if options.sizes else DIGITS if options.data is None else MNIST
    setup = Setup(
        sizes,
        options.data,
        options.device,
        options.model,
        options.width or WIDTHS[options.model],
        n_updates=options.updates,
        start_iterations=options.start,
    )
    tuning = min(options.tuning_seeds, options.seeds)
    try:
        resolve(options)
        n_samples = _check(setup, options.scenarios, options.seeds)
    except (DataError, DeviceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place, started = environment(options.device), time.perf_counter()
    studies = {scenario: plan.studies(scenario, options.iterations, options.epochs) for scenario in options.scenarios}
    pairs = {scenario: plan.keys(conditions) for scenario, conditions in studies.items()}
    total = sum(plan.n_runs(part, options.seeds, tuning) for part in pairs.values())
    scenarios = {}
    with tqdm(total=total, unit="run") as bar, Workers(options.workers, bar) as workers:
        for scenario in options.scenarios:
            bar.set_description(SCENARIOS[scenario])
            outcomes, unchanged = plan.run(setup, pairs[scenario], options.seeds, tuning, workers)
            scenarios[scenario] = summarise(studies[scenario], outcomes, unchanged)
    data = "scikit-learn digits" if options.data is None else "MNIST"
    settings = {"seeds": options.seeds, "tuning_seeds": tuning, "iterations": options.iterations}
    grids = {"learning_rates": plan.LEARNING_RATES, "penalty_rates": plan.PENALTY_RATES, "pulls": plan.PULLS}
    record = {
        "experiment": "fine_tuning",
        "data": {"name": data, **n_samples},
        **place,
        "settings": {**asdict(setup), "data": data, **settings, "epochs": options.epochs, **grids},
        "workers": options.workers,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "runs": total,
        "scenarios": scenarios,
    }
    image = figure.draw(record)
    write_json(options.out / "fine_tuning.json", record)
    write_bytes(options.out / "fine_tuning.png", image)
    print(report.table(record))
    print(f"{record['wall_seconds']:.0f} s; {options.out / 'fine_tuning.json'}, {options.out / 'fine_tuning.png'}")
    return 0


def _check(setup: Setup, scenarios: Sequence[str], n_seeds: int) -> dict[str, int]:
    """Make all streams before anything long begins; return the sizes of the parts.

    Raises:
        DataError: if the data are missing or damaged, or a class has too few samples for the sizes asked for.
    """
    for seed in range(n_seeds):
        split = load_split(setup.data, seed)
        for scenario in scenarios:
            make_stream(split.train[1], scenario, setup.sizes, 0.0, setup.n_updates, seed)
    return split.sizes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments.fine_tuning", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder with MNIST's IDX files, gzipped or not; default: scikit-learn's digits")
    add("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="what arrives; default: both")
    add("--iterations", type=positive, default=30, help="SGD steps of an update; default: %(default)s")
    add("--epochs", type=strength, default=10.0, help="the longest updates; default: %(default)g")
    add("--updates", type=positive, default=MOST, help=f"update sets, at most {MOST}; default: %(default)s")
    add("--start", type=positive, default=300, help="SGD steps before the first update; default: %(default)s")
    add("--model", choices=WIDTHS, default="mlp", help="default: %(default)s")
    add("--width", type=positive, help="hidden units, or channels of the first convolution; default: 64, cnn 8")
    sizes = ("UPDATE", "KNOWN", "NEW")
    words = (
        "samples of an update set, and of a class at the start in each scenario; default: 30 20 60, MNIST 100 50 150"
    )
    add("--sizes", type=positive, nargs=3, metavar=sizes, help=words)
    add("--tuning-seeds", type=positive, default=2, metavar="N", help="seeds to choose on; default: %(default)s")
    add_common(parser, seeds=5)
    options = parser.parse_args(arguments)
    if options.updates > MOST:
        parser.error(f"argument --updates: expected at most {MOST}, got {options.updates}")
    return options


if __name__ == "__main__":
    sys.exit(main())
