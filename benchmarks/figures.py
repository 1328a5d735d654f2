"""Figures of records that ``python -m benchmarks`` wrote: ``python -m benchmarks.figures RECORD.json FIGURE.png``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .plumbing import plots
from .plumbing.markdown import threads
from .plumbing.record import write_bytes

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
PASSES = {
    "fisher": {"color": plots.BLUE, "label": "Fisher pass"},
    "unit": {"color": plots.VERMILLION, "label": "ordinary forward and backward pass"},
}

MEMORY = "peak MB"

Lines = dict[str, tuple[Sequence[float], Sequence[float]]]  # name of a look -> sizes and values
Panel = tuple[str, str, str, Lines]  # title, label of the sizes, label of the values, lines


def draw(record: dict[str, Any]) -> bytes:
    """Draw a record's scaling, or else its sweep, as a PNG.

    Raises:
        ValueError: if it has neither.
    """
    plt = plots.pyplot()
    for part, (title, columns, looks, panels) in DRAWN.items():
        if not record.get(part):
            continue
        found = list(panels(record[part]))
        rows = -(-len(found) // columns)
        size = (1 + 2.9 * columns, 1.1 + 2.8 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        legend: dict[str, Any] = {}
        for axis, (name, xlabel, ylabel, lines) in zip(axes.flat, found, strict=False):
            for key, (sizes, values) in lines.items():
                look = {"marker": "o", "markersize": 2.5, "linewidth": 1.2} | looks[key]
                legend[looks[key]["label"]] = axis.plot(sizes, values, **look)[0]
            axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
            _ticks(axis.xaxis)
            if ylabel == MEMORY:  # what is to be seen is that it does not grow
                axis.set_ylim(0, 1.25 * max(value for _, values in lines.values() for value in values))
            else:
                axis.set_yscale("log")
                _ticks(axis.yaxis)
            axis.set_title(name, fontsize=8)
        for axis in axes.flat[len(found) :]:
            axis.set_axis_off()
        if len(found) < axes.size:  # an empty place at the end is the legend's
            axes.flat[-1].legend(legend.values(), legend, loc="center", frameon=False)
        else:
            figure.legend(legend.values(), legend, loc="outside lower center", ncols=min(4, len(legend)), frameon=False)
        place = f"{record['hardware'].get('gpu') or record['hardware']['cpu']}, torch {record['versions']['torch']}"
        figure.suptitle(f"{title}\n{place}", fontsize=10)
        return plots.png(figure)
    raise ValueError(f"expected a record of {' or '.join(DRAWN)}, found {', '.join(record)}")


def _ticks(axis: Any) -> None:
    """Label an axis of less than three decades at 1, 2 and 5 in each, in plain numbers; a longer one is left alone."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:,g}"))
        axis.set_minor_formatter(ticker.NullFormatter())


def scaling(runs: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    """Yield a panel for each series of the last run."""
    for r in runs[-1]["records"]:
        points, sizes = r["points"], [point["size"] for point in r["points"]]
        if timed := "milliseconds" in points[0]:
            lines = {way: (sizes, [p["milliseconds"][way]["median"] for p in points]) for way in PASSES}
        else:
            lines = {way: (sizes, [p["peak_bytes"][way] / 1e6 for p in points]) for way in PASSES}
        fisher, unit = (round(r["slopes"][way], 2) + 0.0 for way in PASSES)  # 0.0: no -0
        powers = f"power of {r['name']}: Fisher pass {fisher:.2f}, ordinary {unit:.2f}"
        yield f"{r['shown']}\n{powers}", r["name"], "ms per batch" if timed else MEMORY, lines


def sweep(runs: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    """Yield a panel for each number of threads and of tensors: time per call over parameters."""
    for run in runs:
        for count in sorted({r["tensors"] for r in run["records"]}):
            lines: Lines = {}
            for way in WAYS:
                found = [r for r in run["records"] if r["tensors"] == count and way in r["results"]]
                times = [r["results"][way]["milliseconds"]["median"] for r in found]
                lines[way] = ([r["parameters"] for r in found], times)
            title = f"{count:,} tensor{'s' * (count > 1)}, {threads(run['threads'])}"
            yield title, "parameters", "ms per call", {way: line for way, line in lines.items() if line[0]}


DRAWN: dict[str, tuple[str, int, dict[str, Any], Callable[..., Iterator[Panel]]]] = {
    "scaling": (
        "How a Fisher pass grows, and an ordinary one; powers are fitted to the last three points",
        3,
        PASSES,
        scaling,
    ),
    "sweep": ("The penalty's value and gradient, added to .grad", 4, WAYS, sweep),
}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_bytes(target, draw(json.loads(source.read_text())))
