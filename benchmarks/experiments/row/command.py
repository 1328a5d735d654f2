"""The options that both experiments have, the jobs, and what goes into the record."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..harness.options import Grid, add_grids, add_options, positive, sort_grids, strength
from ..harness.runner import Runner
from . import summary
from .arms import Row, Setting, half_decades, settings_of
from .training import Run


def grids(count: int, first: float, l2_first: float, batch_sizes: Sequence[int]) -> dict[str, Grid]:
    """Return the options of what is tried: as many alphas of each penalty, half a decade apart.

    Args:
        count: number of alphas.
        first: log10 of the first one.
        l2_first: that of the L2 anchor's.
        batch_sizes: of the batch-squared F.
    """
    return {
        "grid": (
            half_decades(first, count),
            strength,
            "alphas of the Fishers; times the batch size for the batch-squared F",
        ),
        "l2_grid": (half_decades(l2_first, count), strength, "alphas of the L2 anchor, whose F is 1"),
        "batch_sizes": (tuple(batch_sizes), positive, "of the batch-squared F"),
    }


def add_row(parser: argparse.ArgumentParser, settings: Any, row: Row, tried: dict[str, Grid]) -> None:
    """Add the options of settings, arms and grids."""
    add_options(parser, settings)
    parser.add_argument("--arms", nargs="+", choices=row.arms, default=list(row.arms), help="default: all")
    add_grids(parser, tried)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, row: Row, tried: dict[str, Grid]
) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and one line on bad options."""
    options = parser.parse_args(arguments)
    sort_grids(options, tried)
    options.arms = [arm for arm in row.arms if arm in options.arms]
    if len(options.grid) != len(options.l2_grid):
        parser.error(f"--grid and --l2-grid must have as many values, got {len(options.grid)}, {len(options.l2_grid)}")
    if "none" not in options.arms:
        parser.error("--arms must hold none, which the others are compared with")
    return options


def run_all(
    row: Row,
    setup: Any,
    options: argparse.Namespace,
    runner: Runner,
    function: Callable[[Any], Run],
    starts: Sequence[Any],
    parts: int,
) -> dict[str, Any]:
    """Learn all sequences; return the settings and the summary for the record.

    Args:
        row: what the experiment's tasks are called.
        setup: its settings, a dataclass with ``epochs``.
        options: of its command line.
        runner: of the jobs.
        function: takes a job: the settings, one of ``starts``, the arm and its setting.
        starts: of every seed.
        parts: how many may be frozen.
    """
    arms = [a for a in options.arms if a != "squared"]
    if "squared" in options.arms:
        arms += [f"squared {size}" for size in options.batch_sizes]
    jobs: list[tuple[Any, Any, str, Setting]] = [
        (setup, start, arm, setting)
        for start in starts
        for arm in arms
        for setting in settings_of(arm, options.grid, options.l2_grid, parts)
    ]
    runs = runner.map("sequences", function, jobs)
    tried = {name: getattr(options, name) for name in ("grid", "l2_grid", "batch_sizes")}
    return {
        "settings": {**asdict(setup), "seeds": options.seeds, **tried},
        "arms": summary.summarise(runs, row, setup.epochs),
    }
