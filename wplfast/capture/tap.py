"""The tap: an identity behind each call that consumes parameters, which sees the gradient of the call's output.

The call itself runs natively with its parameters as constants, so autograd computes the data's gradient as always and
skips the weight gradients. The tap saves the call's data (for a linear layer the very tensor autograd would have
saved), hands it to the session together with the output's gradient, and passes that gradient on unchanged. Its output
is a detached alias, not a view, so in-place operations on it stay legal and version counters still guard it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .call import Call
from .rules import Rule


class Listener(Protocol):
    """What receives the gradients."""

    def event(self, site: Site, data: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Take the gradients of a site's outputs; return the ordinary gradients of its sources, or Nones."""


class Site:
    """One call of one forward pass, as its tap and the session know it."""

    __slots__ = ("call", "fired", "key", "late", "listener", "rule", "shapes")

    def __init__(self, call: Call, rule: Rule, key: tuple[Any, ...], late: bool, listener: Listener) -> None:
        """Describe a call; ``late`` tells that it ran inside a backward pass (reentrant checkpointing)."""
        self.call, self.rule, self.key, self.late, self.listener = call, rule, key, late, listener
        self.shapes: list[torch.Size] = []
        self.fired = False

    @property
    def parameters(self) -> set[int]:
        """Return the indices of the watched parameters that the call uses."""
        return {index for source in self.call.sources for index in source.parameters}

    def tap(self, outputs: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        """Return the outputs, tapped."""
        self.shapes = [output.shape for output in outputs]
        leaves = [source.leaf for source in self.call.sources]
        if not self.rule.needs_data(self.call):
            data = []
        tapped = _Tap.apply(self, data, len(outputs), *outputs, *leaves)  # type: ignore[no-untyped-call]
        return list(tapped)


class _Tap(torch.autograd.Function):
    """Identity on the outputs; the sources' leaves tie it to the graph and take the ordinary gradients if wanted."""

    @staticmethod
    def forward(ctx: Any, site: Site, data: list[Tensor], n_outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Alias the outputs."""
        ctx.site = site
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*data)
        return tuple(output.detach() for output in tensors[:n_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradients and pass them on."""
        of_sources = ctx.site.listener.event(ctx.site, ctx.saved_tensors, grads)
        return (None, None, None, *grads, *of_sources)
