"""Tables and figures of the README and of the documentation, from the records: ``python -m benchmarks readme``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import distributed_report, gpu_report, report
from .distributed_report import CASES
from .experiments import page
from .plumbing.markdown import RESULTS, image, several

ROOT = Path(__file__).parent.parent
UNMEASURED = "GPU speed is unmeasured."

Lines = list[str]


def record(name: str) -> dict[str, Any]:
    """Read a record."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def gpu_record() -> dict[str, Any] | None:
    """Return the last of the records ``gpu_*.json``, if there is one; rehearsals do not count."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]
    return next((one for one in reversed(found) if not one["quick"]), None)


def tasks(path: Path) -> Lines:
    """Return the figure of a row of tasks."""
    return image("permuted_pixels_digits.png", "Accuracy of each task while the next ones are learnt", path.parent)


def beside(path: Path) -> Lines:
    """Return the short table of speed on one processor, the penalty there, and the passes on the others."""
    found, penalty = record("peers_cpu"), record("penalty_cpu")
    lines: Lines = [*report.beside(found["hardware"]["cpu"], found["peers"], penalty["penalty"]), ""]
    for other in sorted(RESULTS.glob("peers_*.json")):
        if other.stem != "peers_cpu":
            measured = record(other.stem)
            ours = [one["contenders"]["wplfast"]["ratio"]["median"] for one in measured["peers"][-1]["records"]]
            passes = several([f"{ratio:.2g}" for ratio in ours])
            words = (
                f"Ratios depend on the machine's BLAS: on another {measured['hardware']['cpu']}, whose MKL multiplies"
            )
            lines += [words, f"half as fast as oneDNN, these passes took {passes} times an ordinary one."]
    on_gpu = " GPU: [speed](docs/results/speed.md#on-a-gpu)." if gpu_record() else " Neither are GPUs."
    return [*lines, f"Other processors are not measured yet.{on_gpu}"]


def strength(path: Path) -> Lines:
    """Return the figure and the table of what the batch size does to alpha."""
    words = "Accuracy against alpha, for Fishers estimated in batches of several sizes"
    return [*image("ewc_digits.png", words, path.parent), page.table("strength", ["ewc_digits"])]


def speed(path: Path) -> Lines:
    """Return the tables of the penalty and of the Fisher pass."""
    of_penalty, of_fisher = record("penalty_cpu"), record("fisher_cpu")
    words = "medians [quartiles] of interleaved runs, from `python -m benchmarks`"
    lines = [f"{_place(of_penalty)}; {words}.", "", *report.penalty(of_penalty["penalty"]), ""]
    return [*lines, f"{_place(of_fisher)}; {words}.", "", *report.fisher(of_fisher["fisher"])]


def _place(found: dict[str, Any]) -> str:
    """Return where a record was made."""
    return f"{found['hardware']['cpu']}, torch {found['versions']['torch']}"


def gpu(path: Path) -> Lines:
    """Return what was measured on a GPU."""
    return [gpu_report.section(gpu_record()) or UNMEASURED]


def sweep(path: Path) -> Lines:
    """Return the penalty's times by size."""
    words = "Time of a penalty against the number of parameters, by number of tensors"
    return [*image("penalty_cpu.png", words, path.parent), *report.sweep(record("penalty_cpu")["sweep"])]


def anchors(path: Path) -> Lines:
    """Return the tables of several anchors."""
    found = record("anchors_cpu")
    return [f"{_place(found)}.", "", *report.anchors(found["anchors"])]


def peers(path: Path) -> Lines:
    """Return other libraries' times and memory."""
    found = record("peers_cpu")
    return [f"{_place(found)}.", "", *report.peers(found["peers"])]


def scaling(path: Path) -> Lines:
    """Return how a pass grows."""
    words = "Time and memory against batch size, length, width, classes and samples"
    return [*image("scaling_cpu.png", words, path.parent), *report.scaling(record("scaling_cpu")["scaling"])]


def integrations(path: Path) -> Lines:
    """Return what a training step of other packages costs with the callback, and the Fisher of a Trainer's data."""
    found = record("integrations_cpu")
    return [f"{_place(found)}.", "", *report.integrations(found["integrations"])]


def of_ranks(make: Callable[[report.Runs], Lines]) -> Callable[[Path], Lines]:
    """Return the section of a table of several processes, under the table's name."""

    def section(path: Path) -> Lines:
        if not (RESULTS / "distributed_cpu.json").exists():
            return ["Not measured yet."]
        found = record("distributed_cpu")
        return [f"{_place(found)}, ranks on one machine over gloo:", "", *make(found["distributed"])]

    section.__name__ = make.__name__
    return section


#: page -> its sections, which stand between markers of their names
PAGES: dict[str, tuple[Callable[[Path], Lines], ...]] = {
    "README.md": (tasks, beside),
    "docs/how-to/choosing-alpha.md": (strength,),
    "docs/distributed.md": (of_ranks(distributed_report.ddp),),
    "docs/fsdp2.md": tuple(of_ranks(make) for make in (*CASES["fsdp2"], *CASES["end-to-end"])),
    "docs/results/speed.md": (speed, gpu, peers, sweep, anchors, scaling, integrations),
}


def fill(text: str, section: str, content: str) -> str:
    """Replace what stands between a section's markers.

    Raises:
        ValueError: if the markers are missing.
    """
    begin, end = f"<!-- {section} begin -->", f"<!-- {section} end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page lacks the markers of {section!r}")
    return "".join((head, begin, "\n", content, "\n", end, tail))


def render(name: str) -> str:
    """Return a page with its sections filled in."""
    path = ROOT / name
    text = path.read_text()
    for section in PAGES[name]:
        text = fill(text, section.__name__, "\n".join(section(path)))
    return text


def write() -> None:
    """Write all pages."""
    for name in PAGES:
        (ROOT / name).write_text(render(name))
