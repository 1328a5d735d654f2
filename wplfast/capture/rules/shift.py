"""A parameter added to or subtracted from data: position embeddings without a batch axis, biases written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..accumulators import Accumulators
from ..call import Call
from ..sample_layout import SampleLayout, SegmentIds, is_summable
from .base import OneOutputRule, summed
from .grad_sample import GradSample
from .recipe import Recipe, SumRecipe

#: function name -> signs of its first and second operand
_SIGNS = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), (1.0, 1.0)),
    **dict.fromkeys(("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"), (1.0, -1.0)),
    **dict.fromkeys(("rsub", "__rsub__"), (-1.0, 1.0)),
}
#: Those that add both terms as they are.
_PLAIN = frozenset({"add", "__add__", "__radd__"})


class ShiftRule(OneOutputRule):
    """y = x + p: the gradient of p is that of y, summed over what p was broadcast along."""

    name = "shift"

    def matches(self, call: Call) -> bool:
        """Match additions and subtractions of one operand and one data tensor."""
        return call.name in _SIGNS and call.pair is not None and "out" not in call.kwargs

    def needs_inputs(self, call: Call) -> bool:
        """The gradient of a sum does not depend on its terms."""
        return False

    def stackable(self, call: Call) -> bool:
        """A sum with a vector treats rows alike: steps of a loop are one sum over [N, T, D]."""
        return call.operands[0].value.dim() < 2 and call.operands[0].base is None

    def serve(self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout) -> list[GradSample]:
        """Return the summed gradients."""
        factor = self._factor(call)
        return [summed(call.operands[0], self.name, layout, gradient if factor == 1 else gradient * factor)]

    def term(self, call: Call) -> Tensor | None:
        """Return the operand where it is added as it is."""
        return call.operands[0].value if call.name in _PLAIN and not call.kwargs else None

    def recipe(
        self,
        call: Call,
        layouts: Sequence[SampleLayout | None],
        shapes: Sequence[torch.Size],
        accumulators: Accumulators,
    ) -> Recipe | None:
        """Bind the squares of sums."""
        operand, layout, ndim = call.operands[0], layouts[0], len(shapes[0])
        if layout is None or not operand.is_parameter or call.is_complex or isinstance(layout, SegmentIds):
            return None
        if not is_summable(layout, ndim, operand.value.shape):
            return None
        (index,) = operand.parameters
        return SumRecipe(self.name, accumulators, layout, operand.value.shape, index, self._factor(call))

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sum over what was broadcast."""
        gradient, operand = grads[0], call.operands[0]
        if gradient is None:
            return [None]
        gradient = gradient if operand.value.is_complex() or not gradient.is_complex() else gradient.real
        return [gradient.sum_to_size(operand.value.shape) * self._factor(call)]

    @staticmethod
    def _factor(call: Call) -> float:
        """Return the operand's sign, times the factor ``alpha`` of the second operand."""
        found = call.pair
        assert found is not None
        _, position, _ = found
        scaled = 0 if call.name == "rsub" else 1  # the operand that alpha multiplies
        return _SIGNS[call.name][position] * float(call.kwargs.get("alpha", 1) if position == scaled else 1)


SHIFT = ShiftRule()
