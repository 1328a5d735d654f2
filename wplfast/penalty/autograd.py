"""The penalty's derivatives.

The forward pass computes the value and, in the same pass over memory, the gradient: 16 bytes a float32 parameter (three
reads, one write). The backward pass hands views of it on, as they are where the incoming gradient is 1, else scaled in
place (8 bytes more). Where ``.grad`` is None it takes the views over, so these 16 bytes are all; otherwise autograd
reads both and writes one, which makes 28, the fewest that are possible as long as ``.grad`` is autograd's to write: a
gradient recomputed in the backward pass would cost 12 + 16 + 12 bytes. (``add_grad_`` needs 20 for the same.)

Under ``vmap`` no kernel runs: the operators have no batching rules, and :mod:`.operations` batches by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops.arguments import PenaltyArguments
from ..ops.layout import flat_dtype, packed_views
from ..ops.prepared import PreparedPenalty, operator
from .operations import gradients_by_operations, is_batched, under_vmap, value_by_operations


def differentiable(prepared: PreparedPenalty) -> Tensor:
    """Return the value of a penalty, differentiable with respect to its ``theta``."""
    theta = prepared.theta
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    forward = not compiling and forward_ad._current_level >= 0
    if not (transformed or forward or (torch.is_grad_enabled() and any(p.requires_grad for p in theta))):
        return prepared.value()
    apply: Any
    value: Tensor
    if under_vmap():
        return prepared.with_constant(value_by_operations(prepared.arguments))
    if compiling or transformed:
        apply = (_TracedPenalty if compiling else _TransformedPenalty).apply
        _, theta_hat, offset, fisher, alpha, l2 = prepared.arguments
        value, _ = apply(alpha, l2, len(theta), *theta, *theta_hat, *fisher, *offset)
        return prepared.with_constant(value)
    apply = EagerPenalty.apply
    value = apply(prepared, *theta)
    return value


def total(values: Sequence[Tensor]) -> Tensor:
    """Add the values of several groups, on the first one's device, in the widest dtype."""
    result = values[0]
    for value in values[1:]:
        result = result + value.to(result.device)
    return result


class EagerPenalty(torch.autograd.Function):
    """Value and packed gradient in one pass.

    Gradients of float16 parameters wait for the incoming one, which may be a loss scale that keeps them from vanishing.
    """

    @staticmethod
    def forward(ctx: Any, prepared: PreparedPenalty, *theta: Tensor) -> Tensor:
        """Evaluate; keep the gradient, and how to tell whether it could be evaluated again."""
        ctx.prepared, ctx.versions = prepared, prepared.versions()
        ctx.set_materialize_grads(False)
        if theta[0].dtype == torch.float16:
            value = prepared.value()
            packed = value.new_empty(0)  # stands for the gradient that is to come
        else:
            value, packed = prepared.with_grad()
        ctx.save_for_backward(packed)
        ctx.save_for_forward(packed)
        return value

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Return the value's change along a direction (forward mode)."""
        prepared: PreparedPenalty = ctx.prepared
        (packed,) = ctx.saved_tensors
        if packed.numel() == 0:
            _, packed = prepared.with_grad()
        return _along(packed, prepared.theta, tangents[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradient on, times the incoming one."""
        (packed,), prepared = ctx.saved_tensors, ctx.prepared
        if upstream is None:
            return (None,) * (1 + len(prepared.theta))
        to_come = packed.numel() == 0
        if (torch.is_grad_enabled() or to_come) and prepared.versions() != ctx.versions:
            raise RuntimeError("alpha, an anchor or a parameter changed between the penalty and its backward")
        if torch.is_grad_enabled():
            return (None, *gradients_by_operations(upstream, prepared.arguments))
        if is_batched(upstream):
            if to_come:
                return (None, *gradients_by_operations(upstream, prepared.arguments))
            wide = flat_dtype(packed.dtype)
            views = prepared.views(packed)
            return (None, *((view.to(wide) * upstream.to(wide)).to(view.dtype) for view in views))
        if to_come:
            _, packed = prepared.scaled(upstream).with_grad()
            return (None, *prepared.views(packed))
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # A second backward pass may come, and AccumulateGrad may take the views for .grad: give them a copy.
            packed = packed.clone()
        operator("scale_unless_one_", packed.device.type)(packed, upstream)
        return (None, *prepared.views(packed))


class _TracedPenalty(torch.autograd.Function):
    """The penalty and its gradient for tracing, where every tensor is an argument and nothing is in place."""

    @staticmethod
    def forward(alpha: Tensor, l2: Tensor, n: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate both."""
        value, packed = PreparedPenalty(*_arguments(alpha, l2, n, tensors)).with_grad()
        return value, packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the gradient, and what a second derivative needs."""
        alpha, l2, n, *tensors = inputs
        _, packed = output
        ctx.n = n
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, alpha, l2, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient times the incoming one."""
        packed, alpha, l2, *tensors = ctx.saved_tensors
        nothing = (None,) * (len(tensors) - ctx.n)
        if upstream is None:
            return (None, None, None, *(None,) * ctx.n, *nothing)
        if torch.is_grad_enabled():
            return (
                None,
                None,
                None,
                *gradients_by_operations(upstream, _arguments(alpha, l2, ctx.n, tensors)),
                *nothing,
            )
        gradient = packed * upstream.to(packed.dtype)
        return (None, None, None, *packed_views(gradient, tensors[: ctx.n]), *nothing)


class _TransformedPenalty(_TracedPenalty):
    """The penalty and its gradient under functorch transforms, with forward mode, which tracing does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what forward mode needs too."""
        _TracedPenalty.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output[1], *inputs[3 : 3 + ctx.n])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        """Return the value's change along a direction."""
        packed, *theta = ctx.saved_tensors
        return _along(packed, theta, tangents[3 : 3 + ctx.n]), None


def _along(packed: Tensor, theta: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """Return the inner product of the packed gradient and a direction."""
    wide = flat_dtype(packed.dtype)
    change = torch.zeros((), dtype=wide, device=packed.device)
    for gradient, tangent in zip(packed_views(packed, theta), tangents, strict=True):
        if tangent is not None:
            change = change + (gradient.to(wide) * tangent.to(wide)).sum()
    return change


def _arguments(alpha: Tensor, l2: Tensor, n: int, tensors: Sequence[Tensor]) -> PenaltyArguments:
    """Undo the concatenation of theta, theta_hat, fisher and offset, the last of which may be empty."""
    theta, theta_hat, fisher, offset = (list(tensors[k * n : (k + 1) * n]) for k in range(4))
    return PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2)
