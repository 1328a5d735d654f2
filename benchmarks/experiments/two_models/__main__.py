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
import time
from collections.abc import Sequence
from dataclasses import asdict

from tqdm.auto import tqdm

from ...plumbing.data import DataError, load_split
from ...plumbing.options import DeviceError, add_common, positive, resolve, strength
from ...plumbing.record import environment, write_bytes, write_json
from ...plumbing.workers import Workers
from . import report, training
from .training import METHODS, TUNED, Setup

LEVELS = (None, 0.56, 0.435, 0.36)  # A's accuracy in the paper's panels; None: to convergence
GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # alpha * mean(F)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    options = _parse(arguments)
    try:
        resolve(options)
        sizes = load_split(options.data, 0).sizes
    except (DataError, DeviceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setup = Setup(options.data, options.device, iterations_a=options.iterations, iterations_b=options.iterations)
    place, started = environment(options.device), time.perf_counter()
    panels = run(setup, options.seeds, options.workers, options.grid)
    data = "scikit-learn digits" if options.data is None else "MNIST"
    record = {
        "experiment": "two_models",
        "data": {"name": data, **sizes},
        **place,
        "settings": {**asdict(setup), "data": data, "seeds": options.seeds, "levels": LEVELS, "grid": options.grid},
        "workers": options.workers,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "panels": panels,
    }
    image = report.figure(panels, f"{data}, {options.seeds} seed{'s' * (options.seeds > 1)}")
    write_json(options.out / "two_models.json", record)
    write_bytes(options.out / "two_models.png", image)
    print(report.table(panels))
    print(f"{record['wall_seconds']:.0f} s; {options.out / 'two_models.json'}, {options.out / 'two_models.png'}")
    return 0


def run(setup: Setup, n_seeds: int, n_workers: int, grid: Sequence[float]) -> list[dict]:
    """Train all models and return one summary per level."""
    levels = [(level, seed) for level in LEVELS for seed in range(n_seeds)]
    arms = [(m, value) for m in METHODS for value in (grid if m in TUNED else (None,))]
    total = len(levels) * (1 + len(arms))
    with tqdm(total=total, unit="run", desc="training A") as bar, Workers(n_workers, bar) as workers:
        trained = workers.map(training.train_a, [(setup, level, seed) for level, seed in levels])
        bar.set_description("training B")
        runs = iter(workers.map(training.train_b, [(setup, a, *arm) for a in trained for arm in arms]))
    by_a = [[next(runs) for _ in arms] for _ in trained]
    panels = []
    for start in range(0, len(levels), n_seeds):
        part = slice(start, start + n_seeds)
        panels.append(report.summarise(setup, trained[part], [r for group in by_a[part] for r in group]))
    return panels


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments.two_models", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder with MNIST's IDX files, gzipped or not; default: scikit-learn's digits")
    add("--iterations", type=positive, default=1500, help="of A (at most) and of B; default: %(default)s")
    add("--grid", type=strength, nargs="+", default=GRID, help="values of alpha * mean(F); default: %(default)s")
    add_common(parser, seeds=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
