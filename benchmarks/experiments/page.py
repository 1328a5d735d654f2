"""Write the page of results from the experiments' records: ``python -m benchmarks.experiments.page``."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from ..plumbing.markdown import RESULTS
from .overview import overview

PAGE = RESULTS.parent / "RESULTS.md"
#: An experiment's package, its title, and the records of it, where they exist, with what sets one apart from the others
#: on the same data.
SECTIONS = (
    ("two_models", "Two models that share layers", {"two_models_mnist": "", "two_models_digits": ""}),
    ("ewc", "EWC beside WPL", {"ewc_mnist": "", "ewc_digits": ""}),
    (
        "text_search",
        "Architecture search on text",
        {
            "text_search_ptb": "",
            "text_search_ptb_strong": "a stronger penalty",
            "text_search_help": "",
            "text_search_help_strong": "a stronger penalty",
            "text_search_help_used": "the penalty on all weights in use",
            "text_search_help_norm": "the cells' outputs normalised",
        },
    ),
    (
        "image_search",
        "Architecture search on images",
        {
            "image_search_mnist": "",
            "image_search_digits": "",
            "image_search_digits_cells": "the penalty on the cells' weights alone",
        },
    ),
    ("fine_tuning", "Incremental fine-tuning", {"fine_tuning_mnist": "", "fine_tuning_digits": ""}),
)
HEAD = """# What the experiments gave

Made from the records in [results](results) by `python -m benchmarks.experiments.page`. Every experiment is one command,
`python -m benchmarks.experiments.NAME`; `--help` lists its options, among them the papers' sizes. All figures are
reported as they came out, at one seed list, and every grid and choice is in the record. Some runs shared their machine
with other work: wall times and milliseconds may be too long, ratios within a run hold.
"""


def render() -> str:
    """Return the page."""
    names = [name for _, _, named in SECTIONS for name in named]
    records = {name: record for name in names if (record := _read(name)) is not None}
    parts = [HEAD, *overview(records)]
    for package, title, named in SECTIONS:
        if not named.keys() & records.keys():
            continue
        report = importlib.import_module(f".{package}.report", __package__)
        parts.append(f"## {title}\n")
        for name, part in named.items():
            if name in records:
                parts.append(_section(name, part, records[name], report.markdown(records[name])))
    return "\n".join(parts)


def _section(name: str, part: str, record: dict[str, Any], text: str) -> str:
    """Return one record's section, with its figure and where it ran."""
    title = f"{record['data']['name']}: {part}" if part else record["data"]["name"]
    hardware, versions = record["hardware"], record["versions"]
    place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores"
    commit = (record["commit"] or "unknown")[:7]
    text = text.partition("\n\n")[2] if text.startswith("### ") else text  # the title is here
    lines = [f"### {title}", ""]
    if (RESULTS / f"{name}.png").exists():
        lines += [f"![{record['experiment']} on {title}](results/{name}.png)", ""]
    lines += [text, "", f"{record['wall_seconds']:.0f} s on {place}; torch {versions['torch']}; commit {commit}; "]
    lines[-1] += f"[record](results/{name}.json).\n"
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any] | None:
    """Read a record, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    PAGE.write_text(render())
    sys.exit(0)
