"""Figures of records that ``python -m benchmarks`` wrote: ``python -m benchmarks.figures RECORD.json FIGURE.png``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .plumbing import plots
from .plumbing.markdown import threads
from .plumbing.record import write_bytes

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
    "triad": {"color": plots.BLACK, "linestyle": "--", "marker": "", "label": "triad of 20 bytes a parameter"},
}

Runs = list[dict[str, Any]]


def draw(record: dict[str, Any]) -> bytes:
    """Draw a record's scaling, or else its sweep, as a PNG.

    Raises:
        ValueError: if it has neither.
    """
    place = f"{record['hardware'].get('gpu') or record['hardware']['cpu']}, torch {record['versions']['torch']}"
    for part, drawer in DRAWERS.items():
        if record.get(part):
            return drawer(record[part], place)
    raise ValueError(f"expected a record of {' or '.join(DRAWERS)}, found {', '.join(record)}")


def scaling(runs: Runs, place: str) -> bytes:
    """Draw a panel for each series of the last run: the Fisher pass and the unit, with quartiles and fitted powers."""
    plt, run = plots.pyplot(), runs[-1]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for letter, axis, record in zip("abcdef", axes.flat, run["records"], strict=False):
        sizes, timed = [point["size"] for point in record["points"]], "milliseconds" in record["points"][0]
        for name, colour, marker in (("fisher", plots.BLUE, "o"), ("unit", plots.VERMILLION, "s")):
            power = f"$\\mathrm{{{record['name']}}}^{{{record['slopes'][name]:.2f}}}$"
            label = f"{'Fisher pass' if name == 'fisher' else 'unit'}: {power}"
            if timed:
                spreads = [point["milliseconds"][name] for point in record["points"]]
                quartiles = ([s[q] for s in spreads] for q in ("q1", "q3"))
                axis.fill_between(sizes, *quartiles, color=colour, alpha=0.2, linewidth=0)
                values = [spread["median"] for spread in spreads]
            else:
                values = [point["peak_bytes"][name] / 1e6 for point in record["points"]]
            axis.plot(sizes, values, color=colour, marker=marker, markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel=record["name"], ylabel="ms per batch" if timed else "peak MB")
        if not timed:
            largest = max(point["peak_bytes"]["fisher"] for point in record["points"]) / 1e6
            axis.set_ylim(0.5 * min(values), 2 * largest)
        axis.set_title(f"({letter}) {record['shown']}", loc="left", fontsize=8)
        axis.legend(frameon=False)
    axes.flat[-1].set_axis_off()
    words = f"unit: one ordinary forward and\nbackward pass of the same batch\n\n{place}, {threads(run['threads'])}"
    axes.flat[-1].text(0, 0.5, words, va="center")
    figure.suptitle("How a Fisher pass grows; powers fitted to the last three points", fontsize=11)
    return plots.png(figure)


def sweep(runs: Runs, place: str) -> bytes:
    """Draw a row of panels for each number of threads: time per call over parameters, by number of tensors."""
    plt = plots.pyplot()
    counts = sorted({record["tensors"] for run in runs for record in run["records"]})
    size = (1 + 2.9 * len(counts), 1.1 + 2.8 * len(runs))
    shape = {"nrows": len(runs), "ncols": len(counts), "squeeze": False, "sharex": True, "sharey": True}
    figure, axes = plt.subplots(figsize=size, layout="constrained", **shape)
    lines: dict[str, Any] = {}
    for row, run in zip(axes, runs, strict=True):
        for axis, count in zip(row, counts, strict=True):
            records = [record for record in run["records"] if record["tensors"] == count]
            for name, look in WAYS.items():
                points = [r for r in records if name in r["results"]]
                if points:
                    sizes = [r["parameters"] for r in points]
                    times = [r["results"][name]["milliseconds"]["median"] for r in points]
                    lines[look["label"]] = axis.plot(sizes, times, **(LINE | look))[0]
            title = f"{count:,} tensor{'s' * (count > 1)}, {threads(run['threads'])}"
            axis.set(xscale="log", yscale="log", title=title, xlabel="parameters")
            axis.xaxis.set_major_locator(plt.LogLocator(numticks=10))
            axis.label_outer()
        row[0].set_ylabel("ms per call")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    figure.suptitle(f"The penalty's value and gradient, added to .grad\n{place}", fontsize=10)
    return plots.png(figure)


DRAWERS: dict[str, Callable[[Runs, str], bytes]] = {"scaling": scaling, "sweep": sweep}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_bytes(target, draw(json.loads(source.read_text())))
