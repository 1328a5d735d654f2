"""Figures of records that ``python -m benchmarks`` wrote: ``python -m benchmarks.figures RECORD.json FIGURE.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .plumbing import plots
from .plumbing.markdown import threads
from .plumbing.record import write_bytes

DRAWN = ("peers", "scaling", "sweep")
COLOURS = {
    "wplfast": plots.BLUE,
    "BackPACK": plots.ORANGE,
    "Opacus": plots.GREEN,
    "torch.func": plots.PURPLE,
    "loop": plots.GREY,
}
LABELS = {"torch.func": "torch.func: vmap(grad)", "loop": "one-sample loop"}
LINE = {"marker": "o", "markersize": 2.5, "linewidth": 1.2}
WAYS = {
    "eager": {"color": plots.GREY, "label": "loop over tensors"},
    "cat": {"color": plots.PURPLE, "label": "flat vector (cat)"},
    "compile": {"color": plots.VERMILLION, "label": "torch.compile"},
    "foreach, value": {"color": plots.ORANGE, "label": "foreach"},
    "foreach": {"color": plots.ORANGE, "linestyle": ":", "label": "foreach, gradient alone"},
    "autograd": {"color": plots.SKY, "label": "wplfast: wpl().backward()"},
    "functional": {"color": plots.SKY, "linestyle": ":", "label": "wplfast: functional.wpl_penalty"},
    "add_grad_": {"color": plots.BLUE, "linewidth": 2.2, "label": "wplfast: wpl.add_grad_()"},
    "triad": {
        "color": plots.BLACK,
        "linestyle": "--",
        "linewidth": 1.0,
        "marker": "",
        "label": "triad of 20 bytes a parameter",
    },
}


def draw(record: dict[str, Any]) -> bytes:
    """Draw a record's last run of peers, or else of scaling, or else all runs of the sweep, as a PNG.

    Raises:
        ValueError: if it has none of them.
    """
    torch = f"torch {record['versions']['torch']}"
    for part, drawer in (("peers", _peers), ("scaling", _scaling)):
        if record.get(part):
            run = record[part][-1]
            place = record["hardware"].get("gpu") or f"{record['hardware']['cpu']}, {threads(run['threads'])}"
            return drawer(run["records"], f"{place}, {torch}")
    if record.get("sweep"):
        return _sweep(record["sweep"], f"{record['hardware'].get('gpu') or record['hardware']['cpu']}, {torch}")
    raise ValueError(f"expected a record of {' or '.join(DRAWN)}, found {', '.join(record)}")


def _peers(records: list[dict[str, Any]], place: str) -> bytes:
    """Draw bars for each workload: time over the unit's, and peak memory over the unit's."""
    plt = plots.pyplot()
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    width = 0.8 / len(COLOURS)
    for index, (name, colour) in enumerate(COLOURS.items()):
        for x, record in enumerate(records):
            _bars(above, below, x - 0.4 + (index + 0.5) * width, width, record, name, colour)
        above.bar([0], [0], color=colour, label=LABELS.get(name, name))
    above.bar([0], [0], color="white", edgecolor=plots.BLACK, hatch="////", label="wrong result")
    for axis, words in ((above, "time / unit"), (below, "peak memory / unit's")):
        axis.set(yscale="log", ylabel=words)
        axis.axhline(1, color=plots.BLACK, linewidth=0.8)
        axis.grid(axis="x", visible=False)
    below.set_xticks(range(len(records)), [record["workload"] for record in records])
    figure.legend(loc="outside lower center", ncols=len(COLOURS) + 1, frameon=False)
    figure.suptitle(f"The Fisher of one batch; unit: one ordinary forward and backward pass\n{place}", fontsize=10)
    return plots.png(figure)


def _bars(above: Any, below: Any, x: float, width: float, record: dict, name: str, colour: str) -> None:
    """Draw one contender on one workload, or write why it has no bar."""
    result = record["contenders"][name]
    if "ratio" not in result:
        words = "not installed" if result["error"] == "not installed" else "error"
        above.text(x, 1.1, words, rotation=90, ha="center", va="bottom", fontsize=7, color=colour)
        return
    ratio = result["ratio"]
    look = {"color": colour} if result["right"] else {"color": "white", "edgecolor": colour, "hatch": "////"}
    errors = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
    above.bar(x, ratio["median"], 0.9 * width, yerr=errors, error_kw={"linewidth": 0.8}, **look)
    above.annotate(f"{ratio['median']:.2g}", (x, ratio["q3"]), (0, 2), textcoords="offset points", ha="center", size=7)
    memory = result["peak_bytes"] / record["unit"]["peak_bytes"]
    below.bar(x, memory, 0.9 * width, **look)
    below.annotate(f"{memory:.2g}", (x, memory), (0, 2), textcoords="offset points", ha="center", size=7)


def _scaling(records: list[dict[str, Any]], place: str) -> bytes:
    """Draw a panel for each series: the Fisher pass and the unit, with quartiles and the fitted powers."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for letter, axis, record in zip("abcdef", axes.flat, records, strict=False):
        sizes, timed = [point["size"] for point in record["points"]], "milliseconds" in record["points"][0]
        for name, colour, marker in (("fisher", plots.BLUE, "o"), ("unit", plots.VERMILLION, "s")):
            power = f"$\\mathrm{{{record['name']}}}^{{{record['slopes'][name]:.2f}}}$"
            label = f"{'Fisher pass' if name == 'fisher' else 'unit'}: {power}"
            if timed:
                spreads = [point["milliseconds"][name] for point in record["points"]]
                axis.fill_between(
                    sizes, *([s[q] for s in spreads] for q in ("q1", "q3")), color=colour, alpha=0.2, linewidth=0
                )
                values = [spread["median"] for spread in spreads]
            else:
                values = [point["peak_bytes"][name] / 1e6 for point in record["points"]]
            axis.plot(sizes, values, color=colour, marker=marker, markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel=record["name"], ylabel="ms per batch" if timed else "peak MB")
        if not timed:
            axis.set_ylim(
                bottom=0.5 * min(values), top=2 * max(p["peak_bytes"]["fisher"] for p in record["points"]) / 1e6
            )
        axis.set_title(f"({letter}) {record['shown']}", loc="left", fontsize=8)
        axis.legend(frameon=False)
    for axis in axes.flat[len(records) :]:
        axis.set_axis_off()
    axes.flat[-1].text(
        0, 0.5, "unit: one ordinary forward and\nbackward pass of the same batch\n\n" + place, va="center"
    )
    figure.suptitle("How a Fisher pass grows; powers fitted to the last three points", fontsize=11)
    return plots.png(figure)


def _sweep(runs: list[dict[str, Any]], place: str) -> bytes:
    """Draw a row of panels for each number of threads: time per call over parameters, by number of tensors."""
    plt = plots.pyplot()
    counts = sorted({record["tensors"] for run in runs for record in run["records"]})
    figure, axes = plt.subplots(
        len(runs),
        len(counts),
        figsize=(1 + 2.9 * len(counts), 1.1 + 2.8 * len(runs)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    lines: dict[str, Any] = {}
    for row, run in zip(axes, runs, strict=True):
        for axis, count in zip(row, counts, strict=True):
            records = [record for record in run["records"] if record["tensors"] == count]
            for name, look in WAYS.items():
                points = [r for r in records if name in r["results"]]
                if points:
                    sizes = [r["parameters"] for r in points]
                    times = [r["results"][name]["milliseconds"]["median"] for r in points]
                    lines[name] = axis.plot(sizes, times, **(LINE | look))[0]
            axis.set(
                xscale="log", yscale="log", title=f"{count:,} tensor{'s' * (count > 1)}, {threads(run['threads'])}"
            )
            axis.xaxis.set_major_locator(plt.LogLocator(numticks=10))
        row[0].set_ylabel("ms per call")
    for axis in axes[-1]:
        axis.set_xlabel("parameters")
    chosen = [name for name in WAYS if name in lines]
    figure.legend(
        [lines[name] for name in chosen],
        [WAYS[name]["label"] for name in chosen],
        loc="outside lower center",
        ncols=min(4, len(chosen)),
        frameon=False,
    )
    figure.suptitle(f"The penalty's value and gradient, added to .grad\n{place}", fontsize=10)
    return plots.png(figure)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_bytes(target, draw(json.loads(source.read_text())))
