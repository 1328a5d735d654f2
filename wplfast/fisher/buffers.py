"""The accumulators of a Fisher pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.layout import flat_dtype


class Buffers:
    """One zeroed accumulator per parameter; they share one flat buffer where device and dtype are the same."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.names = list(parameters)
        kinds = {(p.device, flat_dtype(p.dtype)) for p in parameters.values()}
        self.flats: list[Tensor] = []
        self.views: list[Tensor] = []
        sizes = [p.numel() for p in parameters.values()]
        if len(kinds) == 1:
            ((device, dtype),) = kinds
            self.flats = [torch.zeros(sum(sizes), dtype=dtype, device=device)]
            parts = self.flats[0].split(sizes)
            self.views = [part.view(p.shape) for part, p in zip(parts, parameters.values(), strict=True)]
        else:
            self.views = [torch.zeros(p.shape, dtype=flat_dtype(p.dtype), device=p.device) for p in parameters.values()]
            self.flats = self.views

    def first_nonfinite(self) -> str:
        """Name the first accumulator with a NaN or inf, where there is one."""
        return next(n for n, view in zip(self.names, self.views, strict=True) if not bool(view.isfinite().all()))

    def add_and_clear(self, staged: Buffers) -> None:
        """Take over a staged batch."""
        for flat, other in zip(self.flats, staged.flats, strict=True):
            flat += other
            other.zero_()

    def clear(self) -> None:
        """Set all to zero."""
        for flat in self.flats:
            flat.zero_()

    def divided(self, total: float, in_place: bool) -> dict[str, Tensor]:
        """Return the accumulators divided by a number."""
        if in_place:
            for flat in self.flats:
                flat /= total
            return dict(zip(self.names, self.views, strict=True))
        return {name: view / total for name, view in zip(self.names, self.views, strict=True)}
