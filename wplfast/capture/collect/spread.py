"""Squares of ``g_n = M_n + sum_k c_kn * D_k``: of a normalised weight, whose norm goes into all elements of a row.

M_n is a product of rows, or a convolution's, which a fused operator squares; each D_k is one matrix that all samples
share. So the squares are

    sum_n g_n^2 = sum_n M_n^2 + 2 sum_k D_k sum_n c_kn M_n + sum_kl D_k D_l sum_n c_kn c_ln,

one ordinary weight gradient for each k more than without the norm, and nothing of the weight's size for each sample.
What cancels here cancels between numbers of the squares' size: where too little is left, as of a gradient along the
weight itself, nothing is added, and the gradients are materialised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rules.grad_sample import GradSample
from ..rules.sent_down import SpreadGradSample

#: What must be left of the squares' norm: float32 then keeps an error of 1e-6.
LEAST_LEFT = 0.1

#: More terms than these are materialised.
_MOST_TERMS = 4


def accumulate(group: Sequence[GradSample], fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
    """Add squares of uses some of which are spread; False where there are none, or it must be done in another way.

    Args:
        group: uses of one parameter.
        fisher: its accumulator.
        gradient: optional accumulator of its plain gradient.
        weights: optional weights [N], float64.
    """
    terms = [use for use in group if isinstance(use, SpreadGradSample)]
    others = [use for use in group if not isinstance(use, SpreadGradSample)]
    if not 0 < len(terms) <= _MOST_TERMS or any(use.operand.value.shape != fisher.shape for use in group):
        return False
    squares = torch.zeros_like(fisher, memory_format=torch.contiguous_format)
    plain = None if gradient is None else torch.zeros_like(squares)
    main = None
    if others:
        main = others[0].joined(others[1:]) if len({type(use) for use in others}) == 1 else None
        if main is None or not main.accumulate(squares, plain, weights):
            return False
    most = squares.clone()
    factors = [term.factors if weights is None else _weighed(term.factors, weights) for term in terms]
    for k, (term, c) in enumerate(zip(terms, factors, strict=True)):
        if main is not None:
            cross = main.weighed(c)
            if cross is None:
                return False
            squares.addcmul_(term.matrix, cross, value=2)
        for other in terms[k:]:
            both = other.weighed(c)
            if both is None:
                return False
            squares.addcmul_(term.matrix, both, value=1 if other is term else 2)
        most += term.matrix.square() * (term.factors * c).sum(0)
        if plain is not None:
            plain += term.matrix * c.sum(0)
    top = most.amax()  # squares of squares would leave the range of numbers
    if not bool((squares / top).norm() >= LEAST_LEFT * (most / top).norm()):
        return False
    fisher += squares.clamp_min_(0)
    if gradient is not None and plain is not None:
        gradient += plain
    return True


def _weighed(factors: Tensor, weights: Tensor) -> Tensor:
    """Multiply factors [N, ...] by their samples' weights."""
    return factors * weights.to(factors).view(-1, *[1] * (factors.dim() - 1))
