"""The maths in plain PyTorch: the default backend on every device, and the oracle that tests run in float64.

Nothing here is fused or blocked beyond what keeps memory in bounds; it is meant to be read beside the formulas of
:mod:`wplfast.ops.contract`. The functions follow the contract's schemas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops.layout import flat_dtype, packed_starts, packed_views

#: Per-sample gradients of a linear layer are materialised for at most this many elements at a time.
MAX_ELEMENTS = 1 << 24


def accumulate_squares_(fisher: Tensor, grads: Tensor, weights: Tensor | None) -> None:
    """Fisher += sum_n w_n grads[n]^2, summed in float64: N may be large."""
    squares = grads.double().square()
    if weights is not None:
        squares *= weights.double().view(-1, *[1] * fisher.dim())
    fisher.add_(squares.sum(0))


def fisher_linear_(
    fisher: Tensor, activations: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Fisher += sum_n w_n (G_n^T A_n)^2; T = 1 needs no product per sample: (G^2)^T A^2."""
    n, t, _ = activations.shape
    a, g = activations.to(fisher.dtype), grad_outputs.to(fisher.dtype)
    w = None if weights is None else weights.to(fisher.dtype)
    if t == 1:
        g_squared = g[:, 0].square() if w is None else g[:, 0].square() * w[:, None]
        fisher.addmm_(g_squared.t(), a[:, 0].square())
    else:
        step = max(1, MAX_ELEMENTS // max(1, fisher.numel()))
        for first in range(0, n, step):
            chunk = slice(first, first + step)
            accumulate_squares_(fisher, g[chunk].transpose(1, 2) @ a[chunk], None if w is None else w[chunk])
    if gradient is not None:
        g_weighted = g if w is None else g * w[:, None, None]
        gradient.addmm_(g_weighted.flatten(0, 1).t(), a.flatten(0, 1))


def _terms(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter's value (0-d float64) and gradient (wide dtype)."""
    wide = flat_dtype(theta[0].dtype)
    for index, (p, p_hat, f) in enumerate(zip(theta, theta_hat, fisher, strict=True)):
        alpha_p = alpha if alpha.dim() == 0 else alpha[index]
        p = p.to(wide)
        d = p - p_hat.to(wide)
        if offset:
            d = d - offset[index]
        fd = f * d
        value = 0.5 * (alpha_p * (fd * d).sum(dtype=torch.float64) + l2 * (p * p).sum(dtype=torch.float64))
        yield value, alpha_p.to(wide) * fd + l2.to(wide) * p


def penalty(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> Tensor:
    """Return the value alone."""
    terms = _terms(theta, theta_hat, offset, fisher, alpha, l2)
    return torch.stack([value for value, _ in terms]).sum().to(flat_dtype(theta[0].dtype))


def penalty_with_grad(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the value and the packed gradient."""
    _, length = packed_starts([p.numel() for p in theta])
    packed = theta[0].new_zeros(length)
    values = []
    terms = _terms(theta, theta_hat, offset, fisher, alpha, l2)
    for view, (value, gradient) in zip(packed_views(packed, theta), terms, strict=True):
        values.append(value)
        view.copy_(gradient)
    return torch.stack(values).sum().to(flat_dtype(theta[0].dtype)), packed


def penalty_add_grad_(
    grad: Sequence[Tensor],
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
    scale: Tensor,
) -> Tensor:
    """Return the value; add scale * gradient to grad, rounded once."""
    values = []
    terms = _terms(theta, theta_hat, offset, fisher, alpha, l2)
    for g, (value, gradient) in zip(grad, terms, strict=True):
        values.append(value)
        g.copy_(g.to(gradient.dtype) + scale.to(gradient.dtype) * gradient)
    return torch.stack(values).sum().to(flat_dtype(theta[0].dtype))
