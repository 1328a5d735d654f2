"""The tap: an identity behind each call that consumes parameters, which sees the gradient of the call's output.

The call itself runs natively with its parameters as constants, so autograd computes the data's gradient as always and
skips the weight gradients. The tap saves the call's data (for a linear layer the very tensor autograd would have
saved), hands it to the session together with the output's gradient, and passes that gradient on unchanged. Its output
is a detached alias, not a view, so in-place operations on it stay legal and version counters still guard it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call import Call
from ..rules import Rule
from .product import multiply


class Listener(Protocol):
    """What receives the gradients."""

    def event(
        self, site: CallSite, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """Take the gradients of a site's outputs; return the ordinary gradients of its operands, or Nones."""


class CallSiteKey:
    """A site across batches: the count-th call of a function on the same operands. Compared by identity."""

    __slots__ = ("count", "keys")

    def __init__(self, keys: CallSiteKeys, count: int) -> None:
        """Describe a site; :class:`Keys` gives out one key for each."""
        self.keys, self.count = keys, count

    @property
    def name(self) -> str:
        """Return the function's name."""
        return self.keys.name

    @property
    def is_next(self) -> bool:
        """Tell whether the next call of the function on these operands is the one."""
        return self.keys.used == self.count


class CallSiteKeys:
    """The keys of the calls of one function on the same operands, given out in the same order in every batch."""

    def __init__(self, in_backward: bool, name: str) -> None:
        """Know none yet."""
        self.in_backward, self.name = in_backward, name
        self.used = 0
        self._keys: list[CallSiteKey] = []

    def next(self) -> CallSiteKey:
        """Return the key of the next call."""
        if self.used == len(self._keys):
            self._keys.append(CallSiteKey(self, self.used))
        self.used += 1
        return self._keys[self.used - 1]


class CallSite:
    """One call of one forward pass, as its tap and the session know it."""

    __slots__ = ("call", "fired", "in_backward", "key", "listener", "parameters", "rule", "shapes")

    def __init__(self, call: Call, rule: Rule, key: CallSiteKey, in_backward: bool, listener: Listener) -> None:
        """Describe a call; ``late`` tells that it ran inside a backward pass (reentrant checkpointing)."""
        self.call, self.rule, self.key, self.in_backward, self.listener = call, rule, key, in_backward, listener
        self.parameters = call.parameters  # indices of the watched parameters that the call uses
        self.shapes: list[torch.Size] = []
        self.fired = False

    def tap(self, outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs, tapped."""
        self.shapes = [output.shape for output in outputs]
        if not self.rule.needs_inputs(self.call):
            inputs = []
        return _tap(self, inputs, len(outputs), *outputs, *self.call.leaves)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the call, which is ``x W^T + b``, by oneDNN and tap it: one node of the graph instead of two."""
        result = _multiply(self, x, weight, bias, *self.call.leaves)
        self.shapes = [result.shape]
        return result


class _Tap(torch.autograd.Function):
    """Identity on the outputs; the operands' leaves tie it to the graph and take the ordinary gradients if wanted."""

    @staticmethod
    def forward(ctx: Any, site: CallSite, inputs: list[Tensor], n_outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Alias the outputs."""
        ctx.site = site
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(output.detach() for output in tensors[:n_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradients and pass them on."""
        of_operands = ctx.site.listener.event(ctx.site, ctx.saved_tensors, grads)
        return (None, None, None, *grads, *of_operands)


class _TappedProduct(torch.autograd.Function):
    """A product with a matrix of parameters, and the tap behind it."""

    @staticmethod
    def forward(ctx: Any, site: CallSite, x: Tensor, weight: Tensor, bias: Tensor | None, *leaves: Tensor) -> Tensor:
        """Multiply."""
        ctx.site, ctx.keeps = site, site.rule.needs_inputs(site.call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *([x] if ctx.keeps else []))
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradient, and send it through the matrix."""
        weight, *inputs = ctx.saved_tensors
        of_operands = ctx.site.listener.event(ctx.site, tuple(inputs), (gradient,))
        of_input = None
        if gradient is not None and ctx.needs_input_grad[1]:
            of_input = multiply(gradient, weight.t())
        return (None, of_input, None, None, *of_operands)


#: ``Function.apply`` without its check for functorch transforms, under which nothing is tapped anyway.
_tap: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Tap).apply
_multiply: Callable[..., Tensor] = super(torch.autograd.Function, _TappedProduct).apply
