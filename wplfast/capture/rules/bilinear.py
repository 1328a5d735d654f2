"""``F.bilinear`` over any leading dimensions: gradients of three factors, two of which are multiplied to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.layout import flat_dtype
from ..call import Call, Operand
from ..sample_layout import SampleLayout
from .base import OneOutputRule, summed
from .grad_sample import GradSample, chunks, weights_of

_ARGUMENTS = ("input1", "input2", "weight", "bias")


class BilinearRule(OneOutputRule):
    """y_k = x1^T W_k x2 + b_k: the gradient of W is G_k x1_i x2_j summed over rows, which all three tensors share."""

    name = "bilinear"

    def matches(self, call: Call) -> bool:
        """Match F.bilinear of data on either side or on both, with a weight that is not data."""
        if call.func is not F.bilinear or call.is_input(2, "weight"):
            return False
        return call.is_input(0, "input1") or call.is_input(1, "input2")

    def needs_inputs(self, call: Call) -> bool:
        """The bias alone does not need the inputs."""
        return any(call.operand_at(i, _ARGUMENTS[i]) is not None for i in range(3))

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return three factors for the weight, a sum for the bias, and gradients for a parameter on one side."""
        found: list[GradSample] = []
        if self.needs_inputs(call):
            if not layout.has_rows(gradient.dim()):
                return None
            x1, x2, w = (call.tensor_at(i, _ARGUMENTS[i], inputs) for i in range(3))
            assert x1 is not None
            assert x2 is not None
            assert w is not None
            left, right, weight, _ = (call.operand_at(i, name) for i, name in enumerate(_ARGUMENTS))
            if weight is not None:
                factors = [layout.rows(gradient), layout.rows(x1), layout.rows(x2)]
                found.append(TrilinearGradSample(weight, self.name, factors))
            x1, x2, w = (tensor.to(gradient.dtype) for tensor in (x1, x2, w))
            if left is not None:  # sum_jk W_kij x2_j G_k is bilinear too
                found.append(summed(left, self.name, layout, F.bilinear(x2, gradient, w.permute(1, 2, 0))))
            if right is not None:
                found.append(summed(right, self.name, layout, F.bilinear(x1, gradient, w.permute(2, 1, 0))))
        bias = call.operand_at(3, "bias")
        if bias is not None:
            found.append(summed(bias, self.name, layout, gradient))
        return found

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sum G over all rows where the bias is alone: there are no inputs to run the call again on."""
        gradient = grads[0]
        if self.needs_inputs(call) or gradient is None:
            return super().ordinary(call, inputs, grads)
        return [gradient.reshape(-1, gradient.shape[-1]).sum(0)]


class TrilinearGradSample(GradSample):
    """Gradients ``g_n[k, i, j] = sum_t P[n, t, k] Q[n, t, i] R[n, t, j]``, as matrix products of two factors.

    The middle factor is multiplied with the smaller of the other two, for some samples at a time: [T, I J] elements a
    sample, or [T, K I], and none to speak of where K or J is 1.
    """

    def __init__(self, operand: Operand, rule: str, factors: Sequence[Tensor]) -> None:
        """Take P [N, T, K], Q [N, T, I] and R [N, T, J] for an operand [K, I, J]."""
        super().__init__(operand, factors[0].shape[0], rule)
        self.factors = tuple(factors)

    def per_sample(self, samples: range) -> Tensor:
        """Multiply the factors of some samples."""
        g, a = _two(self.factors, samples, flat_dtype(self.operand.value.dtype))
        return (g.transpose(1, 2) @ a).view(-1, *self.operand.value.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum with one product for some samples at a time."""
        wide = flat_dtype(self.operand.value.dtype)
        total = torch.zeros_like(self.operand.value, dtype=wide, memory_format=torch.contiguous_format)
        for samples in self._chunks(self.factors):
            g, a = _two(self.factors, samples, wide)
            g = g * weights[samples.start : samples.stop].to(g).view(-1, 1, 1)
            total += (g.flatten(0, 1).t() @ a.flatten(0, 1)).view(total.shape)
        return total

    def joined(self, others: Sequence[GradSample]) -> GradSample:
        """Join the rows along T: their products then sum before the square."""
        if not others:
            return self
        uses = [self, *(use for use in others if isinstance(use, TrilinearGradSample))]
        wide = flat_dtype(self.operand.value.dtype)
        parts = zip(*(use.factors for use in uses), strict=True)
        return TrilinearGradSample(
            self.operand, self.rule, [torch.cat([x.to(wide) for x in part], 1) for part in parts]
        )

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Call the fused operator, with the factors in the order in which the accumulator lies in memory."""
        order = sorted(range(3), key=fisher.stride, reverse=True)
        fisher = fisher.permute(order)
        gradient = None if gradient is None else gradient.permute(order)
        if not fisher.is_contiguous() or not (gradient is None or gradient.is_contiguous()):
            return False
        factors = [self.factors[i] for i in order]
        for samples in self._chunks(factors):
            g, a = _two(factors, samples, fisher.dtype)
            shape = (g.shape[2], a.shape[2])
            plain = None if gradient is None else gradient.view(shape)
            ops.fisher_linear_(fisher.view(shape), a, g, weights_of(weights, samples), plain)
        return True

    def _chunks(self, factors: Sequence[Tensor]) -> list[range]:
        """Split the samples by the size of the joined factor."""
        sizes = [factor.shape[2] for factor in factors]
        return chunks(self.n_samples, factors[0].shape[1] * sizes[1] * min(sizes[0], sizes[2]))


def _two(factors: Sequence[Tensor], samples: range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return some samples' factors as G [n, T, K I] and A [n, T, J], or G [n, T, K] and A [n, T, I J]."""
    first, middle, last = (factor[samples.start : samples.stop].to(dtype) for factor in factors)
    if first.shape[2] < last.shape[2]:
        return _products(first, middle), last.contiguous()
    return first.contiguous(), _products(middle, last)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of each row's elements, [n, T, D_a D_b]."""
    return (a.unsqueeze(3) * b.unsqueeze(2)).flatten(2)


BILINEAR = BilinearRule()
