"""The maths in plain PyTorch: the default backend on every device, and the oracle that tests run in float64.

Nothing here is fused or blocked beyond what keeps memory in bounds; it is meant to be read beside the formulas of
:mod:`wplfast.ops.contract`. The functions follow the contract's schemas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops.arguments import PenaltyArguments, flat_operators
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


def fisher_conv_(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None,
    gradient: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Unfold the inputs of a few samples at a time; then each group is a linear layer."""
    n, c_out = len(inputs), grad_outputs.shape[-1]
    if fisher.numel() == 0 or inputs.numel() == 0 or grad_outputs.numel() == 0:
        return
    flat, flat_gradient = fisher.view(groups, c_out // groups, -1), None
    if gradient is not None:
        flat_gradient = gradient.view(groups, c_out // groups, -1)
    taps = fisher.shape[2:].numel()
    per_sample = inputs.shape[-1] * taps * grad_outputs.shape[1:-1].numel()
    step = max(1, MAX_ELEMENTS // max(1, per_sample))
    for first in range(0, n, step):
        chunk = slice(first, first + step)
        g = grad_outputs[chunk].flatten(1, -2).unflatten(2, (groups, -1))
        a = patches(inputs[chunk], fisher.shape[2:], grad_outputs.shape[2:-1], stride, padding, dilation, groups)
        for group in range(groups):
            fisher_linear_(
                flat[group],
                a[:, :, group],
                g[:, :, group],
                None if weights is None else weights[chunk],
                None if flat_gradient is None else flat_gradient[group],
            )


def patches(
    inputs: Tensor,
    kernel: Sequence[int],
    positions: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Unfold inputs [N, M, *S, C]: what each output position sees, [N, M * L, groups, C / groups * K]."""
    x = inputs.movedim(-1, 2)  # [N, M, C, *S]
    margins = []
    for dim in reversed(range(len(kernel))):
        reach = (positions[dim] - 1) * stride[dim] + (kernel[dim] - 1) * dilation[dim] + 1
        margins += [padding[dim], max(0, reach - padding[dim] - x.shape[3 + dim])]
    x = torch.nn.functional.pad(x, margins)
    steps = x.stride()[3:]
    windows = x.as_strided(
        (*x.shape[:3], *positions, *kernel),
        (
            *x.stride()[:3],
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
    )
    n_spatial = len(kernel)
    windows = windows.unflatten(2, (groups, -1)).movedim((2, 3), (2 + n_spatial, 3 + n_spatial))
    unfolded: Tensor = windows.flatten(3 + n_spatial).flatten(1, 1 + n_spatial)
    return unfolded


def fisher_embedding_(
    fisher: Tensor, indices: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Add each sample's rows into a table of its own distinct rows, square those, and add them to fisher."""
    n, t, d = grad_outputs.shape
    used = indices >= 0
    if used.any() and (largest := int(indices.max())) >= len(fisher):
        raise IndexError(f"indices must be below {len(fisher)}, got {largest}")
    sample = torch.arange(n, device=indices.device).view(n, 1).expand(n, t)[used]
    pairs, place = torch.stack([sample, indices[used]]).unique(dim=1, return_inverse=True)
    sums = fisher.new_zeros(pairs.shape[1], d).index_add_(0, place, grad_outputs[used].to(fisher.dtype))
    weighted = sums if weights is None else sums * weights.to(sums.dtype)[pairs[0]].view(-1, 1)
    fisher.index_add_(0, pairs[1], weighted * sums)
    if gradient is not None:
        gradient.index_add_(0, pairs[1], weighted)


def scale_grads(activations: Tensor, grad_outputs: Tensor) -> Tensor:
    """Return sum_t A[n, t] G[n, t]."""
    wide = flat_dtype(activations.dtype)
    return (activations.to(wide) * grad_outputs.to(wide)).sum(1)


def _terms(arguments: PenaltyArguments) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter's value (0-d float64) and gradient (wide dtype)."""
    theta, theta_hat, offset, fisher, alpha, l2 = arguments
    wide = flat_dtype(theta[0].dtype)
    for index, (p, p_hat, f) in enumerate(zip(theta, theta_hat, fisher, strict=True)):
        alpha_p = alpha if alpha.dim() == 0 else alpha[index]
        p = p.to(wide)
        d = p - p_hat.to(wide)
        if offset:
            d = d - offset[index]
        fd = f.to(wide) * d
        value = 0.5 * (alpha_p * (fd * d).sum(dtype=torch.float64) + l2 * (p * p).sum(dtype=torch.float64))
        yield value, alpha_p.to(wide) * fd + l2.to(wide) * p


def _total(values: list[Tensor], arguments: PenaltyArguments) -> Tensor:
    """Return the sum of the parameters' values."""
    return torch.stack(values).sum().to(flat_dtype(arguments.theta[0].dtype))


def _value(arguments: PenaltyArguments) -> Tensor:
    """Return the value alone."""
    return _total([value for value, _ in _terms(arguments)], arguments)


def _with_grad(arguments: PenaltyArguments) -> tuple[Tensor, Tensor]:
    """Return the value and the packed gradient."""
    theta, values = arguments.theta, []
    _, length = packed_starts([p.numel() for p in theta])
    packed = theta[0].new_zeros(length)
    for view, (value, gradient) in zip(packed_views(packed, theta), _terms(arguments), strict=True):
        values.append(value)
        view.copy_(gradient)
    return _total(values, arguments), packed


def _add_grad_(grad: Sequence[Tensor], arguments: PenaltyArguments, scale: Tensor) -> Tensor:
    """Return the value; add scale * gradient to grad, rounded once."""
    values = []
    for g, (value, gradient) in zip(grad, _terms(arguments), strict=True):
        values.append(value)
        g.copy_(g.to(gradient.dtype) + scale.to(gradient.dtype) * gradient)
    return _total(values, arguments)


penalty, penalty_with_grad, penalty_add_grad_ = flat_operators(_value, _with_grad, _add_grad_)


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a buffer in place: on a CPU after a look, elsewhere in any case, since a look would synchronise."""
    if tensor.device.type != "cpu":
        tensor.copy_(tensor.to(torch.promote_types(tensor.dtype, factor.dtype)) * factor)
    elif (number := factor.item()) != 1:
        tensor.mul_(number)  # a number is not rounded to the tensor's dtype first
