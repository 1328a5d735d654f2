"""Gradients that arrive at parameters, their leaves and derived tensors: what autograd itself computed in a pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import as_real
from ..trace.intercept import Interception


class LeafGrads:
    """Where ordinary gradients land during a pass, and nothing else should."""

    def __init__(self, parameters: list[Tensor], interception: Interception) -> None:
        """Look at the watched parameters and at what stands for them."""
        self._parameters, self._interception = parameters, interception
        self.caught: dict[int, Tensor] = {}

    def catch(self, index: int, parameter: Tensor) -> None:
        """Take a gradient that arrived at a parameter, as a hook, before an engine takes it."""
        with torch._C.DisableTorchFunctionSubclass():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self.caught[index] = self.caught[index] + gradient if index in self.caught else gradient

    def take(self) -> list[Tensor | None]:
        """Take the gradients that an ordinary backward pass left, down to the parameters; complex ones as real."""
        for derived in self._interception.derived:
            if derived.grad is not None:
                torch.autograd.backward(derived._graph, derived.grad.to(derived._graph.dtype), retain_graph=True)
                derived.grad = None
        gradients = []
        for index, (parameter, leaf) in enumerate(zip(self._parameters, self._interception.leaves, strict=True)):
            parts = [g.to_dense() for g in (leaf.grad, parameter.grad, self.caught.pop(index, None)) if g is not None]
            gradients.append(as_real(sum(parts[1:], parts[0])) if parts else None)
            leaf.grad = None
        return gradients

    def past_the_taps(self) -> set[int]:
        """Return the parameters that gradients arrived at directly: an operation used them that cannot be seen."""
        with torch._C.DisableTorchFunctionSubclass():
            found = {index for index, p in enumerate(self._parameters) if p.grad is not None} | self.caught.keys()
            for derived in self._interception.derived:
                if derived.grad is not None:
                    found |= set(derived._parameters)
        return found

    def drop(self) -> None:
        """Clear the gradients that a pass left."""
        self.caught.clear()
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in (*self._parameters, *self._interception.leaves, *self._interception.derived):
                tensor.grad = None
