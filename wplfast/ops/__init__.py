"""The operators as checked Python functions: ``check -> dispatcher -> the backend that serves the device``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import check_fisher, check_penalty, contract
from .arguments import PenaltyArguments

__all__ = [
    "PenaltyArguments",
    "accumulate_squares_",
    "contract",
    "fisher_conv_",
    "fisher_embedding_",
    "fisher_linear_",
    "penalty",
    "penalty_add_grad_",
    "penalty_with_grad",
    "scale_grads",
    "scale_unless_one_",
]


def accumulate_squares_(fisher: Tensor, grads: Tensor, weights: Tensor | None = None) -> None:
    """Add the weighted sum of squared per-sample gradients: ``fisher += sum_n w_n grads[n]^2``.

    Args:
        fisher: contiguous accumulator [*S], float32 (float64 where grads is float64).
        grads: contiguous per-sample gradients [N, *S] of any floating type.
        weights: optional float32 or float64 weights [N]; they stay outside the square.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as above.
    """
    check_fisher.check_accumulate_squares(fisher, grads, weights)
    torch.ops.wplfast.accumulate_squares_(fisher, grads, weights)


def fisher_linear_(
    fisher: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Add the Fisher diagonal of a linear layer: ``fisher[o, i] += sum_n w_n (sum_t G[n, t, o] A[n, t, i])^2``.

    The per-sample gradients [N, D_out, D_in] are never materialised.

    Args:
        fisher: contiguous accumulator [D_out, D_in], float32 (float64 for float64 inputs).
        activations: the layer's inputs A [N, T, D_in], contiguous in the last dimension.
        grad_outputs: gradients of the per-sample losses with respect to its outputs, G [N, T, D_out], contiguous in
            the last dimension.
        weights: optional float32 or float64 weights [N]; they stay outside the square.
        gradient: optional accumulator like fisher for the plain gradient ``sum_n w_n sum_t G A``.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as above.
    """
    check_fisher.check_fisher_linear(fisher, activations, grad_outputs, weights, gradient)
    torch.ops.wplfast.fisher_linear_(fisher, activations, grad_outputs, weights, gradient)


def fisher_conv_(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> None:
    """Add the Fisher diagonal of a convolution's weight, without unfolding its input.

    ``fisher[o, c, k] += sum_n w_n (sum_{m, l} G[n, m, l, o] X[n, m, l stride - padding + k dilation, c])^2``, X being
    zero outside; l and k run over 1 to 3 spatial dimensions, c over the input channels of o's group. With X and G
    exchanged it serves transposed convolutions.

    Args:
        fisher: contiguous accumulator [C_out, C_in / groups, *K], float32 (float64 for float64 inputs).
        inputs: X [N, M, *S, C_in], fastest where contiguous; a sample may own M images.
        grad_outputs: gradients of the per-sample losses with respect to the outputs, G [N, M, *L, C_out], likewise.
            L may be smaller than what the inputs allow.
        weights: optional float32 or float64 weights [N]; they stay outside the square.
        gradient: optional accumulator like fisher for the plain gradient.
        stride: one integer a spatial dimension.
        padding: one integer a spatial dimension, on both sides.
        dilation: one integer a spatial dimension.
        groups: of channels.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as above.
    """
    check_fisher.check_fisher_conv(fisher, inputs, grad_outputs, weights, gradient, stride, padding, dilation, groups)
    torch.ops.wplfast.fisher_conv_(fisher, inputs, grad_outputs, weights, gradient, stride, padding, dilation, groups)


def fisher_embedding_(
    fisher: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    weights: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Add the Fisher diagonal of a table that rows are taken from; a sample's repeated rows are summed, then squared.

    ``fisher[v] += sum_n w_n (sum_{t: indices[n, t] = v} G[n, t])^2``.

    Args:
        fisher: contiguous accumulator [V, D], float32 (float64 for float64 gradients).
        indices: int64 [N, T], contiguous, below V; negative ones are left out. Others are undefined behaviour on GPUs
            and an IndexError on CPUs.
        grad_outputs: gradients of the rows taken, G [N, T, D], contiguous.
        weights: optional float32 or float64 weights [N]; they stay outside the square.
        gradient: optional accumulator like fisher for the plain gradient.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as above.
    """
    check_fisher.check_fisher_embedding(fisher, indices, grad_outputs, weights, gradient)
    torch.ops.wplfast.fisher_embedding_(fisher, indices, grad_outputs, weights, gradient)


def scale_grads(activations: Tensor, grad_outputs: Tensor) -> Tensor:
    """Return the per-sample gradients of an elementwise scale, ``sum_t A[n, t] G[n, t]``, in one pass over both.

    Args:
        activations: A [N, T, D], of any strides.
        grad_outputs: G [N, T, D], of any strides.

    Returns:
        [N, D], contiguous; float32 (float64 for float64).

    Raises:
        ValueError: if shapes, dtypes or devices differ.
    """
    check_fisher.check_scale_grads(activations, grad_outputs)
    grads: Tensor = torch.ops.wplfast.scale_grads(activations, grad_outputs)
    return grads


def penalty(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> Tensor:
    """Return the penalty's value; see :mod:`.contract` for the formula and :class:`PenaltyArguments`.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as the contract says.
    """
    arguments = PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2)
    check_penalty.check_arguments(arguments)
    value: Tensor = torch.ops.wplfast.penalty(*arguments)
    return value


def penalty_with_grad(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the value and the packed gradient (see :func:`wplfast.ops.layout.packed_views`).

    Raises:
        ValueError: if a shape, dtype, device or layout is not as the contract says.
    """
    arguments = PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2)
    check_penalty.check_arguments(arguments)
    value, gradient = torch.ops.wplfast.penalty_with_grad(*arguments)
    return value, gradient


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
    """Return the value and add ``scale`` times the gradient to ``grad`` in place.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as the contract says.
    """
    arguments = PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2)
    check_penalty.check_arguments(arguments)
    check_penalty.check_grads(grad, theta)
    check_penalty.check_scalar("scale", scale, theta[0].device)
    value: Tensor = torch.ops.wplfast.penalty_add_grad_(grad, *arguments, scale)
    return value


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a buffer in place; where the factor is 1 nothing is read or written, and no host synchronisation tells.

    Args:
        tensor: contiguous, of any floating point type.
        factor: 0-d, float32 or float64, on the same device.

    Raises:
        ValueError: if a dtype, device or layout is not as above.
    """
    check_penalty.check_scale_unless_one(tensor, factor)
    torch.ops.wplfast.scale_unless_one_(tensor, factor)
