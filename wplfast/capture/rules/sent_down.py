"""Grad samples of parameters below a derived tensor, as the chain rule leaves them: scaled, or spread over a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Operand
from .grad_sample import GradSample, padded
from .projection import Direction


class ScaledGradSample(GradSample):
    """Gradients of another use, times a tensor that all samples share: of a masked weight."""

    def __init__(self, use: GradSample, scale: Tensor) -> None:
        """Take the use of an operand, and factors that spread to its shape."""
        super().__init__(use.operand, use.n_samples, use.rule)
        self.use, self.scale = use, scale

    @property
    def source(self) -> tuple[int, ...]:
        """That of the other use."""
        return self.use.source

    def per_sample(self, samples: range) -> Tensor:
        """Scale the gradients."""
        grads = self.use.per_sample(samples)
        return grads * self.scale.to(grads.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Scale their sum."""
        total = self.use.weighted_sum(weights)
        return total * self.scale.to(total.dtype)

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Scale what the fused operator adds up in memory of its own."""
        squares = torch.zeros_like(fisher, memory_format=torch.contiguous_format)
        plain = None if gradient is None else torch.zeros_like(squares)
        if not self.use.accumulate(squares, plain, weights):
            return False
        scale = self.scale.to(fisher.dtype)
        fisher.addcmul_(squares, scale.square())
        if gradient is not None and plain is not None:
            gradient.addcmul_(plain, scale)
        return True

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor | None:
        """Contract with both factors."""
        return self.use.contracted((factor * self.scale).expand(self.operand.value.shape), shape)

    def weighed(self, factors: Tensor) -> Tensor | None:
        """Scale the weighed sum."""
        total = self.use.weighed(factors)
        return None if total is None else total * self.scale.to(total.dtype)


class SpreadGradSample(GradSample):
    """Gradients ``g_n = c_n * D``: those of a norm or a mean that goes into all elements of a row, say."""

    def __init__(self, operand: Operand, rule: str, factors: Tensor, matrix: Tensor) -> None:
        """Take c [N, *S], S spreading to the shape of the operand, and D of that shape; float32 or wider."""
        super().__init__(operand, len(factors), rule)
        self.factors, self.matrix = factors, matrix

    def per_sample(self, samples: range) -> Tensor:
        """Spread them."""
        return self.factors[samples.start : samples.stop] * self.matrix

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh the factors."""
        total: Tensor = torch.tensordot(weights.to(self.factors), self.factors, 1) * self.matrix
        return total

    def projected(self, direction: Direction) -> Tensor | None:
        """Project the matrix where rows share a factor, or all elements do."""
        rows, columns = direction
        matrix, n = self.matrix.to(rows.dtype).reshape(len(rows), len(columns)), len(self.factors)
        if self.factors.numel() == n:
            return self.factors.reshape(n, 1).to(rows.dtype) * ((matrix @ columns) * rows).sum(0)
        if self.factors.shape[1:].numel() == self.factors.shape[1] == len(rows):
            return self.factors.reshape(n, -1).to(rows.dtype) @ ((matrix @ columns) * rows)
        return None

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor | None:
        """Contract the matrix first, as far as neither the factors nor the result tell its elements apart."""
        sizes = self.factors.shape[1:]
        kept = torch.broadcast_shapes(sizes, shape)
        if len(kept) == self.matrix.dim() and kept == self.matrix.shape:
            return None
        part = self.factors * (factor.to(self.matrix) * self.matrix).sum_to_size(kept)
        return part.sum_to_size(len(part), *padded(shape, len(kept))).reshape(-1, *shape)

    def weighed(self, factors: Tensor) -> Tensor | None:
        """Weigh the factors, unless that makes a matrix of each sample."""
        kept = torch.broadcast_shapes(self.factors.shape[1:], factors.shape[1:])
        if kept == self.matrix.shape and kept.numel() > max(self.factors[0].numel(), factors[0].numel()):
            return None
        return (self.factors * factors.to(self.factors)).sum(0) * self.matrix
