"""The figure of a GPU's record: the Fisher kernel beside cuBLAS, the penalty beside a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import plots
from .gpu_report import KERNELS, LEAST, place_of

COLOURS = dict(zip(KERNELS, (plots.SKY, plots.GREEN, plots.BLUE), strict=True))
CONTRACT = 0.9  # share of the copy's bandwidth


def draw(record: Mapping[str, Any]) -> bytes:
    """Draw shares of cuBLAS's rate and of the copy's bandwidth as a PNG."""
    plt = plots.pyplot()
    kernels = record["parts"].get("linear", {}).get("cases", {})
    penalty = {k: r for k, r in record["parts"].get("penalty", {}).get("cases", {}).items() if r["parameters"] >= LEAST}
    height = 1.6 + 0.24 * max(len(kernels), 1.6 * len(penalty))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    for y, r in enumerate(kernels.values()):
        share = r["share_of_plain"]
        left.barh(y, share["median"], 0.7, color=plots.BLUE if r["right"] else plots.GREY, xerr=_whiskers(share))
        if r["target"]:
            left.plot([r["target"]] * 2, [y - 0.4, y + 0.4], color=plots.VERMILLION, linewidth=2)
    left.set_yticks(range(len(kernels)), [f"{name}, N={r['n']}, T={r['t']}" for name, r in kernels.items()], fontsize=7)
    left.set_title("fisher_linear_: share of the rate of cuBLAS's plain product\n(red: the contract's)", fontsize=9)
    for index, kernel in enumerate(KERNELS):
        places = [y + 0.25 * (index - 1) for y in range(len(penalty))]
        shares = [r["results"][kernel]["share_of_copy"]["median"] for r in penalty.values()]
        right.barh(places, shares, 0.23, color=COLOURS[kernel], label=kernel)
    right.axvline(CONTRACT, color=plots.VERMILLION, linewidth=1.2)
    right.set_yticks(range(len(penalty)), list(penalty), fontsize=7)
    right.set_title("penalty: share of the copy's bandwidth (red: the contract's)", fontsize=9)
    for axis in (left, right):
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    figure.legend(loc="outside lower right", ncols=3, frameon=False)
    figure.suptitle(place_of(record), fontsize=10)
    return plots.png(figure)


def _whiskers(spread: Mapping[str, float]) -> list[list[float]]:
    """Return the quartiles' distances from the median."""
    return [[spread["median"] - spread["q1"]], [spread["q3"] - spread["median"]]]
