"""A table, as text for the terminal and as markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...plumbing.markdown import heading, row


@dataclass(frozen=True)
class Table:
    """Cells under columns.

    Args:
        columns: their heads; the first one stands over the rows' names.
        rows: a name and a cell for each other column; a name alone is a heading over the rows that follow.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return the table for the terminal: names to the left, cells to the right."""
        full = [self.columns, *(cells for cells in self.rows if len(cells) > 1)]
        widths = [max(len(cells[column]) for cells in full) for column in range(len(self.columns))]
        lines = ["  ".join(_aligned(self.columns, widths))]
        rule = "-" * len(lines[0])
        for cells in self.rows:
            lines += ["  ".join(_aligned(cells, widths)).rstrip()] if len(cells) > 1 else [rule, cells[0]]
        return "\n".join([lines[0], rule, *lines[1 + (lines[1:2] == [rule]) :], rule])

    def markdown(self) -> str:
        """Return the table in markdown."""
        lines = heading(self.columns)
        for cells in self.rows:
            lines.append(row(cells if len(cells) > 1 else [f"**{cells[0]}**", *[""] * (len(self.columns) - 1)]))
        return "\n".join(lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Fill the cells."""
    return [cells[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(cells[1:], widths[1:], strict=True))]
