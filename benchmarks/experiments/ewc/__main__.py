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
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from tqdm.auto import tqdm

from ...plumbing.data import DataError, load_split
from ...plumbing.options import DeviceError, add_common, positive, resolve, share, strength
from ...plumbing.record import environment, write_bytes, write_json
from ...plumbing.workers import Workers
from . import report, summary, sweep, training
from .fishers import KINDS
from .scenarios import SCENARIOS, Setup, tasks
from .training import TUNED

GRID = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
L2_GRID = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3)  # where F = 1, not about 1e-4
SWEEP_GRID = tuple(float(f"{10 ** (half / 2):.3g}") for half in range(2, 17))  # 10 to 1e8, two a decade
BATCH_SIZES = (1, 8, 64, 512)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    options = _parse(arguments)
    setup = Setup(**{field.name: getattr(options, field.name) for field in fields(Setup)})
    try:
        resolve(options)
        sizes = load_split(options.data, 0).sizes
        for seed in range(options.seeds):
            tasks(setup, "split5", seed)
    except (DataError, DeviceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place, started = environment(options.device), time.perf_counter()
    results = run(setup, options)
    grids = {"grid": options.grid, "l2_grid": options.l2_grid, "sweep_grid": options.sweep_grid}
    record = {
        "experiment": "ewc",
        "data": {"name": "scikit-learn digits" if options.data is None else "MNIST", **sizes},
        **place,
        "settings": {
            **asdict(setup),
            "data": "scikit-learn digits" if options.data is None else "MNIST",
            "seeds": options.seeds,
            **grids,
            "batch_sizes": options.batch_sizes,
            "fisher_batch": training.FISHER_BATCH,
        },
        "workers": options.workers,
        "wall_seconds": round(time.perf_counter() - started, 1),
        **results,
    }
    images = {"ewc.png": report.figure(record), "ewc_tasks.png": report.tasks_figure(record)}
    write_json(options.out / "ewc.json", record)
    for name, image in images.items():
        write_bytes(options.out / name, image)
    print(report.table(record))
    print(f"{record['wall_seconds']:.0f} s; {', '.join(str(options.out / name) for name in ('ewc.json', *images))}")
    return 0


def run(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Learn all sequences and sweeps and return their summaries."""
    seeds = range(options.seeds)
    grids = {"ewc": options.grid, "online": options.grid, "l2": options.l2_grid}
    sequences = [
        (setup, scenario, seed, arm, alpha)
        for scenario in SCENARIOS
        for seed in seeds
        for arm in training.arms(len(tasks(setup, scenario, 0)))
        for alpha in (grids[arm] if arm in TUNED else (None,))
    ]
    kinds = sweep.curves(options.batch_sizes)
    sweeps = [
        (setup, name, seed, *kind, options.sweep_grid) for name in sweep.SWEPT for seed in seeds for kind in kinds
    ]
    with (
        tqdm(total=len(sequences) + len(sweeps), unit="run", desc="tasks") as bar,
        Workers(options.workers, bar) as workers,
    ):
        learnt = workers.map(training.run, sequences)
        bar.set_description("sweep")
        swept = workers.map(sweep.sweep, sweeps)
    return {
        "scenarios": {
            name: summary.summarise(name, [run for run in learnt if run.scenario == name]) for name in SCENARIOS
        },
        "sweep": {
            name: sweep.summarise([run for run in swept if run.scenario == name], options.sweep_grid)
            for name in sweep.SWEPT
        },
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments.ewc", description=__doc__.split("\n", 1)[0])
    add, default = parser.add_argument, Setup()
    add("--data", metavar="DIR", help="folder with MNIST's IDX files, gzipped or not; default: scikit-learn's digits")
    add("--hidden", type=positive, default=default.hidden, help="width of hidden layers; default: %(default)s")
    add("--layers", type=positive, default=default.layers, help="hidden layers; default: %(default)s")
    add("--permutations", type=_several, default=default.permutations, help="permuted tasks; default: %(default)s")
    add("--iterations", type=positive, default=default.iterations, help="of each task; default: %(default)s")
    add("--batch-size", type=positive, default=default.batch_size, help="of training; default: %(default)s")
    add("--lr", type=strength, default=default.lr, help="Adam's rate, falling to 0 in each task; default: %(default)s")
    add("--gamma", type=share, default=default.gamma, help="what online EWC keeps of F; default: %(default)s")
    types = [kind for kind in KINDS if kind != "squared"]
    add("--fisher-type", choices=types, default=default.fisher_type, help="of the arms; default: %(default)s")
    add("--fisher-samples", type=positive, default=default.fisher_samples, help="of the sweep; default: %(default)s")
    add("--batch-sizes", type=positive, nargs="+", default=BATCH_SIZES, help="of the sweep's F; default: %(default)s")
    add("--grid", type=strength, nargs="+", default=GRID, help="alphas of both EWC arms; default: %(default)s")
    add("--l2-grid", type=strength, nargs="+", default=L2_GRID, help="alphas of the L2 arm; default: %(default)s")
    add("--sweep-grid", type=strength, nargs="+", default=SWEEP_GRID, help="default: %(default)s")
    add_common(parser, seeds=5)
    options = parser.parse_args(arguments)
    for name in ("grid", "l2_grid", "sweep_grid", "batch_sizes"):
        setattr(options, name, sorted(set(getattr(options, name))))
    if len(options.grid) != len(options.l2_grid):
        parser.error(f"--grid and --l2-grid must have as many values, got {len(options.grid)}, {len(options.l2_grid)}")
    if len(options.sweep_grid) < 2 or len(options.batch_sizes) < 2:
        parser.error("--sweep-grid and --batch-sizes must have at least 2 values each")
    return options


def _several(text: str) -> int:
    """Convert to an integer of at least 2."""
    if (value := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
