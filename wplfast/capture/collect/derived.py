"""Products of rows sent down through simple functions of parameters: ``W + s B A``, ``P Q``, masks and gates.

The gradient of a derived matrix D is g_n = G_n^T A_n. Through a sum, a transpose, a product of matrices or a scale it
stays such a product: for D = P Q it is G_n^T (A_n Q^T) of P and (G_n P)^T A_n of Q. Then the fused operators serve the
parameters, each by itself, and no sample's gradient of D is made. What is not of that kind is sent down its graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.layout import flat_dtype
from ..call import Call, Operand, Slot
from ..rules.base import row_sums
from ..rules.grad_sample import FactoredGradSample, GradSample, SummedGradSample
from ..rules.local import LocalBackward

_SUMS = {
    **dict.fromkeys(("add", "__add__", "__radd__"), (1.0, 1.0)),
    **dict.fromkeys(("sub", "subtract", "__sub__"), (1.0, -1.0)),
    **dict.fromkeys(("rsub", "__rsub__"), (-1.0, 1.0)),
}
_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "__truediv__"})
_MATRIX_PRODUCTS = frozenset({"matmul", "mm", "__matmul__"})
_ELEMENTWISE = frozenset({"neg", "__neg__", "tanh", "sigmoid", "exp", "relu", "abs", "square", "softplus", "clamp"})

_KNOWN = _SUMS.keys() | _PRODUCTS | _QUOTIENTS | _MATRIX_PRODUCTS | _ELEMENTWISE


class ScaledGradSample(GradSample):
    """Gradients that are products of rows, times a matrix that all samples share: of a masked weight."""

    def __init__(self, use: FactoredGradSample, scale: Tensor) -> None:
        """Take the products for an operand, and the factors [D_out, D_in]."""
        super().__init__(use.operand, use.n_samples, use.rule)
        self.use, self.scale = use, scale

    def per_sample(self, samples: range) -> Tensor:
        """Scale the products."""
        grads = self.use.per_sample(samples)
        return grads * self.scale.to(grads.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Scale their sum."""
        total = self.use.weighted_sum(weights)
        return total * self.scale.to(total.dtype)

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Scale what the fused operator adds up in memory of its own."""
        squares = torch.zeros_like(fisher, memory_format=torch.contiguous_format)
        plain = None if gradient is None else torch.zeros_like(squares)
        if not self.use.accumulate(squares, plain, weights):
            return False
        scale = self.scale.to(fisher.dtype)
        fisher.addcmul_(squares, scale.square())
        if gradient is not None and plain is not None:
            gradient.addcmul_(plain, scale)
        return True


def sent_down(uses: Sequence[GradSample]) -> list[GradSample] | None:
    """Return uses that each depend on one parameter and stand for all given ones; None if some cannot be told apart."""
    if not all(_may_be_told_apart(use.operand) for use in uses):
        return None
    found: list[GradSample] = []
    for use in uses:
        below = _below(use)
        if below is None:
            return None
        found += below
    return found


def _may_be_told_apart(operand: Operand) -> bool:
    """Tell, by the names of the functions below an operand, whether it may be worth the products to try."""
    if len(operand.parameters) == 1:
        return True
    call = operand.made_by
    known = call is not None and (call.name in _KNOWN or _is_transpose(call))
    return known and call is not None and all(_may_be_told_apart(below) for below in call.operands)


def _below(use: GradSample) -> list[GradSample] | None:
    """Return what a use is to the parameters below its operand; None if several are, and it cannot be told."""
    operand = use.operand
    steps = None
    hooked = operand.graph is not None and operand.graph._backward_hooks  # which only its graph calls
    if operand.graph is not None and operand.region is None and operand.made_by is not None and not hooked:
        steps = _through(use, operand.made_by)
    if steps is not None:
        found = sent_down(steps)
        if found is not None:
            return found
    return [use] if len(operand.parameters) == 1 else None


def _through(use: GradSample, call: Call) -> list[GradSample] | None:
    """Return the uses of a call's operands for a use of its result; None if they are not of a form that is known."""
    value = use.operand.value
    tensors = [*(operand.value for operand in call.operands), *call.constants]
    known = (
        isinstance(use, (FactoredGradSample, ScaledGradSample))
        and value.dim() == 2
        and value.numel() > 0
        and not call.in_place
    )
    if not known or call.input_shapes or call.autocast is not None or any(t.dtype != value.dtype for t in tensors):
        return None
    if call.name in _SUMS:
        signs = _SUMS[call.name]
        factor = 1.0 if call.name == "rsub" else call.kwargs.get("alpha", 1)
        if set(call.kwargs) - {"alpha"} or (call.name == "rsub" and call.kwargs) or len(call.args) != 2:
            return None
        terms = [(arg, signs[i] * (factor if i else 1)) for i, arg in enumerate(call.args) if _is_operand(arg)]
        same = all(call.operands[slot.index].value.shape == value.shape for slot, _ in terms)
        return [_scaled(use, call.operands[slot.index], c) for slot, c in terms] if same else None
    if call.kwargs and call.name not in _ELEMENTWISE:
        return None
    if call.name in _PRODUCTS | _QUOTIENTS and len(call.args) == 2:
        return _through_product(use, call)
    if call.name in _ELEMENTWISE and len(call.operands) == 1 and call.operands[0].value.shape == value.shape:
        local = LocalBackward(call, ())
        (slope,) = local([torch.ones_like(local.outputs[0])])
        return None if slope is None else [_scaled(use, call.operands[0], slope)]
    if not isinstance(use, FactoredGradSample):
        return None
    if call.name in _MATRIX_PRODUCTS and len(call.args) == 2:
        return _through_matrix_product(use, call)
    if _is_transpose(call) and call.operands[0].value.shape == value.shape[::-1]:
        return [FactoredGradSample(call.operands[0], use.rule, use.grad_outputs, use.activations)]
    return None


def _through_product(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``P S`` or ``P / S`` down: S is a matrix, or spread over rows, columns or all."""
    value, found = use.operand.value, list[GradSample]()
    left, right = call.args
    for position, (slot, other) in enumerate(((left, right), (right, left))):
        if not _is_operand(slot):
            continue
        operand, factor = call.operands[slot.index], _value(call, other)
        if call.name in _QUOTIENTS:
            factor = 1 / factor if position == 0 else -factor / operand.value.square()
        if operand.value.shape == value.shape:
            found.append(_scaled(use, operand, factor))
            continue
        sums = _summed_over(use, operand, factor)
        if sums is None:
            return None
        found.append(sums)
    return found


def _scaled(use: GradSample, operand: Operand, factor: Any) -> GradSample:
    """Return a use of ``factor * operand`` as one of the operand, of the same shape."""
    if isinstance(use, ScaledGradSample):
        inner = _scaled(use.use, operand, 1)
        assert isinstance(inner, FactoredGradSample)
        return ScaledGradSample(inner, use.scale * factor)
    assert isinstance(use, FactoredGradSample)
    a, g = use.activations, use.grad_outputs
    if isinstance(factor, Tensor) and factor.numel() > 1:
        factor = factor.expand(operand.value.shape).to(g.dtype)
        rows, columns = factor.stride()
        if rows and columns:
            return ScaledGradSample(FactoredGradSample(operand, use.rule, a, g), factor)
        if rows:
            return FactoredGradSample(operand, use.rule, a, g * factor[:, 0])
        return FactoredGradSample(operand, use.rule, a * factor[0], g)
    if isinstance(factor, Tensor):
        factor = factor.reshape(()).to(g.dtype)
    elif factor == 1:
        return FactoredGradSample(operand, use.rule, a, g)
    return FactoredGradSample(operand, use.rule, *((a * factor, g) if a.shape[2] < g.shape[2] else (a, g * factor)))


def _summed_over(use: GradSample, operand: Operand, factor: Any) -> GradSample | None:
    """Return a use of ``factor * operand`` as one of the operand, which is spread over rows, columns or all of D."""
    value, shape = use.operand.value, operand.value.shape
    if not isinstance(use, FactoredGradSample) or not isinstance(factor, Tensor):
        return None
    wide = flat_dtype(value.dtype)
    a, g, factor = use.activations.to(wide), use.grad_outputs.to(wide), factor.to(wide).expand(value.shape)
    if shape == (len(value), 1) and value.shape[1] > 1:
        sums = row_sums(g * (a @ factor.t()))
    elif shape.numel() == 1 or (shape[-1:] == value.shape[1:] and shape.numel() == shape[-1] and len(value) > 1):
        sums = row_sums(a * (g @ factor))
        sums = sums.sum(1) if shape.numel() == 1 else sums
    else:
        return None
    return SummedGradSample(operand, use.rule, sums.reshape(len(sums), *shape))


def _through_matrix_product(use: FactoredGradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``P Q`` down."""
    left, right = call.args
    p, q = _value(call, left), _value(call, right)
    a, g, found = use.activations, use.grad_outputs, list[GradSample]()
    if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (p, q)):
        return None
    if _is_operand(left):
        found.append(FactoredGradSample(call.operands[left.index], use.rule, a @ q.t().to(a.dtype), g))
    if _is_operand(right):
        found.append(FactoredGradSample(call.operands[right.index], use.rule, a, g @ p.to(g.dtype)))
    return found


def _is_operand(argument: Any) -> bool:
    """Tell whether an operand stands at an argument."""
    return isinstance(argument, Slot) and argument.kind == "operand"


def _value(call: Call, argument: Any) -> Any:
    """Return the tensor that stands at an argument, or the number."""
    if not isinstance(argument, Slot):
        return argument
    return call.operands[argument.index].value if argument.kind == "operand" else call.constants[argument.index]


def _is_transpose(call: Call) -> bool:
    """Tell whether a call exchanges the dimensions of a matrix."""
    if call.name == "__get__":
        return getattr(getattr(call.func, "__self__", None), "__name__", "") in ("T", "mT")
    return call.name == "t" or (call.name in ("transpose", "swapaxes") and {d % 2 for d in call.args[1:]} == {0, 1})
