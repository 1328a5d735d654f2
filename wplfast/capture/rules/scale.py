"""A parameter that data are multiplied with or divided by: layer scales, hand-written RMSNorm, temperatures, PReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import ops
from ..call import Call, Operand
from ..sample_layout import SampleLayout
from .base import OneOutputRule, by_batch, channel_rows, channels_of, row_sums, summed
from .grad_sample import GradSample, SummedGradSample

_PRODUCTS = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
_QUOTIENTS = frozenset({"div", "div_", "divide", "divide_", "true_divide", "__truediv__", "__itruediv__"})


class ScaleRule(OneOutputRule):
    """y = x p: the gradient of p is G x, summed over what p was broadcast along; for y = x / p it is -G x / p^2."""

    name = "scale"

    def matches(self, call: Call) -> bool:
        """Match products of one operand and one data tensor, and data divided by an operand."""
        found = call.pair
        if found is None or call.kwargs:
            return False
        if call.name == "prelu":
            return found[1] == 1 and not call.is_complex
        return call.name in _PRODUCTS or (call.name in _QUOTIENTS and found[1] == 1)

    def serve(self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout) -> list[GradSample]:
        """Return the summed products."""
        found = call.pair
        assert found is not None
        operand, _, index = found
        if call.name == "prelu":
            return [_of_slopes(operand, self.name, layout, inputs[index].clamp(max=0).to(gradient.dtype), gradient)]
        if call.name in _QUOTIENTS:
            return [summed(operand, self.name, layout, gradient * (inputs[index] / -operand.value.square()).conj())]
        if gradient.is_complex():
            return [summed(operand, self.name, layout, gradient * inputs[index].conj())]
        return [scaled(operand, self.name, layout, inputs[index].to(gradient.dtype), gradient)]


def scaled(operand: Operand, rule: str, layout: SampleLayout, x: Tensor, gradient: Tensor) -> GradSample:
    """Return the use of an operand that x was multiplied with: ``gradient * x`` summed over what was broadcast."""
    shape = operand.value.shape
    if layout.has_rows(gradient.dim()) and shape == gradient.shape[-1:] == x.shape[-1:] and x.shape == gradient.shape:
        return SummedGradSample(operand, rule, ops.scale_grads(layout.rows(x), layout.rows(gradient)))
    return summed(operand, rule, layout, gradient * x)


def _of_slopes(operand: Operand, rule: str, layout: SampleLayout, x: Tensor, gradient: Tensor) -> GradSample:
    """Return the use of a slope, or of one for each channel, along dimension 1, that x was multiplied with."""
    if operand.value.numel() == 1 or gradient.dim() == 2:
        return scaled(operand, rule, layout, x, gradient)
    products = gradient * x
    if not by_batch(layout):
        return channels_of(operand, rule, layout, products)
    return SummedGradSample(operand, rule, row_sums(channel_rows(layout, products)))


SCALE = ScaleRule()
