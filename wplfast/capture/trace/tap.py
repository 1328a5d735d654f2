"""The tap: an identity behind each call that consumes parameters, which sees the gradient of the call's output.

The call itself runs natively with its parameters as constants, so autograd computes the inputs' gradients as always and
skips the weight gradients. The tap saves the call's inputs (for a linear layer the very tensor autograd would have
saved), hands them on together with the output's gradient, and passes that gradient on unchanged. Its output is a
detached alias, not a view, so in-place operations on it stay legal and version counters still guard it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..call import in_order
from ..call_site import TappedCall
from .nested import current_task, listener_of


def tap(tapped: TappedCall, outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs of a call, tapped."""
    tapped.shapes = [output.shape for output in outputs]
    if not tapped.rule.needs_inputs(tapped.call):
        inputs = []
    return _apply(tapped, inputs, len(outputs), *outputs, *tapped.call.leaves)


class _Tap(torch.autograd.Function):
    """Identity on the outputs; the operands' leaves tie it to the graph and take ordinary gradients if wanted."""

    @staticmethod
    def forward(
        ctx: Any, tapped: TappedCall, inputs: list[Tensor], n_outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Alias the outputs."""
        ctx.tapped = tapped
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(output.detach() for output in tensors[:n_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradients and pass them on."""
        tapped = ctx.tapped
        relay = tapped.relay
        listener = relay.listener if current_task() == relay.task else listener_of(ctx, tapped)
        of_operands = listener.receive(tapped, ctx.saved_tensors, grads)
        if tapped.call.name == "batch_norm":
            grads = tuple(map(in_order, grads))
        return (None, None, None, *grads, *of_operands)


#: ``Function.apply`` without its check for functorch transforms, under which nothing is tapped anyway.
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Tap).apply

#: The type of its nodes in a graph.
TAP_NODE: type = _Tap._backward_cls
