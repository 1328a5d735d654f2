"""Two models that share layers, trained one after the other: what A forgets, without and with the penalty.

Model A (4 layers) and model B (6 layers) share their first 3 layers. A is trained to a level, its Fisher estimated,
then B is trained on the same data, once per method: no penalty, WPL, WPL with the batch-squared Fisher, an L2 anchor,
frozen layers. Each penalty gets its own best alpha from one grid of alpha * mean(F), chosen on a validation split.

    python -m benchmarks.two_models                       # the digits that scikit-learn ships
    python -m benchmarks.two_models --data DIR --seeds 5  # MNIST's IDX files

Writes two_models.json and two_models.png; prints a table. Setting: that of arXiv:1902.08232, section on MNIST.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .plumbing import forgetting, forgetting_report
from .plumbing.data import DataError, load_split
from .plumbing.forgetting import METHODS, TUNED, Setup
from .plumbing.record import environment, write_bytes, write_json
from .plumbing.workers import Workers, default_count

LEVELS = (None, 0.56, 0.435, 0.36)  # A's accuracy in the paper's panels; None: to convergence
GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # alpha * mean(F)


class DeviceError(ValueError):
    """The device is not here; the message is one line for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    options = _parse(arguments)
    try:
        _check_device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
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
    image = forgetting_report.figure(panels, f"{data}, {options.seeds} seed{'s' * (options.seeds > 1)}")
    write_json(options.out / "two_models.json", record)
    write_bytes(options.out / "two_models.png", image)
    print(forgetting_report.table(panels))
    print(f"{record['wall_seconds']:.0f} s; {options.out / 'two_models.json'}, {options.out / 'two_models.png'}")
    return 0


def run(setup: Setup, n_seeds: int, n_workers: int, grid: Sequence[float]) -> list[dict]:
    """Train all models and return one summary per level."""
    levels = [(level, seed) for level in LEVELS for seed in range(n_seeds)]
    arms = [(m, strength) for m in METHODS for strength in (grid if m in TUNED else (None,))]
    total = len(levels) * (1 + len(arms))
    with tqdm(total=total, unit="run", desc="training A") as bar, Workers(n_workers, bar) as workers:
        trained = workers.map(forgetting.train_a, [(setup, level, seed) for level, seed in levels])
        bar.set_description("training B")
        runs = iter(workers.map(forgetting.train_b, [(setup, a, *arm) for a in trained for arm in arms]))
    by_a = [[next(runs) for _ in arms] for _ in trained]
    panels = []
    for start in range(0, len(levels), n_seeds):
        part = slice(start, start + n_seeds)
        panels.append(forgetting_report.summarise(setup, trained[part], [r for group in by_a[part] for r in group]))
    return panels


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    parser = argparse.ArgumentParser(prog="benchmarks.two_models", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder with MNIST's IDX files, gzipped or not; default: scikit-learn's digits")
    add("--seeds", type=_positive, default=3, metavar="N", help="seeds 0 to N - 1; default: %(default)s")
    add("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where results go; default: %(default)s")
    add("--iterations", type=_positive, default=1500, help="of A (at most) and of B; default: %(default)s")
    add("--grid", type=_strength, nargs="+", default=GRID, help="values of alpha * mean(F); default: %(default)s")
    add("--workers", type=_count, help="processes; 0: none; default: one per core, 0 on a GPU")
    options = parser.parse_args(arguments)
    if options.workers is None:
        options.workers = default_count(options.device)
    return options


def _check_device(name: str) -> None:
    """Check that a device can be used, before anything long begins."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"--device must be cpu or cuda[:index], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device must be cpu or cuda[:index], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")


def _positive(text: str) -> int:
    """Convert to an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _count(text: str) -> int:
    """Convert to an integer of at least 0."""
    return _positive(text) if int(text) else 0


def _strength(text: str) -> float:
    """Convert to a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected finite numbers above 0, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
