"""Refresh the tables of ``benchmarks/RESULTS.md`` from the records: ``python -m benchmarks.experiments.page``.

The sentences of the page are written by hand. A table stands between two comments, of which the first names the table
and the records that it is made from, in ``benchmarks/results``; tables of several records are put one under the other:

    <!-- table goals: text_search_ptb text_search_help -->
    <!-- end -->

Each experiment's report says which tables there are; ``run`` says of any record where and when it was made.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from ..plumbing.markdown import RESULTS
from .harness.tables import Table

PAGE = RESULTS.parent / "RESULTS.md"
MARKED = re.compile(r"(<!-- table (\w+): ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_RUN_COLUMNS = ("record", "experiment", "seconds", "on", "torch", "commit")


def render(text: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2], found[3].split())}\n{found[4]}", text)


def table(name: str, records: Sequence[str]) -> str:
    """Return a table of some records in markdown."""
    found = [_tables(record)[name] for record in records]
    return Table(found[0].columns, [row for one in found for row in one.rows]).markdown()


def report_of(record: dict[str, Any]) -> Any:
    """Return the module with the tables and figures of a record; those of all searches are the same."""
    package = "search" if record["experiment"].endswith("_search") else record["experiment"]
    return importlib.import_module(f".{package}.report", __package__)


def _tables(name: str) -> dict[str, Table]:
    """Return the tables of a record."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    hardware = record["hardware"]
    place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores"
    seconds, commit = f"{record['wall_seconds']:.0f}", (record["commit"] or "unknown")[:7]
    row = [f"[{name}](results/{name}.json)", record["experiment"], seconds, place, record["versions"]["torch"], commit]
    return {**report_of(record).tables(record), "run": Table(_RUN_COLUMNS, [row])}


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
    sys.exit(0)
