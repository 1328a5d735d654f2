"""What the figures have in common: panels with letters, curves in bands, points that are lost and paid."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...plumbing import plots
from .statistics import deviation


def panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, [rows, columns]."""
    return plots.pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **more)


def letter(axis: Any, index: int, words: str) -> None:
    """Put a letter and a title over a panel."""
    axis.set_title(f"({'abcdefgh'[index]}) {words}", loc="left", fontweight="bold")


def band(axis: Any, x: Any, mean: Any, std: Any, opacity: float = 0.15, **look: Any) -> None:
    """Draw a curve in a band of one standard deviation."""
    mean, std = np.asarray(mean), np.asarray(std)
    (line,) = axis.plot(x, mean, **look)
    axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=opacity, linewidth=0)


def over_runs(curves: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over runs (the first axis)."""
    values = np.asarray(curves, float)
    return values.mean(0), deviation(values)


def balance(
    axis: Any, arms: Mapping[str, Sequence[dict[str, Any]] | None], colours: Sequence[str], words: Sequence[str]
) -> None:
    """Draw two spreads of every arm on one scale in points: the first filled, the second open.

    Args:
        axis: to draw on.
        arms: two spreads by the arm's name; None where it was not run.
        colours: of the arms.
        words: what the two are.
    """
    look = {"fmt": "o", "markersize": 6, "linewidth": 1.1}
    for line, (values, colour) in enumerate(zip(arms.values(), colours, strict=True)):
        for one, at, fill in zip(values or (), (line - 0.16, line + 0.16), (colour, "white"), strict=False):
            axis.errorbar(one["mean"], at, xerr=one["std"], color=colour, markerfacecolor=fill, **look)
    for label, fill in zip(words, (plots.BLACK, "white"), strict=True):
        axis.errorbar([], [], color=plots.BLACK, markerfacecolor=fill, label=label, **look)
    axis.axvline(0, color=plots.BLACK, linewidth=0.8)
    axis.set(yticks=range(len(arms)), yticklabels=list(arms), ylim=(len(arms) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)


def legend(part: Any, axes: Sequence[Any], columns: int) -> None:
    """Put one legend under a figure or a part of it, with each label of some axes once."""
    found: dict[str, Any] = {}
    for axis in axes:
        found |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    part.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)


def png(drawing: Any, title: str, colours: int | None = None) -> bytes:
    """Title a figure, and render it.

    Args:
        drawing: the figure.
        title: over all panels.
        colours: in how many the image is encoded, where a palette saves most of its bytes.
    """
    drawing.suptitle(title, fontsize=11)
    image = plots.png(drawing)
    if colours is None:
        return image
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").quantize(colours).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
