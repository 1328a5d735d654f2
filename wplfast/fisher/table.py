"""Plain tables: aligned columns, no colours, names shortened to the width of a terminal and whole in a pipe."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence

#: Least width of the first column.
_LEAST = 12


def terminal_width() -> int | None:
    """Return the width of the terminal that is written to; None where output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return a table as lines of text.

    Args:
        header: of the columns.
        rows: the cells. The first column is aligned to the left and shortened where it must be, others to the right.
        width: most characters of a line; None: as many as it takes.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if width is not None:
        others = sum(widths[1:]) + 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(_LEAST, width - others))
    lines = []
    for row in (header, *rows):
        first = shortened(row[0], widths[0]).ljust(widths[0])
        lines.append("  ".join([first, *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip())
    return "\n".join(lines)


def shortened(name: str, most: int) -> str:
    """Return a name with its middle left out where it is longer than so many characters."""
    if len(name) <= most:
        return name
    head = (most - 3) // 3  # ends of names tell more than beginnings
    return f"{name[:head]}...{name[len(name) - (most - 3 - head) :]}"


def number(value: float) -> str:
    """Write a positive number of any size; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.2e}"


def percent(value: float) -> str:
    """Write a share as per cent; a dash where there is none."""
    return "-" if math.isnan(value) else f"{100 * value:.2f} %"
