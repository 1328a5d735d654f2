"""A parameter that data are multiplied with or divided by: layer scales, hand-written RMSNorm, temperatures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import ops
from ..call import Call, Source
from ..sample_layout import Ownership
from .base import OneOutputRule, summed
from .grad_sample import SummedUse, Use

_PRODUCTS = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
_QUOTIENTS = frozenset({"div", "div_", "divide", "divide_", "true_divide", "__truediv__", "__itruediv__"})


class ScaleRule(OneOutputRule):
    """y = x p: the gradient of p is G x, summed over what p was broadcast along; for y = x / p it is -G x / p^2."""

    name = "scale"

    def matches(self, call: Call) -> bool:
        """Match products of one source and one data tensor, and data divided by a source."""
        found = call.operands
        if found is None or call.kwargs:
            return False
        return call.name in _PRODUCTS or (call.name in _QUOTIENTS and found[1] == 1)

    def serve(self, call: Call, data: Sequence[Tensor], gradient: Tensor, owner: Ownership) -> list[Use]:
        """Return the summed products."""
        found = call.operands
        assert found is not None
        source, _, index = found
        if call.name in _QUOTIENTS:
            return [summed(source, self.name, owner, gradient * data[index] / -source.value.square())]
        return [scaled(source, self.name, owner, data[index].to(gradient.dtype), gradient)]


def scaled(source: Source, rule: str, owner: Ownership, x: Tensor, gradient: Tensor) -> Use:
    """Return the use of a source that x was multiplied with: ``gradient * x`` summed over what was broadcast."""
    shape = source.value.shape
    if owner.has_rows(gradient.dim()) and shape == gradient.shape[-1:] == x.shape[-1:] and x.shape == gradient.shape:
        return SummedUse(source, rule, ops.scale_grads(owner.rows(x), owner.rows(gradient)))
    return summed(source, rule, owner, gradient * x)


SCALE = ScaleRule()
