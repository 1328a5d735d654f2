"""The operators as checked Python functions: ``check -> dispatcher -> the backend that serves the device``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import contract

__all__ = ["accumulate_squares_", "fisher_linear_", "penalty", "penalty_add_grad_", "penalty_with_grad"]


def accumulate_squares_(fisher: Tensor, grads: Tensor, weights: Tensor | None = None) -> None:
    """Add the weighted sum of squared per-sample gradients: ``fisher += sum_n w_n grads[n]^2``.

    Args:
        fisher: contiguous accumulator [*S], float32 (float64 where grads is float64).
        grads: contiguous per-sample gradients [N, *S] of any floating type.
        weights: optional float32 or float64 weights [N]; they stay outside the square.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as above.
    """
    contract.check_accumulate_squares(fisher, grads, weights)
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
        grad_outputs: gradients of the per-sample losses with respect to its outputs, G [N, T, D_out], likewise.
        weights: optional float32 or float64 weights [N]; they stay outside the square.
        gradient: optional accumulator like fisher for the plain gradient ``sum_n w_n sum_t G A``.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as above.
    """
    contract.check_fisher_linear(fisher, activations, grad_outputs, weights, gradient)
    torch.ops.wplfast.fisher_linear_(fisher, activations, grad_outputs, weights, gradient)


def penalty(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> Tensor:
    """Return the penalty's value; see :mod:`wplfast.ops.contract` for the formula and the arguments.

    Raises:
        ValueError: if a shape, dtype, device or layout is not as the contract says.
    """
    contract.check_anchors(theta, theta_hat, offset, fisher, alpha, l2)
    value: Tensor = torch.ops.wplfast.penalty(theta, theta_hat, offset, fisher, alpha, l2)
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
    contract.check_anchors(theta, theta_hat, offset, fisher, alpha, l2)
    value, gradient = torch.ops.wplfast.penalty_with_grad(theta, theta_hat, offset, fisher, alpha, l2)
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
    contract.check_anchors(theta, theta_hat, offset, fisher, alpha, l2)
    contract.check_grads(grad, theta)
    contract.check_scalar("scale", scale, theta[0].device)
    value: Tensor = torch.ops.wplfast.penalty_add_grad_(grad, theta, theta_hat, offset, fisher, alpha, l2, scale)
    return value
