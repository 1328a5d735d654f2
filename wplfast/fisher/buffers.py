"""The accumulators of a Fisher pass. Those of complex parameters are of their real and imaginary parts, [*shape, 2]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.layout import flat_dtype


class Buffers:
    """One zeroed accumulator per parameter; they share one flat buffer where device and dtype are the same."""

    def __init__(
        self, parameters: dict[str, Tensor], joined: Callable[[Tensor], Tensor] = lambda parts: parts.sum(-1)
    ) -> None:
        """Make them; ``joined`` makes [*shape] of the two parts, by default |g|^2 of their squares."""
        self.names, self._joined = list(parameters), joined
        self._pairs = {name for name, p in parameters.items() if p.is_complex()}
        shapes = [(*p.shape, *[2] * p.is_complex()) for p in parameters.values()]
        kinds = {(p.device, flat_dtype(p.dtype)) for p in parameters.values()}
        self.flats: list[Tensor] = []
        self.views: list[Tensor] = []
        sizes = [math.prod(shape) for shape in shapes]
        with torch.inference_mode(False):  # they are written to in a pass, which runs outside of it
            if len(kinds) == 1:
                ((device, dtype),) = kinds
                self.flats = [torch.zeros(sum(sizes), dtype=dtype, device=device)]
                parts = self.flats[0].split(sizes)
                self.views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            else:
                both = zip(shapes, parameters.values(), strict=True)
                self.views = [torch.zeros(shape, dtype=flat_dtype(p.dtype), device=p.device) for shape, p in both]
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
        found = self.views if in_place else [view / total for view in self.views]
        named = dict(zip(self.names, found, strict=True))
        return named | {name: self._joined(named[name]) for name in self._pairs}
