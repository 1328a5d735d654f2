"""Any other call, exactly: the local backward pass of the call alone, once for each sample.

No loop over the model and no second forward pass of it: the call is run again on its saved data, on those of sample n
where it can be cut into samples, and the gradient of sample n's own elements is sent through it. Right under dropout
and routing: those happened before, and a call that drew random numbers itself draws the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.layout import flat_dtype
from ..call import Call, Source
from ..sample_layout import Ownership
from .base import Rule
from .grad_sample import Use
from .local import LocalBackward, SlicedCall


class LocalUse(Use):
    """Gradients that a local backward pass computes when they are asked for."""

    def __init__(
        self,
        source: Source,
        index: int,
        local: LocalBackward,
        sliced: SlicedCall,
        grads: Sequence[Tensor | None],
        owners: Sequence[Ownership | None],
        n_samples: int,
    ) -> None:
        """Keep what is needed for the source that stands at ``index``."""
        super().__init__(source, n_samples, GENERIC.name)
        self.index, self.local, self.sliced, self.grads, self.owners = index, local, sliced, grads, owners

    def per_sample(self, samples: range) -> Tensor:
        """Send each sample's own gradient through the call."""
        wide = flat_dtype(self.source.value.dtype)
        found = self.source.value.new_zeros((len(samples), *self.source.value.shape), dtype=wide)
        for row, sample in zip(found, samples, strict=True):
            of_sources = self.sliced(sample, self.grads) if self.sliced.works else None
            if of_sources is None:
                gradient = self._backward([o.only(g, sample) for g, o in self._owned()])
            else:
                gradient = of_sources[self.index]
            if gradient is not None:
                row.copy_(gradient.to_dense())
        return found

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh the outputs' gradients: one backward pass."""
        gradient = self._backward([o.scale(g, weights.to(g.device)) for g, o in self._owned()])
        return torch.zeros_like(self.source.value) if gradient is None else gradient.to_dense()

    def _owned(self) -> list[tuple[Tensor, Ownership]]:
        """List the gradients that are not zero, with their owners."""
        pairs = zip(self.grads, self.owners, strict=True)
        return [(gradient, owner) for gradient, owner in pairs if gradient is not None and owner is not None]

    def _backward(self, owned: list[Tensor]) -> Tensor | None:
        """Run the local backward pass with gradients for the owned outputs."""
        given = iter(owned)
        pairs = zip(self.grads, self.owners, strict=True)
        return self.local([None if g is None or o is None else next(given) for g, o in pairs])[self.index]


class GenericRule(Rule):
    """Serves every call."""

    name = "generic"
    fast = False

    def matches(self, call: Call) -> bool:
        """Match everything."""
        return True

    def uses(
        self,
        call: Call,
        data: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        owners: Sequence[Ownership | None],
    ) -> list[Use]:
        """Return lazy uses that share one local graph."""
        local = LocalBackward(call, data)
        if not any(output.requires_grad for output in local.outputs):
            return []  # x.to(weight) and the like: the result does not depend on the value
        sliced = SlicedCall(call, data, local, owners)
        n_samples = next(owner.n_samples for owner in owners if owner is not None)
        return [LocalUse(source, i, local, sliced, grads, owners, n_samples) for i, source in enumerate(call.sources)]


GENERIC = GenericRule()
