"""The README's tables, from the records in ``benchmarks/results``: ``python -m benchmarks readme``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import gpu_report, report
from .experiments import page
from .plumbing.markdown import RESULTS, image

PATH = Path(__file__).parent.parent / "README.md"
UNMEASURED = "GPU speed is unmeasured."


def gpu_record() -> dict[str, Any] | None:
    """Return the last of the records ``gpu_*.json``, if there is one; rehearsals do not count."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]
    return next((record for record in reversed(found) if not record["quick"]), None)


def sections() -> Iterator[tuple[str, list[str]]]:
    """Yield the README's sections: their names and lines."""
    names = ("penalty_cpu", "fisher_cpu", "anchors_cpu", "peers_cpu", "scaling_cpu")
    read = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    of_penalty, of_fisher, of_anchors, of_peers, of_scaling = read
    curves = image("two_models_mnist.png", "Accuracy of A and B while B is trained")
    yield "two_models", [*curves, page.table("levels", ["two_models_mnist"])]
    alphas = image("ewc_digits.png", "Accuracy against alpha, for Fishers estimated in batches of several sizes")
    yield "strength", [*alphas, page.table("strength", ["ewc_digits"])]
    place = f"{of_penalty['hardware']['cpu']}, torch {of_penalty['versions']['torch']}"
    words = f"{place}; medians [quartiles] of interleaved runs, from `python -m benchmarks`."
    yield "speed", [words, "", *report.penalty(of_penalty["penalty"]), "", *report.fisher(of_fisher["fisher"])]
    yield "gpu", [gpu_report.section(gpu_record()) or UNMEASURED]
    sizes = image("penalty_cpu.png", "Time of a penalty against the number of parameters, by number of tensors")
    yield "sweep", [*sizes, *report.sweep(of_penalty["sweep"])]
    yield "anchors", report.anchors(of_anchors["anchors"])
    yield "peers", report.peers(of_peers["peers"])
    grown = image("scaling_cpu.png", "Time and memory against batch size, length, width, classes and samples")
    yield "scaling", [*grown, *report.scaling(of_scaling["scaling"])]


def fill(text: str, section: str, content: str) -> str:
    """Replace what stands between a section's markers.

    Raises:
        ValueError: if the markers are missing.
    """
    begin, end = f"<!-- {section} begin -->", f"<!-- {section} end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the README lacks the markers of {section!r}")
    return "".join((head, begin, "\n", content, "\n", end, tail))


def render() -> str:
    """Return the README with its sections filled in."""
    text = PATH.read_text()
    for name, lines in sections():
        text = fill(text, name, "\n".join(lines))
    return text
