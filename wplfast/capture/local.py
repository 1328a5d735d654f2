"""The local backward pass of one call: run again on its saved data, with its sources requiring grad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call


class LocalBackward:
    """A call run again with its sources requiring grad."""

    def __init__(self, call: Call, data: Sequence[Tensor]) -> None:
        """Run the call."""
        with torch.enable_grad():
            self.sources = [source.value.detach().requires_grad_() for source in call.sources]
            self.outputs = call.run(self.sources, [tensor.detach() for tensor in data])

    def __call__(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the sources for gradients of the outputs."""
        pairs = [(o, g) for o, g in zip(self.outputs, grads, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(self.sources)
        outputs = [output for output, _ in pairs]
        of_outputs = [gradient.reshape(output.shape) for output, gradient in pairs]
        found = torch.autograd.grad(outputs, self.sources, of_outputs, retain_graph=True, allow_unused=True)
        return list(found)
