"""``Fisher.summary``: a table by module."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch import Tensor

from .spread import Spread, by_module
from .table import number, percent, table, terminal_width

#: Rows that are printed; the others are summed up in a line.
MOST = 60

_HEADER = ("module", "tensors", "elements", "mean", "share of trace", "largest")


@dataclass(frozen=True)
class Row:
    """What a Fisher says of one module.

    Attributes:
        module: its name; a parameter's own name where it is outside of any module.
        tensors: number of its parameters.
        elements: number of their elements.
        mean: mean entry of F, ``sum F / elements``; NaN without elements.
        share: its part of the trace, ``sum F / sum of all F``; NaN where the trace is 0.
        largest: its largest entry of F.
    """

    module: str
    tensors: int
    elements: int
    mean: float
    share: float
    largest: float

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        counts = (f"{self.tensors:,}", f"{self.elements:,}")
        return (self.module, *counts, number(self.mean), percent(self.share), number(self.largest))


class Summary(Sequence[Row]):
    """A Fisher by module: rows in the model's order, which print as a table; see :meth:`wplfast.Fisher.summary`.

    Attributes:
        total: the row of the whole model.
        n_samples: samples behind the Fisher.
    """

    def __init__(self, rows: Sequence[Row], total: Row, n_samples: int) -> None:
        self._rows, self.total, self.n_samples = tuple(rows), total, n_samples

    @staticmethod
    def of(fisher: Mapping[str, Tensor], depth: int | None = None) -> Summary:
        """Summarise a Fisher.

        Raises:
            ValueError: if depth is negative.
        """
        parts = (Spread.of(name, tensor, sampled=0) for name, tensor in fisher.items())
        return Summary.of_parts(parts, getattr(fisher, "n_samples", 0), depth)

    @staticmethod
    def of_parts(parts: Iterable[Spread], n_samples: int, depth: int | None = None) -> Summary:
        """Summarise what was found about each tensor.

        Raises:
            ValueError: if depth is negative.
        """
        if depth is not None and depth < 0:
            raise ValueError(f"depth must not be negative, got {depth}")
        parts = list(parts)
        total = Spread.joined("total", parts)

        def row(part: Spread) -> Row:
            share = part.total / total.total if total.total else math.nan
            return Row(part.name, part.tensors, part.elements, part.mean, share, part.largest)

        rows = [row(part) for part in by_module(parts, depth)]
        return Summary(rows, row(total), n_samples)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """Return a row, or some."""
        return self._rows[index]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data, for JSON: NaN is None."""
        return {
            "n_samples": self.n_samples,
            "total": _plain(self.total),
            "modules": [_plain(row) for row in self],
        }

    def __repr__(self) -> str:
        """Return the table; of more than 60 rows those with the largest shares, and a line about the others."""
        shown, rest = self._shown()
        cells = [*shown, *([rest] if rest else []), self.total]
        text = table(_HEADER, [row.cells() for row in cells], terminal_width())
        return f"{text}\n{self.n_samples:,} samples"

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        shown, rest = self._shown()

        def line(cells: Sequence[str], tag: str = "td") -> str:
            aligned = [f'<{tag} style="text-align:{"right" if i else "left"}">' for i in range(len(cells))]
            inner = (f"{a}{html.escape(cell)}</{tag}>" for a, cell in zip(aligned, cells, strict=True))
            return f"<tr>{''.join(inner)}</tr>"

        body = "".join(line(row.cells()) for row in [*shown, *([rest] if rest else [])])
        head, foot = line(_HEADER, "th"), line(self.total.cells(), "th")
        caption = f"<caption>Fisher of {self.n_samples:,} samples</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"

    def _shown(self) -> tuple[list[Row], Row | None]:
        """Return the rows to print, in the model's order, and one for all others."""
        if len(self) <= MOST:
            return list(self), None
        by_share = sorted(range(len(self)), key=lambda i: (math.isnan(self[i].share), -self[i].share))
        chosen = set(by_share[: MOST - 1])
        others = [row for i, row in enumerate(self) if i not in chosen]
        elements = sum(row.elements for row in others)
        summed = math.fsum(row.mean * row.elements for row in others if row.elements)
        rest = Row(
            f"({len(others):,} others)",
            sum(row.tensors for row in others),
            elements,
            summed / elements if elements else math.nan,
            math.fsum(row.share for row in others),
            max(row.largest for row in others),
        )
        return [self[i] for i in sorted(chosen)], rest


def _plain(row: Row) -> dict[str, Any]:
    """Return a row as plain data."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(row).items()}
