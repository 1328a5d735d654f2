"""Which sample owns which element of a call's output, as a rule is told: by position, by a table, or all of it.

Every layout answers in the same words: ``rows`` arranges rows as [N, T, D], ``only`` masks all but one sample,
``scale`` multiplies each sample's elements by its own factor, and ``segment_ids`` names the sample of every row. They
are inferred in :mod:`wplfast.capture.probe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ..ops.layout import flat_dtype


@dataclass(frozen=True)
class AxisTemplate:
    """A measured template: the samples lie along one dimension, whose size is ``outer * N * inner``.

    It fits batches of any N, and of any size elsewhere. Another ``outer * inner`` is measured anew: with T = 1, say,
    T * N * K looks like N * (T * K).
    """

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def is_between(self) -> bool:
        """Tell whether the sample axis has others on both sides, whose sizes may change while their product stays."""
        return self.outer > 1 and self.inner > 1

    def fit(self, shape: torch.Size, n_samples: int) -> AxisLayout | None:
        """Return the layout of a tensor of this shape; None if the template does not apply to it."""
        if self.dim >= len(shape) or shape[self.dim] != self.outer * n_samples * self.inner:
            return None
        return _layout(self.dim, self.outer, n_samples, self.inner)


@dataclass(frozen=True)
class AxisLayout:
    """Samples by position: dimension ``dim`` splits into [outer, N, inner]."""

    dim: int
    outer: int
    n_samples: int
    inner: int

    def split(self, tensor: Tensor) -> Tensor:
        """View a tensor with the sample axis in front: [N, ..., outer, inner, ...]."""
        shape = tensor.shape
        parts = tensor.view(*shape[: self.dim], self.outer, self.n_samples, self.inner, *shape[self.dim + 1 :])
        return parts.movedim(self.dim + 1, 0)

    def has_rows(self, ndim: int) -> bool:
        """Tell whether samples own whole rows (all elements along the last dimension)."""
        return self.dim < ndim - 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows as [N, T, D]."""
        if self.dim == 0 and self.outer == 1:  # the common case, in one step
            return tensor.reshape(self.n_samples, -1, tensor.shape[-1]) if tensor.numel() else self._rows(tensor)
        return self._rows(tensor)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows wherever the samples lie."""
        return self.split(tensor).flatten(1, -2)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return a copy in which all elements of other samples are zero."""
        masked = torch.zeros_like(tensor)
        self.split(masked)[sample].copy_(self.split(tensor)[sample])
        return masked

    def scale(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply each element by its sample's factor."""
        scaled = tensor.clone()
        parts = self.split(scaled)
        parts.mul_(factors.to(tensor.dtype).view(-1, *[1] * (parts.dim() - 1)))
        return scaled

    def segment_ids(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the sample of every row (of every element where the axis is the last dimension), flattened."""
        leading = shape[:-1] if self.dim < len(shape) - 1 else shape[-1:]
        position = torch.arange(shape[self.dim], device=device) // self.inner % self.n_samples
        view = [1] * len(leading)
        view[self.dim if len(leading) > self.dim else 0] = -1
        return position.view(view).expand(leading).reshape(-1)


@lru_cache(maxsize=256)
def _layout(dim: int, outer: int, n_samples: int, inner: int) -> AxisLayout:
    """Return a layout, made once."""
    return AxisLayout(dim, outer, n_samples, inner)


@dataclass(frozen=True)
class SegmentIds:
    """Samples by a measured table: rows of the output in any order, such as tokens routed to an expert."""

    ids: Tensor  # int64 [rows]; -1 where the row's gradient is zero
    n_samples: int

    def has_rows(self, ndim: int) -> bool:
        """Rows are what the table is about."""
        return ndim > 1

    def segment_ids(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the sample of every row, flattened; -1 where the row's gradient is zero."""
        return self.ids.to(device)

    def rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows as [N, T, D], T the most rows that one sample owns, padded with zeros (exact: they add 0)."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        rows, places, most = self._places
        arranged = flat.new_zeros(self.n_samples * most, flat.shape[1])
        return arranged.index_copy_(0, places, flat[rows]).view(self.n_samples, most, -1)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, int]:
        """The rows that samples own, where each goes among T for every sample, and T."""
        owned = (self.ids >= 0).nonzero().squeeze(1)
        sample, order = self.ids[owned].sort(stable=True)
        counts = torch.bincount(sample, minlength=self.n_samples)
        most = max(1, int(counts.max()))
        place = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
        return owned[order], sample * most + place, most

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return a copy in which all rows of other samples are zero."""
        return tensor * (self.ids == sample).view(self._row_shape(tensor))

    def scale(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply each row by its sample's factor."""
        return tensor * factors.to(tensor.dtype)[self.ids.clamp_min(0)].view(self._row_shape(tensor))

    @staticmethod
    def _row_shape(tensor: Tensor) -> tuple[int, ...]:
        """Return the shape that broadcasts one number a row (a 1-D tensor has one row an element)."""
        return (*tensor.shape[:-1], 1) if tensor.dim() > 1 else tuple(tensor.shape)


@dataclass(frozen=True)
class OneSample:
    """A batch of one sample: it owns everything."""

    n_samples: int = 1

    def split(self, tensor: Tensor) -> Tensor:
        """View a tensor with sample axis and two more in front, as a layout along dimension 0 does: [1, 1, ...]."""
        return tensor.unsqueeze(0).unsqueeze(0)

    def has_rows(self, ndim: int) -> bool:
        """Tell whether the output has rows at all."""
        return ndim > 0

    def segment_ids(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return sample 0 for every row, flattened."""
        return torch.zeros(shape[:-1].numel() if len(shape) > 1 else shape.numel(), dtype=torch.int64, device=device)

    def rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows as [1, T, D]."""
        return tensor.reshape(1, -1, tensor.shape[-1])

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return the tensor: all of it is the sample's."""
        return tensor

    def scale(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply by the sample's factor."""
        return tensor * factors.to(tensor.dtype)[0]


#: What a rule may be given.
SampleLayout: TypeAlias = AxisLayout | SegmentIds | OneSample


def is_row_a_sample(layout: SampleLayout | None) -> bool:
    """Tell whether row n along dimension 0 is that of sample n."""
    return isinstance(layout, AxisLayout) and layout.dim == 0 and layout.outer == layout.inner == 1


def is_summable(layout: SampleLayout, ndim: int, shape: torch.Size) -> bool:
    """Tell whether :func:`sum_to` serves gradients of so many dimensions: broadcasting spread the sample axis."""
    if isinstance(layout, OneSample):
        return True
    if isinstance(layout, SegmentIds):
        return shape.numel() == 1 if ndim == 1 else shape.numel() == shape[-1:].numel()
    before = ndim - len(shape)
    return layout.dim < before or shape[layout.dim - before] == 1


def sum_to(layout: SampleLayout, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum a gradient over all that broadcasting spread, for each sample apart.

    Args:
        layout: who owns the elements of the gradient.
        gradient: gradient of an output that a tensor of ``shape`` was broadcast to.
        shape: the shape to sum to, for which :func:`is_summable` holds.

    Returns:
        [N, *shape], accumulated in float32 or wider.
    """
    wide = flat_dtype(gradient.dtype)
    if isinstance(layout, OneSample):
        return gradient.to(wide).sum_to_size(shape).unsqueeze(0)
    if isinstance(layout, SegmentIds):
        rows = layout.rows(gradient if gradient.dim() > 1 else gradient.unsqueeze(1)).sum(1, dtype=wide)
        return rows.sum_to_size((layout.n_samples, shape[-1] if shape else 1)).reshape(-1, *shape)
    if layout.dim == 0 and layout.outer == layout.inner == 1 and gradient.shape[1:] == shape:
        return gradient.to(wide)
    padded = (1,) * (gradient.dim() - len(shape)) + tuple(shape)
    parts = layout.split(gradient)  # [N, ..., outer, inner, ...]
    spread = [
        dim + (1 if dim < layout.dim else 2) for dim, size in enumerate(padded) if size == 1 and dim != layout.dim
    ]
    sums = parts.sum((layout.dim + 1, layout.dim + 2, *spread), dtype=wide)  # at once: several sums take several times
    return sums.reshape(-1, *shape)
