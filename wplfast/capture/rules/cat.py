"""``torch.cat`` of data with parameters, such as class tokens: each parameter's gradient is its part of G."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..call import Call, Slot
from ..sample_layout import AxisLayout, OneSample, SampleLayout
from .base import OneOutputRule, summed
from .grad_sample import GradSample, MaskedGradSample


class CatRule(OneOutputRule):
    """y = cat([p, x], dim): the gradient of p is the slice of G that it became."""

    name = "cat"

    def matches(self, call: Call) -> bool:
        """Match concatenations along one dimension."""
        parts = call.argument(0, "tensors")
        return (
            call.name in ("cat", "concat", "concatenate")
            and isinstance(parts, (tuple, list))
            and "out" not in call.kwargs
        )

    def serve(self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout) -> list[GradSample]:
        """Slice the gradient."""
        dim = self._dimension(call) % gradient.dim()
        apart = isinstance(layout, OneSample) or (isinstance(layout, AxisLayout) and layout.dim != dim)
        found: list[GradSample] = []
        for index, part in self._parts(call, dim):
            if apart:
                found.append(summed(call.operands[index], self.name, layout, part(gradient)))
            else:  # samples lie along the dimension itself, or in any order
                found.append(MaskedGradSample(call.operands[index], self.name, layout, gradient, part))
        return found

    def needs_inputs(self, call: Call) -> bool:
        """Their shapes are enough."""
        return False

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Slice the gradient; an operand that stands twice gets both slices."""
        gradient = grads[0]
        found: list[Tensor | None] = [None] * len(call.operands)
        if gradient is None:
            return found
        for index, part in self._parts(call, self._dimension(call) % gradient.dim()):
            before = found[index]
            found[index] = part(gradient) if before is None else before + part(gradient)
        return found

    def _parts(self, call: Call, dim: int) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
        """Yield each operand's index, and what takes its slice of a tensor of the output's shape."""
        start = 0
        for slot in call.argument(0, "tensors"):
            length = self._length(call, slot, dim)
            if slot.kind == "operand":
                yield slot.index, partial(torch.narrow, dim=dim, start=start, length=length)
            start += length

    @staticmethod
    def _dimension(call: Call) -> int:
        """Return the dimension as it was given."""
        dim = call.argument(1, "dim")
        return int(dim if dim is not None else call.kwargs.get("axis", 0))

    @staticmethod
    def _length(call: Call, slot: Slot, dim: int) -> int:
        """Return how long a part is."""
        if slot.kind == "operand":
            shape = call.operands[slot.index].value.shape
        else:
            shape = call.input_shapes[slot.index] if slot.kind == "input" else call.constants[slot.index].shape
        return shape[dim] if shape != (0,) else 0


CAT = CatRule()
