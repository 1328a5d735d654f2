"""The arguments that the three penalty operators share, as one tuple on the Python side.

The dispatcher's schemas are flat, and so are the functions that are registered with it or called by users;
:func:`flat_operators` makes those of a backend from functions that take the tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class PenaltyArguments(NamedTuple):
    """What a penalty is evaluated on; see :mod:`.contract` for the formula. One entry per parameter in each list."""

    theta: Sequence[Tensor]  #: parameters, dense in memory, of one dtype on one device
    theta_hat: Sequence[Tensor]  #: their anchors, of theta's shapes, dtype, device and memory order
    offset: Sequence[Tensor]  #: of the merged anchors from theta_hat, float32 (float64 for float64); empty means zero
    fisher: Sequence[Tensor]  #: float32 or bfloat16, all alike (float64 for float64 parameters)
    alpha: Tensor  #: strength of the anchors, float64 on theta's device: 0-d, or one entry per parameter
    l2: Tensor  #: strength of the weight decay term, float64 on theta's device, 0-d


def flat_operators(
    value: Callable[[PenaltyArguments], Tensor],
    with_grad: Callable[[PenaltyArguments], tuple[Tensor, Tensor]],
    add_grad_: Callable[[Sequence[Tensor], PenaltyArguments, Tensor], Tensor],
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Return ``penalty``, ``penalty_with_grad`` and ``penalty_add_grad_`` of a backend, with the schemas' arguments.

    Args:
        value: returns the value alone.
        with_grad: returns the value and the packed gradient.
        add_grad_: adds a multiple of the gradient (its last argument) to tensors and returns the value.
    """

    def penalty(
        theta: Sequence[Tensor],
        theta_hat: Sequence[Tensor],
        offset: Sequence[Tensor],
        fisher: Sequence[Tensor],
        alpha: Tensor,
        l2: Tensor,
    ) -> Tensor:
        return value(PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2))

    def penalty_with_grad(
        theta: Sequence[Tensor],
        theta_hat: Sequence[Tensor],
        offset: Sequence[Tensor],
        fisher: Sequence[Tensor],
        alpha: Tensor,
        l2: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return with_grad(PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2))

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
        return add_grad_(grad, PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2), scale)

    return penalty, penalty_with_grad, penalty_add_grad_
