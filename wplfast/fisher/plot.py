"""``Fisher.plot``: where a model keeps what it knows, in one picture.

Bars on the left say how much of the trace each module holds, beside its share of the elements. On the right is how
large its entries are: as ranges, or, for models whose blocks repeat, as a map with a column for each block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import storage
from .plot_rows import Line, Picture, arranged
from .spread import Spread
from .table import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _GREY, _FAINT = "#1f2933", "#8a94a0", "#e3e7eb"
_BAR, _ELEMENTS, _MEAN = "#1f6f8b", "#b9c2cb", "#d1495b"
_MAP = "YlGnBu"
#: Most characters of a label.
_LABEL = 46


def draw(parts: Sequence[Spread], n_samples: int, path: storage.FilePath | None) -> Figure:
    """Draw what was found about each tensor; see :meth:`wplfast.Fisher.plot`.

    Raises:
        ImportError: if matplotlib is missing.
        OSError: if the file cannot be written.
        ValueError: if there is nothing to draw, or matplotlib draws no such format.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            f'a picture of a Fisher takes matplotlib, which cannot be imported ({error}): pip install "wplfast[plot]"'
        ) from error
    if not any(part.elements for part in parts):
        raise ValueError("there is nothing to draw: the Fisher has no elements")
    for part in parts:
        if not math.isfinite(part.total):
            raise ValueError(f"fisher[{part.name!r}] must be finite to be drawn, its sum is {part.total}")
    picture = arranged(parts)
    n_lines = len(picture.lines)
    body, strip = max(1.2, 0.27 * n_lines), 0.8 if picture.columns else 0.0
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(11, 1.75 + strip + body), dpi=150, facecolor="white", layout=layout)
    _title(figure, picture, n_samples)
    if picture.columns:
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1.35, 0.03), height_ratios=(strip, body))
        shares, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        _blocks(figure.add_subplot(grid[0, 1], sharex=right), picture)
        _cells(right, figure.add_subplot(grid[1, 2]), picture)
    else:
        grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.35))
        shares, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        _ranges(right, picture)
    _shares(shares, picture)
    for axes in (shares, right):
        axes.set_ylim(n_lines - 0.5, -0.5)
    right.tick_params(labelleft=False)
    if path is not None:
        figure.savefig(os.fsdecode(path))
    return figure


def _title(figure: Figure, picture: Picture, n_samples: int) -> None:
    """Say what the picture is of, and what it shows first of all."""
    whole = picture.whole
    counts = f"{_counted(whole.elements, 'element')} in {_counted(whole.tensors, 'tensor')}"
    what = f"Fisher information of {counts}, {_counted(n_samples, 'sample')}"
    top = max((line for line in picture.lines if not line.is_rest), key=lambda line: line.whole.total)
    said = "The trace is 0: no loss depended on these parameters."
    if whole.total:
        of_trace, of_elements = top.whole.total / whole.total, top.whole.elements / whole.elements
        said = f"{top.label} holds {100 * of_trace:.1f} % of the trace, in {100 * of_elements:.1f} % of the elements"
    figure.suptitle(f"{what}\n", x=0.012, ha="left", fontsize=12, color=_INK, fontweight="bold", linespacing=1.5)
    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.40 / height, said, ha="left", va="center", fontsize=9.5, color=_INK)


def _counted(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _style(axes: Any, xlabel: str) -> None:
    """Leave out what is no data."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
    axes.tick_params(axis="x", labelsize=8, color=_GREY, labelcolor=_INK)
    axes.tick_params(axis="x", which="minor", color=_FAINT)
    axes.set_xlabel(xlabel, fontsize=9, color=_INK)
    axes.set_axisbelow(True)


def _shares(axes: Any, picture: Picture) -> None:
    """Draw each module's share of the trace, and of the elements."""
    trace, elements = picture.whole.total, picture.whole.elements
    held = [line.whole.total / trace if trace else 0.0 for line in picture.lines]
    owned = [line.whole.elements / elements for line in picture.lines]
    rows = range(len(held))
    axes.barh(rows, owned, height=0.82, color="none", edgecolor=_ELEMENTS, linewidth=1, label="of the elements")
    axes.barh(rows, held, height=0.5, color=_BAR, label="of the trace")
    widest = max(*held, *owned)
    for row, share in enumerate(held):
        text = "0" if not share else "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
        right = max(share, owned[row]) + 0.015 * widest
        axes.text(right, row, text, va="center", ha="left", fontsize=8, color=_BAR, fontweight="bold")
    axes.set_yticks(rows, [shortened(line.label, _LABEL) for line in picture.lines])
    axes.set_xlim(0, 1.16 * widest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.xaxis.set_major_locator(_ticks(5))
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    _style(axes, "share of what the model knows (trace of F)")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False, borderaxespad=0.2,
        handlelength=1.4, labelcolor=_INK, reverse=True,
    )  # fmt: skip


def _ranges(axes: Any, picture: Picture) -> None:
    """Draw the range of each module's entries on a logarithmic axis."""
    for row, line in enumerate(picture.lines):
        spread = line.quantiles()
        if spread is None:
            axes.text(0.01, row, "all zero", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=_GREY)
            continue
        low, lower, middle, upper, high = spread
        axes.plot([low, high], [row, row], color=_ELEMENTS, linewidth=2, solid_capstyle="round", zorder=1)
        axes.plot([lower, upper], [row, row], color=_BAR, linewidth=6, alpha=0.45, solid_capstyle="butt", zorder=2)
        axes.plot([middle, middle], [row - 0.24, row + 0.24], color=_BAR, linewidth=2, zorder=3)
        axes.plot([line.mean()], [row], "o", color=_MEAN, markersize=5, markeredgecolor="white", zorder=5)
        axes.plot([line.whole.largest], [row], "|", color=_GREY, markersize=8, zorder=4)
        if (zeros := line.zeros()) >= 0.01:
            text = f"{100 * zeros:.0f} % zero"
            axes.text(1, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5, color=_GREY)
    axes.set_xscale("log")
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    _style(axes, "entries of F that are not 0")
    handles = [
        _handle(color=_ELEMENTS, linewidth=2, label="5 to 95 %"),
        _handle(color=_BAR, linewidth=6, alpha=0.45, label="25 to 75 %"),
        _handle(color=_BAR, linewidth=0, marker="|", markersize=9, markeredgewidth=2, label="median"),
        _handle(color=_MEAN, linewidth=0, marker="o", markersize=5, label="mean"),
        _handle(color=_GREY, linewidth=0, marker="|", markersize=8, label="largest"),
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8, frameon=False, borderaxespad=0.2,
        handlelength=1.4, columnspacing=1.2, labelcolor=_INK,
    )  # fmt: skip


def _handle(**style: Any) -> Any:
    """Return a line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _cells(axes: Any, legend: Any, picture: Picture) -> None:
    """Draw the mean entry of each module in each block, as colours."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    means = [cell.mean for line in picture.lines for cell in _of(line) if cell.mean > 0 and math.isfinite(cell.mean)]
    norm = LogNorm(min(means), max(max(means), min(means) * 1.01)) if means else LogNorm(1e-9, 1)
    colours = colormaps[_MAP]
    n_columns = len(picture.columns)
    gap = 0.04 if n_columns <= 24 else 0.0

    def cell(row: int, left: float, width: float, spread: Spread) -> None:
        colour = colours(norm(spread.mean)) if spread.mean > 0 else "#f4f5f6"
        axes.add_patch(Rectangle((left, row - 0.44), width, 0.88, facecolor=colour, linewidth=0, antialiased=False))

    for row, line in enumerate(picture.lines):
        if not line.cells:
            cell(row, -0.5, n_columns, line.whole)
            dark = line.whole.mean > 0 and norm(line.whole.mean) > 0.55
            text = f"mean {line.whole.mean:.1e}" if line.whole.mean > 0 else "all zero"
            colour = "white" if dark else _INK
            axes.text((n_columns - 1) / 2, row, text, va="center", ha="center", fontsize=7.5, color=colour)
        for column, spread in line.cells.items():
            cell(row, picture.columns.index(column) - 0.5 + gap, 1 - 2 * gap, spread)
    axes.set_xlim(-0.5, n_columns - 0.5)
    step = math.ceil(n_columns / 24)
    shown = range(0, n_columns, step)
    axes.set_xticks(shown, [str(picture.columns[i]) for i in shown])
    _style(axes, "block (the * of a name)")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), cax=legend)
    bar.outline.set_visible(False)
    legend.tick_params(labelsize=8, color=_GREY, labelcolor=_INK)
    legend.tick_params(which="minor", color=_FAINT)
    bar.set_label("mean entry of F", fontsize=9, color=_INK)


def _of(line: Line) -> list[Spread]:
    """Return what a line shows as cells."""
    return list(line.cells.values()) or [line.whole]


def _blocks(axes: Any, picture: Picture) -> None:
    """Draw each block's share of the trace above its column."""
    trace = picture.whole.total
    shares = [
        sum(line.cells[c].total for line in picture.lines if c in line.cells) / trace if trace else 0.0
        for c in picture.columns
    ]
    axes.bar(range(len(shares)), shares, width=0.8, color=_BAR)
    axes.set_ylim(0, 1.25 * max(*shares, 1e-12))
    if len(shares) <= 16:
        for column, share in enumerate(shares):
            axes.text(column, share, f"{100 * share:.1f} %", ha="center", va="bottom", fontsize=7, color=_INK)
    _style(axes, "")
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.set_title("share of the trace by block", fontsize=9, color=_INK, loc="left")


def _ticks(most: int) -> Any:
    """Return a locator of few round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10])
