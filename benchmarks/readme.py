"""Write the README's result sections from the records in ``benchmarks/results``: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .experiments import page
from .plumbing import gpu_report, penalty_report
from .plumbing.markdown import RESULTS, image, threads

ROOT = Path(__file__).parent.parent
CURVES = "Accuracy of A and B while B is trained"
PEERS = {"torch.func": "`torch.func`: `vmap(grad)`", "loop": "one-sample loop"}


def strength(record: dict[str, Any] | None) -> str:
    """Render which alpha is good with which Fisher."""
    if record is None:
        return ""
    seeds = record["settings"]["seeds"]
    lines = image("ewc_digits.png", "Accuracy against alpha, for Fishers estimated in batches of several sizes")
    lines += [
        f"EWC between two tasks on {record['data']['name']}, {seeds} seeds, `python -m benchmarks.experiments.ewc` "
        "([more](benchmarks/RESULTS.md)):",
        "",
        page.table("strength", ["ewc_digits"]),
    ]
    return "\n".join(lines)


def speed(penalty: dict[str, Any], fisher: dict[str, Any], on_gpu: bool = False) -> str:
    """Render the microbenchmarks; ``on_gpu``: a GPU was measured too, and has a section of its own."""
    place = f"{penalty['hardware']['cpu']}, torch {penalty['versions']['torch']}"
    lines = [
        f"{place}; medians [quartiles] of interleaved runs, from `python -m benchmarks`."
        + ("" if on_gpu else " GPU speed is unmeasured."),
        "",
    ]
    lines += penalty_report.cases(penalty)
    counts = [run["threads"] for run in fisher["fisher"]]
    heads = [f"{what}, {threads(count)}" for what in ("pass", "whole call") for count in counts]
    lines += [
        "",
        "| Fisher / ordinary forward and backward | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for records in zip(*(run["records"] for run in fisher["fisher"]), strict=True):
        cells = [_ratio(record) for record in records] + [_whole(record["whole"]) for record in records]
        lines.append(f"| {records[0]['shown']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "A pass is a steady batch; a whole call is `fisher_diagonal` over 32 batches, verification included. Ratios "
        "fall below 1 because no weight gradients are computed, and because oneDNN, which the pass multiplies with, is "
        "twice as fast on this processor as the MKL behind PyTorch's float32 products. (\\*: within a cap on time "
        "fewer than 30 pairs, or whole calls of fewer batches, from which 32 are projected.)",
    ]
    return "\n".join(lines)


def peers(record: dict[str, Any] | None) -> str:
    """Render the comparison with other libraries, or nothing where it has not been recorded."""
    if not (record and record.get("peers")):
        return ""
    names = list(record["peers"][0]["records"][0]["contenders"])
    versions = ", ".join(f"{package} {record['versions'][package]}" for package in ("backpack-for-pytorch", "opacus"))
    lines = image("peers_cpu.png", "Time and peak memory of libraries that compute the same Fisher")
    lines += [
        "The Fisher of one batch with libraries that give per-sample gradients, each at the fastest of its settings "
        "that is right, in one interleaved run: time over that of one ordinary forward and backward pass, median "
        f"[quartiles], and peak memory ({versions}; `python -m benchmarks fisher --peers`).",
        "",
        "| | " + " | ".join(PEERS.get(name, name) for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for run in record["peers"]:
        for row in run["records"]:
            cells = [_peer(row["contenders"][name]) for name in names]
            lines.append(f"| {row['shown']}, {threads(run['threads'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _peer(result: dict[str, Any]) -> str:
    """Render one contender on one workload."""
    if "ratio" not in result:
        return "not installed" if result["error"] == "not installed" else f"fails: {result['error'].partition(': ')[2]}"
    ratio = result["ratio"]
    wrong = "" if result["right"] else f", **wrong** by {result['relative_error']:.1g}"
    memory = f"{result['peak_bytes'] / 1e6:,.3g} MB"
    return f"{ratio['median']:.3g} [{ratio['q1']:.3g}, {ratio['q3']:.3g}], {memory}{wrong}"


def scaling(record: dict[str, Any] | None) -> str:
    """Render the powers that times and memory grow with, or nothing where they have not been recorded."""
    if not (record and record.get("scaling")):
        return ""
    run = record["scaling"][-1]
    lines = image("scaling_cpu.png", "Time and memory against batch size, length, width, classes and samples")
    lines += [
        f"How a pass grows, fitted to the largest three sizes ({threads(run['threads'])}; "
        "`python -m benchmarks scaling`):",
        "",
        "| | sizes | Fisher pass | ordinary pass |",
        "|---|---|---|---|",
    ]
    for row in run["records"]:
        kind = "time" if "milliseconds" in row["points"][0] else "peak memory"
        powers = [f"{row['name']}^{round(row['slopes'][name], 2) + 0.0:.2f}" for name in ("fisher", "unit")]
        sizes = f"{row['points'][0]['size']:,} to {row['points'][-1]['size']:,}"
        lines.append(f"| {kind}, {row['shown']} | {sizes} | {powers[0]} | {powers[1]} |")
    return "\n".join(lines)


def _ratio(record: dict[str, Any]) -> str:
    """Render a ratio to the unit."""
    ratio = record["ratio"]
    mark = "\\*" if record["pairs"] < 30 else ""
    return f"{ratio['median']:.3g} [{ratio['q1']:.3g}, {ratio['q3']:.3g}]{mark}"


def _whole(record: dict[str, Any]) -> str:
    """Render the ratio of whole calls."""
    ratio = record["ratio"]
    if record["capped"]:
        return f"{record['projected_ratio']:.3g}\\*"
    return f"{ratio['median']:.3g} [{ratio['q1']:.3g}, {ratio['q3']:.3g}]"


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
    return "".join((head, begin, "\n", content, "\n" if content else "", end, tail))


def render() -> str:
    """Return the README with its sections filled in."""
    record = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES}
    text = (ROOT / "README.md").read_text()
    forgetting = [*image("two_models_mnist.png", CURVES), page.table("levels", ["two_models_mnist"])]
    text = fill(text, "two_models", "\n".join(forgetting))
    text = fill(text, "strength", strength(_optional("ewc_digits")))
    on_gpu = gpu_record()
    text = fill(text, "speed", speed(record["penalty_cpu"], record["fisher_cpu"], on_gpu is not None))
    text = fill(text, "gpu", gpu_report.section(on_gpu))
    text = fill(text, "sweep", penalty_report.sweep(record["penalty_cpu"]))
    text = fill(text, "anchors", penalty_report.anchors(_optional("anchors_cpu")))
    text = fill(text, "peers", peers(_optional("peers_cpu") or record["fisher_cpu"]))
    return fill(text, "scaling", scaling(_optional("scaling_cpu")))


def gpu_record() -> dict[str, Any] | None:
    """Return the last of the records ``gpu_*.json``, if there is one; rehearsals do not count."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]
    return next((record for record in reversed(found) if not record["quick"]), None)


def _optional(name: str) -> dict[str, Any] | None:
    """Read a record that need not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


NAMES = ("penalty_cpu", "fisher_cpu")


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render())
    sys.exit(0)
