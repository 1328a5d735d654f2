"""One experiment's command: check what was asked for, run it, write the record, draw the figures, print the tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...plumbing.record import environment, write_bytes, write_json
from ..data.digits import DataError
from .options import OptionError, check
from .runner import Runner
from .tables import Table

#: What a run leaves behind, as JSON; tables and figures are made from it alone.
Record = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What the command needs to know of an experiment."""

    name: str  # of its package, its record and its figures
    #: makes settings of the options, and what the record says of the data; DataError or OptionError: it could not run
    prepare: Callable[[argparse.Namespace], tuple[Any, dict[str, Any]]]
    #: runs jobs for settings, and returns what goes into the record beside where and when it ran
    run: Callable[[Any, argparse.Namespace, Runner], Record]
    tables: Callable[[Record], dict[str, Table]]  # makes named tables from a record
    figures: Callable[[Record], dict[str, bytes]]  # makes PNG images, by what their names have behind the experiment's
    notes: str  # say what the numbers in the tables are
    printed: tuple[str, ...] | None = None  # names of the tables that the command prints; None: all


def main(experiment: Experiment, options: argparse.Namespace) -> int:
    """Run an experiment and write its results; return the exit code."""
    try:
        check(options)
        settings, data = experiment.prepare(options)
    except (DataError, OptionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place, started = environment(options.device), time.perf_counter()
    kept = options.out / "runs" if options.resume else None
    with Runner(options.workers, kept, f"{experiment.name} {place['versions']} {place['commit']}") as runner:
        results = experiment.run(settings, options, runner)
    seconds = round(time.perf_counter() - started, 1)
    record = {"experiment": experiment.name, "data": data, **place, "workers": options.workers}
    record |= {"resumed": options.resume, "wall_seconds": seconds, **results}
    images = {f"{experiment.name}{part}.png": image for part, image in experiment.figures(record).items()}
    write_json(options.out / f"{experiment.name}.json", record)
    for name, image in images.items():
        write_bytes(options.out / name, image)
    print(text(experiment, record))
    files = ", ".join(str(options.out / name) for name in (f"{experiment.name}.json", *images))
    print(f"{seconds:.0f} s; {files}")
    return 0


def text(experiment: Experiment, record: Record) -> str:
    """Return what the command prints of a record."""
    tables = experiment.tables(record)
    shown = (tables[name] for name in experiment.printed or tables)
    return "\n\n".join([*(table.text() for table in shown), experiment.notes])
