"""Any other call, exactly: the local backward pass of the call alone, once for each sample.

No loop over the model and no second forward pass of it: the call is run again on its saved data, on those of sample n
where it can be cut into samples, and the gradient of sample n's own elements is sent through it. Right under dropout
and routing: those happened before, and a call that drew random numbers itself draws the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.layout import as_real, flat_dtype
from ..call import Call, Operand
from ..sample_layout import SampleLayout
from .base import Rule
from .complex import real_operand
from .grad_sample import GradSample
from .local import LocalBackward, SlicedCall


class LocalGradSample(GradSample):
    """Gradients that a local backward pass computes when they are asked for."""

    def __init__(
        self,
        operand: Operand,
        index: int,
        local: LocalBackward,
        sliced: SlicedCall,
        grads: Sequence[Tensor | None],
        layouts: Sequence[SampleLayout | None],
        n_samples: int,
    ) -> None:
        """Keep what is needed for the operand that stands at ``index``."""
        super().__init__(real_operand(operand), n_samples, GENERIC.name)
        self.index, self.local, self.sliced, self.grads, self.layouts = index, local, sliced, grads, layouts

    def per_sample(self, samples: range) -> Tensor:
        """Send each sample's own gradient through the call."""
        wide = flat_dtype(self.operand.value.dtype)
        together = self.sliced.together(samples, self.grads) if self.sliced.works else None
        if together is not None:
            return as_real(together[self.index]).to(wide)
        found = self.operand.value.new_zeros((len(samples), *self.operand.value.shape), dtype=wide)
        for row, sample in zip(found, samples, strict=True):
            of_operands = self.sliced(sample, self.grads) if self.sliced.works else None
            if of_operands is None:
                gradient = self._backward([o.only(g, sample) for g, o in self._owned()])
            else:
                gradient = of_operands[self.index]
            if gradient is not None:
                row.copy_(as_real(gradient.to_dense()))
        return found

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh the outputs' gradients: one backward pass."""
        gradient = self._backward([o.scale(g, weights.to(g.device)) for g, o in self._owned()])
        return torch.zeros_like(self.operand.value) if gradient is None else as_real(gradient.to_dense())

    def _owned(self) -> list[tuple[Tensor, SampleLayout]]:
        """List the gradients that are not zero, with their layouts."""
        pairs = zip(self.grads, self.layouts, strict=True)
        return [(gradient, layout) for gradient, layout in pairs if gradient is not None and layout is not None]

    def _backward(self, owned: list[Tensor]) -> Tensor | None:
        """Run the local backward pass with gradients for the owned outputs."""
        given = iter(owned)
        pairs = zip(self.grads, self.layouts, strict=True)
        return self.local([None if g is None or o is None else next(given) for g, o in pairs])[self.index]


class GenericRule(Rule):
    """Serves every call."""

    name = "generic"
    fast = False

    def matches(self, call: Call) -> bool:
        """Match everything."""
        return True

    def grad_samples(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        layouts: Sequence[SampleLayout | None],
    ) -> list[GradSample]:
        """Return lazy uses that share one local graph."""
        local = LocalBackward(call, inputs)
        if not any(output.requires_grad for output in local.outputs):
            return []  # x.to(weight) and the like: the result does not depend on the value
        sliced = SlicedCall(call, inputs, local, layouts)
        n_samples = next(layout.n_samples for layout in layouts if layout is not None)
        return [
            LocalGradSample(operand, i, local, sliced, grads, layouts, n_samples)
            for i, operand in enumerate(call.operands)
        ]


GENERIC = GenericRule()
