"""Which label belongs to which row of the outputs: the same place, or one further along a dimension."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Alignment:
    """Label t along ``dim`` belongs to row t + ``offset``; with ``from_end``, both are counted from the ends.

    Attributes:
        dim: the dimension that is shifted, or None where every label belongs to the row in its own place.
        offset: -1 where position t predicts label t + 1, as in causal language models.
        from_end: outputs may be longer or shorter than labels (virtual tokens), and end together.
        single: labels lack the dimension: one for the first row along it, or the last (``from_end``).
    """

    dim: int | None = None
    offset: int = 0
    from_end: bool = False
    single: bool = False

    def row_shape(self, rows: Sequence[int], labels: Sequence[int]) -> tuple[int, ...]:
        """Return the rows' shape, or the labels' where as many rows are only arranged otherwise ([N*T] for [N, T])."""
        labels = self._whole(labels)
        return tuple(labels if math.prod(rows) == math.prod(labels) else rows)

    def fits(self, rows: Sequence[int], labels: Sequence[int]) -> bool:
        """Tell whether labels of this shape can belong to such rows."""
        shape, labels = self.row_shape(rows, labels), self._whole(labels)
        if self.dim is None or len(shape) != len(labels) or self.dim >= len(shape):
            return shape == tuple(labels)
        return all(a == b for d, (a, b) in enumerate(zip(shape, labels, strict=True)) if d != self.dim)

    def to_rows(self, labels: Tensor, rows: Sequence[int], fill: float) -> Tensor:
        """Arrange labels as the rows are, ``fill`` where a row has none: shape ``row_shape``."""
        arranged = labels.new_full(self.row_shape(rows, labels.shape), fill)
        of_rows, of_labels = self._parts(arranged, labels.reshape(self._whole(labels.shape)))
        of_rows.copy_(of_labels)
        return arranged

    def to_labels(self, drawn: Tensor, labels: Tensor) -> Tensor:
        """Put what was drawn for each row (the rows' shape) in its label's place; other labels stay as they are."""
        arranged = labels.reshape(self._whole(labels.shape)).clone()
        of_rows, of_labels = self._parts(drawn.reshape(self.row_shape(drawn.shape, labels.shape)), arranged)
        of_labels.copy_(of_rows)
        return arranged.view(labels.shape)

    def _whole(self, labels: Sequence[int]) -> Sequence[int]:
        """Return the labels' shape with all dimensions of the rows."""
        if not self.single or self.dim is None:
            return labels
        return (*labels[: self.dim], 1, *labels[self.dim :])

    def _parts(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the views of rows and labels that belong together."""
        if self.dim is None:
            return rows, labels
        n_rows, n_labels = rows.shape[self.dim], labels.shape[self.dim]
        offset = self.offset + (n_rows - n_labels if self.from_end else 0)
        start = max(0, offset)
        length = max(0, min(n_rows - start, n_labels - (start - offset)))
        if not length:
            return rows.narrow(self.dim, 0, 0), labels.narrow(self.dim, 0, 0)
        return rows.narrow(self.dim, start, length), labels.narrow(self.dim, start - offset, length)


#: Every label belongs to the row in its own place.
IN_PLACE = Alignment()


def alignments(rows: Sequence[int], labels: Sequence[int]) -> Iterator[Alignment]:
    """Yield how labels of one shape may belong to rows of another, likely ways first."""
    shape = IN_PLACE.row_shape(rows, labels)
    if shape == tuple(labels):
        yield IN_PLACE
        for dim in (*reversed(range(1, len(shape))), 0):
            yield Alignment(dim, -1)
    elif len(shape) == len(labels):
        differing = [d for d, (a, b) in enumerate(zip(shape, labels, strict=True)) if a != b]
        for offset, from_end in ((0, True), (-1, True), (0, False), (-1, False)):
            if len(differing) == 1:
                yield Alignment(differing[0], offset, from_end)
    for dim in range(1, len(rows)):  # one label for a whole sequence, at its end or its start
        if rows[dim] > 1 and len(rows) == len(labels) + 1 and (*rows[:dim], *rows[dim + 1 :]) == tuple(labels):
            yield Alignment(dim, 0, True, single=True)
            yield Alignment(dim, 0, False, single=True)
