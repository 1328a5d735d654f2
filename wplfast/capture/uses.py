"""Uses of a source in one batch: each gives the per-sample gradients that one call contributed, in its cheapest form.

The gradient of sample n is the sum over all uses of a parameter, and it must be summed before it is squared; the
forms here say how (:mod:`.reduce` does it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..ops.layout import flat_dtype
from .call import Source

#: Per-sample gradients are materialised for at most this many elements at a time.
MAX_ELEMENTS = 1 << 24


class Use(ABC):
    """What one call contributed to the per-sample gradients of one source."""

    def __init__(self, source: Source, n_samples: int, rule: str) -> None:
        """Describe a use; ``rule`` names the rule for the report."""
        self.source, self.n_samples, self.rule = source, n_samples, rule

    @abstractmethod
    def per_sample(self, samples: range) -> Tensor:
        """Return the gradients of some samples, [len(samples), *source.shape], float32 or wider."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return ``sum_n weights[n] g_n`` (weights float64 [N]), in the shape of the source."""
        total = torch.zeros_like(self.source.value, dtype=flat_dtype(self.source.value.dtype))
        for samples in chunks(self.n_samples, self.source.value.numel()):
            grads = self.per_sample(samples)
            total += torch.tensordot(weights[samples.start : samples.stop].to(grads), grads, 1)
        return total


class FactoredUse(Use):
    """Gradients that are products of small factors: ``g_n = G_n^T A_n``."""

    def __init__(self, source: Source, rule: str, activations: Tensor, grad_outputs: Tensor) -> None:
        """Take A [N, T, D_in] and G [N, T, D_out] for a source of shape [D_out, D_in]."""
        super().__init__(source, len(activations), rule)
        self.activations, self.grad_outputs = activations, grad_outputs

    def per_sample(self, samples: range) -> Tensor:
        """Multiply the factors of some samples."""
        chosen = slice(samples.start, samples.stop)
        wide = flat_dtype(self.activations.dtype)
        return self.grad_outputs[chosen].to(wide).transpose(1, 2) @ self.activations[chosen].to(wide)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum with one product."""
        wide = flat_dtype(self.activations.dtype)
        scaled = self.grad_outputs.to(wide) * weights.to(self.grad_outputs.device, wide).view(-1, 1, 1)
        return scaled.flatten(0, 1).t() @ self.activations.to(wide).flatten(0, 1)


class SummedUse(Use):
    """Gradients that are small enough to be at hand."""

    def __init__(self, source: Source, rule: str, grads: Tensor) -> None:
        """Take the gradients [N, *source.shape], float32 or wider."""
        super().__init__(source, len(grads), rule)
        self.grads = grads

    def per_sample(self, samples: range) -> Tensor:
        """Slice them."""
        return self.grads[samples.start : samples.stop]


def chunks(n_samples: int, numel: int) -> list[range]:
    """Split the samples so that [chunk, numel] stays within MAX_ELEMENTS."""
    step = max(1, MAX_ELEMENTS // max(1, numel))
    return [range(first, min(first + step, n_samples)) for first in range(0, n_samples, step)]
