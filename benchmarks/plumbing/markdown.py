"""What the README's sections are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def image(name: str, words: str) -> list[str]:
    """Return a figure's line and an empty one, or none where there is no figure."""
    return [f"![{words}](benchmarks/results/{name})", ""] if (RESULTS / name).exists() else []


def heading(cells: Sequence[str]) -> list[str]:
    """Return the first two lines of a table."""
    return [row(cells), "|---" * len(cells) + "|"]


def row(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def threads(count: int) -> str:
    """Render a number of threads."""
    return f"{count} thread{'s' * (count > 1)}"


def several(words: Sequence[str]) -> str:
    """Join words by commas and an "and"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def time(result: dict[str, Any] | None, quartiles: bool = True) -> str:
    """Render a time, with its quartiles."""
    if result is None:
        return "-"
    low, mid, high = (result["milliseconds"][key] for key in ("q1", "median", "q3"))
    unit, factor = ("s", 1e-3) if mid >= 1000 else ("ms", 1.0) if mid >= 1 else ("µs", 1000.0)
    spread = f" [{low * factor:.3g}, {high * factor:.3g}]" if quartiles else ""
    return f"{mid * factor:.3g} {unit}{spread}"
