"""Recipes: what a call whose sample layout is known does with a gradient, bound once and run in every steady batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ...ops.contract import kernel
from ...ops.expect import FLOATING
from ...ops.layout import flat_dtype
from ..accumulators import Accumulators
from ..call import Call
from ..sample_layout import AxisLayout, OneSample, SampleLayout, sum_to
from .grad_sample import add_squares, add_weighted

#: Called with a call, its inputs and its outputs' gradients; adds squares to the accumulators it was bound to.
Recipe: TypeAlias = Callable[[Call, Sequence[Tensor], Sequence[Tensor | None]], None]


class ProductRecipe:
    """The recipe of ``y = x W^T + b`` where W and b are whole parameters: the fused kernels on G and A as they lie.

    Args:
        name: of the rule.
        accumulators: what squares are added to.
        layout: of the output, whose rows samples own.
        shape: of the output.
        weight: index of W.
        bias: index of b; None if there is none.
        transposed: the parameter is W^T [D_in, D_out] instead of W [D_out, D_in].
    """

    def __init__(
        self,
        name: str,
        accumulators: Accumulators,
        layout: SampleLayout,
        shape: torch.Size,
        weight: int,
        bias: int | None,
        transposed: bool = False,
    ) -> None:
        self._accumulators, self._layout, self._transposed = accumulators, layout, transposed
        self._is_plain = len(shape) == 2 and shape[0] == layout.n_samples and layout.has_rows(2)  # a row a sample
        self._weight, self._bias = weight, bias
        like = accumulators.like[weight]
        self._wide = like.dtype
        self._as_they_are = {dtype for dtype in FLOATING if flat_dtype(dtype) == self._wide}
        device = like.device.type
        self._fisher_linear_ = kernel("fisher_linear_", device)
        self._accumulate_squares_ = kernel("accumulate_squares_", device)
        for index in (weight, bias):
            if index is not None:
                accumulators.rules[index].add(name)

    def __call__(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Square one batch's gradients."""
        (x,), gradient = inputs, grads[0]
        if gradient is None:
            return
        if x.dtype is not gradient.dtype:
            x = x.to(gradient.dtype)
        if x.dtype not in self._as_they_are:
            x, gradient = x.to(self._wide), gradient.to(self._wide)
        if self._is_plain:
            a, g = x.unsqueeze(1), gradient.unsqueeze(1)
        else:
            a, g = self._layout.rows(x), self._layout.rows(gradient)
        a, g = (t if t.stride(2) == 1 or t.shape[2] <= 1 else t.contiguous() for t in (a, g))
        into, weights = self._accumulators.fisher, self._accumulators.weights
        plain = self._accumulators.gradient
        factors = (g, a) if self._transposed else (a, g)
        of_weight = None if plain is None else plain[self._weight]
        self._fisher_linear_(into[self._weight], *factors, weights, of_weight)
        if self._bias is not None:
            sums = g[:, 0] if g.shape[1] == 1 else g.sum(1, dtype=self._wide)
            sums = sums.to(self._wide).contiguous()
            self._accumulate_squares_(into[self._bias], sums, weights)
            if plain is not None:
                add_weighted(sums, plain[self._bias], weights)


class SumRecipe:
    """The recipe of ``y = x + f p`` where p is a whole parameter: the squares of sums over what p was broadcast along.

    Args:
        name: of the rule.
        accumulators: what squares are added to.
        layout: of the output, which :func:`.sample_layout.sum_to` serves.
        shape: of p.
        index: of p.
        factor: f.
    """

    def __init__(
        self,
        name: str,
        accumulators: Accumulators,
        layout: AxisLayout | OneSample,
        shape: torch.Size,
        index: int,
        factor: float,
    ) -> None:
        self._accumulators, self._layout, self._shape = accumulators, layout, shape
        self._index, self._factor = index, factor
        accumulators.rules[index].add(name)

    def __call__(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Square one batch's gradients."""
        gradient = grads[0]
        if gradient is None:
            return
        sums = sum_to(self._layout, gradient, self._shape)
        sums = sums if self._factor == 1 else sums * self._factor
        into = self._accumulators
        add_squares(sums, into.fisher[self._index], into.gradient_of(self._index), into.weights)
