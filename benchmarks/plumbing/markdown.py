"""What the sections of pages and the tables on the console are made of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def image(name: str, words: str, folder: Path) -> list[str]:
    """Return a figure's line for a page in a folder and an empty one, or none where there is no figure."""
    return [f"![{words}]({os.path.relpath(RESULTS / name, folder)})", ""] if (RESULTS / name).exists() else []


def heading(cells: Sequence[str]) -> list[str]:
    """Return the first two lines of a table."""
    return [row(cells), "|---" * len(cells) + "|"]


def row(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [*heading(heads), *map(row, rows)]


def aligned(lines: Iterable[str]) -> str:
    """Return lines with the columns of their tables padded, for the console."""
    found: list[str] = []
    block: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append([cell.strip().replace("\\*", "*") for cell in line.strip("|").split("|")])
            continue
        if block:
            del block[1]  # the line under the heads
            widths = [max(map(len, column)) for column in zip(*block, strict=True)]
            block.insert(1, ["-" * width for width in widths])
            found += ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in block]
            block = []
        found.append(line)
    return "\n".join(found).rstrip()


def threads(count: int) -> str:
    """Render a number of threads."""
    return f"{count} thread{'s' * (count > 1)}"


def several(words: Sequence[str]) -> str:
    """Join words by commas and an "and"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def spread(found: Mapping[str, float] | None, factor: float = 1.0, unit: str = "") -> str:
    """Render a median with its quartiles; nothing where there is none."""
    if found is None:
        return ""
    low, mid, high = (f"{factor * found[key]:.3g}" for key in ("q1", "median", "q3"))
    return f"{mid}{unit} [{low}, {high}]"


def time(ms: Mapping[str, float] | None, quartiles: bool = True) -> str:
    """Render a time given in milliseconds, with its quartiles."""
    if ms is None:
        return "-"
    mid = ms["median"]
    unit, factor = (" s", 1e-3) if mid >= 1000 else (" ms", 1.0) if mid >= 1 else (" µs", 1000.0)
    return spread(ms, factor, unit) if quartiles else f"{mid * factor:.3g}{unit}"
