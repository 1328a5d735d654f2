"""Grad samples: the per-sample gradients that one call contributed to an operand, in their cheapest form.

The gradient of sample n is the sum over all uses of a parameter, and it must be summed before it is squared; the
forms here say how (:mod:`wplfast.capture.collect.squares` does it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import ops
from ...ops.layout import flat_dtype
from ..call import Operand
from ..sample_layout import SampleLayout
from .projection import Direction

#: Per-sample gradients are materialised for at most this many elements at a time.
MAX_ELEMENTS = 1 << 24

#: And for fewer on a CPU where they go through one function after the other: they stay in its caches.
MAX_CACHED = 1 << 20


class GradSample(ABC):
    """What one call contributed to the per-sample gradients of one operand."""

    def __init__(self, operand: Operand, n_samples: int, rule: str) -> None:
        """Describe a use; ``rule`` names the rule for the report."""
        self.operand, self.n_samples, self.rule = operand, n_samples, rule

    @property
    def served_by(self) -> tuple[str, ...]:
        """What the report names: the rule, and how the gradients were had if that costs a loop over samples."""
        return (self.rule,)

    @property
    def source(self) -> tuple[int, ...]:
        """Identify what the gradients are made of: uses of one source differ by factors alone."""
        return (id(self),)

    @abstractmethod
    def per_sample(self, samples: range) -> Tensor:
        """Return the gradients of some samples, [len(samples), *operand.shape], float32 or wider."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return ``sum_n weights[n] g_n`` (weights float64 [N]), in the shape of the operand."""
        total = torch.zeros_like(self.operand.value, dtype=flat_dtype(self.operand.value.dtype))
        for samples in chunks(self.n_samples, self.operand.value.numel()):
            grads = self.per_sample(samples)
            total += torch.tensordot(weights[samples.start : samples.stop].to(grads), grads, 1)
        return total

    def projected(self, direction: Direction) -> Tensor | None:
        """Return the projections of all samples' gradients, [N, k], where they cost less than the gradients."""
        return None

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor | None:
        """Return ``factor * g_n``, summed to a smaller shape that spreads to the operand's: [N, *shape].

        None where that is not cheaper than all gradients.
        """
        return None

    def weighed(self, factors: Tensor) -> Tensor | None:
        """Return ``sum_n factors[n] * g_n``, where factors [N, *S] spread to the operand's shape; None as above."""
        return None

    def joined(self, others: Sequence[GradSample]) -> GradSample | None:
        """Return one use that stands for the sum of this and others of its class; None if there is no such form."""
        return None if others else self

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Add squares to ``fisher`` (of the operand's shape) without the per-sample gradients; False if that cannot be.

        Args:
            fisher: accumulator, which may be a strided view.
            gradient: optional accumulator of plain gradients, of the same shape and strides.
            weights: optional weights [N], float64.
        """
        return False


class FactoredGradSample(GradSample):
    """Gradients that are products of small factors: ``g_n = G_n^T A_n``."""

    def __init__(self, operand: Operand, rule: str, activations: Tensor, grad_outputs: Tensor) -> None:
        """Take A [N, T, D_in] and G [N, T, D_out] for an operand that is a matrix [D_out, D_in] in some shape."""
        super().__init__(operand, activations.shape[0], rule)
        self.activations, self.grad_outputs = activations, grad_outputs

    @property
    def is_by_rows(self) -> bool:
        """Whether the operand is a matrix with the rows of G and the columns of A, and not all row or all column."""
        return (self.grad_outputs.shape[2], self.activations.shape[2]) == self.operand.value.shape

    @property
    def source(self) -> tuple[int, ...]:
        """The factors."""
        return id(self.activations), id(self.grad_outputs)

    def per_sample(self, samples: range) -> Tensor:
        """Multiply the factors of some samples."""
        chosen = slice(samples.start, samples.stop)
        wide = flat_dtype(self.activations.dtype)
        product = self.grad_outputs[chosen].to(wide).transpose(1, 2) @ self.activations[chosen].to(wide)
        return product.view(len(product), *self.operand.value.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum with one product."""
        wide = flat_dtype(self.activations.dtype)
        scaled = self.grad_outputs.to(wide) * weights.to(self.grad_outputs.device, wide).view(-1, 1, 1)
        total = scaled.flatten(0, 1).t() @ self.activations.to(wide).flatten(0, 1)
        return total.view(self.operand.value.shape)

    def projected(self, direction: Direction) -> Tensor | None:
        """Project both factors, where they are about the rows and columns that the direction is about."""
        return direction.of_products(self.grad_outputs, self.activations)

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor | None:
        """Contract one of the factors with the matrix first, if that is one."""
        matrix, a, g = self.operand.value.shape, self.activations, self.grad_outputs
        if not self.is_by_rows:
            return None
        wide, sizes = flat_dtype(a.dtype), padded(shape, 2)
        a, g, factor = a.to(wide), g.to(wide), factor.to(wide).expand(matrix)
        if sizes in ((matrix[0], 1), (1, 1)):
            sums = (g * (a @ factor.t())).sum(1)
            sums = sums if sizes[0] == matrix[0] else sums.sum(1)
        elif sizes == (1, matrix[1]):
            sums = (a * (g @ factor)).sum(1)
        else:
            return None
        return sums.reshape(len(sums), *shape)

    def weighed(self, factors: Tensor) -> Tensor | None:
        """Weigh the rows of one of the factors, if the operand is a matrix; then one product serves all samples."""
        a, g = self.activations, self.grad_outputs
        wide, sizes = flat_dtype(a.dtype), padded(factors.shape[1:], 2)
        if not self.is_by_rows or 1 not in sizes:
            return None
        a, g, factors = a.to(wide), g.to(wide), factors.to(wide).view(len(factors), 1, -1)
        a, g = (a, g * factors) if sizes[1] == 1 else (a * factors, g)
        return g.flatten(0, 1).t() @ a.flatten(0, 1)

    def joined(self, others: Sequence[GradSample]) -> GradSample | None:
        """Join the rows along T: their products then sum before the square. Factors of other widths do not join."""
        if not others:
            return self
        uses = [self, *(use for use in others if isinstance(use, FactoredGradSample))]
        widths = {(use.grad_outputs.shape[2], use.activations.shape[2]) for use in uses}
        if len(widths) > 1:
            return None
        a = torch.cat([use.activations for use in uses], 1)
        g = torch.cat([use.grad_outputs for use in uses], 1)
        return FactoredGradSample(self.operand, self.rule, a, g)

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Call the fused operator, on the transposed product where the accumulator is transposed."""
        a, g = self.activations, self.grad_outputs
        if fisher.is_contiguous():
            shape = (g.shape[2], a.shape[2])
            fisher, gradient = fisher.view(shape), None if gradient is None else gradient.view(shape)
        elif fisher.dim() == 2 and fisher.t().is_contiguous():
            a, g, fisher, gradient = g, a, fisher.t(), None if gradient is None else gradient.t()
        else:
            return False
        a, g = widened(a, fisher), widened(g, fisher)
        a, g = (t if t.stride(2) == 1 or t.shape[2] <= 1 else t.contiguous() for t in (a, g))
        ops.fisher_linear_(fisher, a, g, weights, gradient)
        return True


class SummedGradSample(GradSample):
    """Gradients that are small enough to be at hand."""

    def __init__(self, operand: Operand, rule: str, grads: Tensor) -> None:
        """Take the gradients [N, *operand.shape], float32 or wider."""
        super().__init__(operand, grads.shape[0], rule)
        self.grads = grads

    def per_sample(self, samples: range) -> Tensor:
        """Slice them."""
        return self.grads[samples.start : samples.stop]

    def projected(self, direction: Direction) -> Tensor:
        """Project them."""
        return direction.of(self.grads)

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor:
        """Multiply and sum."""
        sums = (self.grads * factor.to(self.grads)).sum_to_size(len(self.grads), *padded(shape, self.grads.dim() - 1))
        return sums.reshape(-1, *shape)

    def weighed(self, factors: Tensor) -> Tensor:
        """Multiply and sum."""
        return (self.grads * factors.to(self.grads)).sum(0)

    def joined(self, others: Sequence[GradSample]) -> GradSample:
        """Add them up."""
        if not others:
            return self
        parts = [self.grads, *(use.grads for use in others if isinstance(use, SummedGradSample))]
        return SummedGradSample(self.operand, self.rule, torch.stack(parts).sum(0))

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Square and add."""
        if not fisher.is_contiguous():
            return False
        add_squares(self.grads, fisher, gradient, weights)
        return True


class MaskedGradSample(GradSample):
    """The gradient of an operand that has a sample axis itself, such as an expanded token: masked to each sample."""

    def __init__(
        self,
        operand: Operand,
        rule: str,
        layout: SampleLayout,
        gradient: Tensor,
        part: Callable[[Tensor], Tensor] = lambda whole: whole,
    ) -> None:
        """Take the gradient of an output, who owns its elements, and the part that the operand was broadcast to."""
        super().__init__(operand, layout.n_samples, rule)
        self.layout, self.gradient, self.part = layout, gradient, part

    @property
    def served_by(self) -> tuple[str, ...]:
        """The whole gradient is masked once for each sample."""
        return self.rule, "masked"

    def per_sample(self, samples: range) -> Tensor:
        """Mask and sum over what was broadcast."""
        wide, shape = flat_dtype(self.gradient.dtype), self.operand.value.shape
        masked = (self.part(self.layout.only(self.gradient, n)) for n in samples)
        return torch.stack([gradient.to(wide).sum_to_size(shape) for gradient in masked])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh all elements at once."""
        wide = flat_dtype(self.gradient.dtype)
        scaled = self.layout.scale(self.gradient.to(wide), weights.to(self.gradient.device))
        return self.part(scaled).sum_to_size(self.operand.value.shape)


def widened(tensor: Tensor, accumulator: Tensor) -> Tensor:
    """Bring a factor to the accumulator's type, if the operation ran in a narrower or wider one than its parameter."""
    return tensor if flat_dtype(tensor.dtype) == accumulator.dtype else tensor.to(accumulator.dtype)


def padded(shape: Sequence[int], n_dims: int) -> tuple[int, ...]:
    """Return a shape with ones in front."""
    return (1,) * (n_dims - len(shape)) + tuple(shape)


def add_squares(grads: Tensor, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> None:
    """Square and accumulate per-sample gradients [N, *S]; ``fisher`` is contiguous."""
    grads = grads.to(fisher.dtype).contiguous()
    ops.accumulate_squares_(fisher, grads, weights)
    if gradient is not None:
        add_weighted(grads, gradient, weights)


def add_weighted(grads: Tensor, gradient: Tensor, weights: Tensor | None) -> None:
    """Add per-sample gradients [N, *S], weighted, to the accumulator of plain gradients."""
    ones = torch.ones(len(grads), dtype=grads.dtype, device=grads.device)
    gradient += torch.tensordot(ones if weights is None else weights.to(grads.dtype), grads, 1)


def weights_of(weights: Tensor | None, samples: range) -> Tensor | None:
    """Return the weights of some samples, as operators take them."""
    return None if weights is None else weights[samples.start : samples.stop].contiguous()


def chunks(n_samples: int, numel: int, cached: bool = False) -> list[range]:
    """Split the samples so that [chunk, numel] stays within MAX_ELEMENTS, or MAX_CACHED if it is to stay in caches."""
    step = max(1, (min(MAX_ELEMENTS, MAX_CACHED) if cached else MAX_ELEMENTS) // max(1, numel))
    return [range(first, min(first + step, n_samples)) for first in range(0, n_samples, step)]
