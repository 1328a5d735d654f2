"""Tables: the lists that the penalty operators take, built once and checked at every call.

Parameters stay where the user's optimizer has them; a table refers to them and to the anchors' flat buffers. PyTorch
lets a parameter's memory be exchanged silently (``.to``, ``.double``, ``p.data = ...``), so every call compares
address, dtype, device, shape and stride with what the table was built on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from . import functional
from .anchors import Anchor, by_kind, dense_like
from .coefficients import scalar
from .ops.layout import is_dense

#: Address, dtype, device, shape and stride: what a table was built on.
Signature: TypeAlias = tuple[int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]


def signature(parameter: Tensor) -> Signature:
    """Return what must not have changed since a table was built."""
    return (parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape, parameter.stride())


@dataclass
class Group:
    """Parameters of one device and dtype: the lists that the penalty operators take."""

    indices: list[int]
    theta: list[Tensor]
    theta_hat: list[Tensor]
    offset: list[Tensor]
    fisher: list[Tensor]
    alpha: Tensor
    l2: Tensor
    one: Tensor
    constant: Tensor | None  # sum of alpha_p c_p needs alpha: c, 0-d or per parameter as alpha is
    signatures: list[Signature]
    sparse: list[int] = field(default_factory=list)  # positions of parameters with gaps in memory


def build(
    indices: Sequence[int], theta: Sequence[Tensor], anchors: Sequence[Anchor], alpha: Tensor, l2: float
) -> list[Group]:
    """Make the tables of an active set.

    Args:
        indices: the active parameters.
        theta: all parameters.
        anchors: all anchors, packed.
        alpha: 0-d, or one entry for each of all parameters.
        l2: strength of the weight decay term.
    """
    groups = []
    for (device, _), positions in by_kind([theta[i] for i in indices]).items():
        chosen = [indices[position] for position in positions]
        several = any(anchors[i].offset is not None for i in chosen)
        own_alpha = alpha if alpha.dim() == 0 else alpha[chosen]
        constants = torch.tensor([anchors[i].constant for i in chosen], dtype=torch.float64, device=device)
        groups.append(
            Group(
                indices=chosen,
                theta=[theta[i] for i in chosen],
                theta_hat=[anchors[i].theta_hat for i in chosen],
                offset=[offset for i in chosen if (offset := anchors[i].offset) is not None],
                fisher=[anchors[i].fisher for i in chosen],
                alpha=own_alpha.to(device, copy=True),
                l2=scalar(l2, device),
                one=scalar(1.0, device),
                constant=(constants.sum() if alpha.dim() == 0 else constants) if several else None,
                signatures=[signature(theta[i]) for i in chosen],
                sparse=[k for k, i in enumerate(chosen) if not is_dense(theta[i])],
            )
        )
    return groups


def unchanged(group: Group) -> bool:
    """Tell whether the parameters of a table are what and where they were."""
    for p, (address, dtype, device, shape, stride) in zip(group.theta, group.signatures, strict=True):
        if p.data_ptr() != address or p.dtype != dtype or p.stride() != stride or p.shape != shape:
            return False
        if p.device != device:
            return False
    return True


def value_of(group: Group) -> Tensor:
    """Return one group's differentiable value."""
    theta = group.theta
    if group.sparse:
        theta = [p.contiguous() if k in group.sparse else p for k, p in enumerate(theta)]
    value = functional.penalty(theta, group.theta_hat, group.offset, group.fisher, group.alpha, group.l2)
    return _with_constant(value, group)


def add_grad_(group: Group, scale: float | Tensor) -> Tensor:
    """Add one group's gradient and return its value."""
    theta = [dense_like(p) for p in group.theta] if group.sparse else group.theta
    grads, scratch = [], []
    for p, like, (_, dtype, _, _, stride) in zip(group.theta, theta, group.signatures, strict=True):
        grad = p.grad
        if grad is None and p.requires_grad:
            grad = p.grad = torch.zeros_like(p)
        if grad is None or not p.requires_grad:
            grad = torch.zeros_like(like)  # not the caller's; the value counts frozen parameters too
        elif grad.dtype != dtype or grad.layout != torch.strided:
            raise ValueError(f".grad must be dense and {dtype} as its parameter, got {grad.layout} {grad.dtype}")
        elif grad.stride() != stride or group.sparse:
            scratch.append((grad, torch.zeros_like(like)))
            grad = scratch[-1][1]
        grads.append(grad)
    factor = group.one if isinstance(scale, float) and scale == 1 else scalar(scale, theta[0].device)
    value: Tensor = torch.ops.wplfast.penalty_add_grad_(
        grads, theta, group.theta_hat, group.offset, group.fisher, group.alpha, group.l2, factor
    )
    for grad, extra in scratch:
        grad.add_(extra)
    return _with_constant(value, group)


def _with_constant(value: Tensor, group: Group) -> Tensor:
    """Add what the merged anchors contribute whatever theta is."""
    if group.constant is None:
        return value
    return value + (0.5 * group.alpha * group.constant).sum().to(value.dtype)
