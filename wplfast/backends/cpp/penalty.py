"""The penalty operators on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import wplfast._C as _C

from ...ops.arguments import PenaltyArguments, flat_operators
from ...ops.layout import ALIGNMENT, flat_dtype, packed_starts
from .dtypes import DTYPES

_VALUE, _STORE, _ADD = 0, 1, 2


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return the data pointers (the unbound method saves a third of the time of a comprehension)."""
    return list(map(Tensor.data_ptr, tensors))


def _penalty(mode: int, grad: list[int], arguments: PenaltyArguments, scale: Tensor | None) -> Tensor:
    """Return the value; store or add the gradient at the addresses in ``grad`` as the mode says."""
    theta, theta_hat, offset, fisher, alpha, l2 = arguments
    dtype = theta[0].dtype
    value = torch.empty((), dtype=flat_dtype(dtype), device="cpu")
    _C.penalty(
        mode,
        DTYPES[dtype],
        DTYPES[fisher[0].dtype],
        list(map(Tensor.numel, theta)),
        _addresses(theta),
        _addresses(theta_hat),
        _addresses(offset),
        _addresses(fisher),
        grad,
        alpha.data_ptr(),
        alpha.dim() == 1,
        l2.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        ALIGNMENT,
        value.data_ptr(),
        torch.get_num_threads(),
    )
    return value


def _value(arguments: PenaltyArguments) -> Tensor:
    """Return the value alone."""
    return _penalty(_VALUE, [], arguments, None)


def _with_grad(arguments: PenaltyArguments) -> tuple[Tensor, Tensor]:
    """Return the value and the packed gradient."""
    starts, length = packed_starts([p.numel() for p in arguments.theta])
    packed = torch.empty(length, dtype=arguments.theta[0].dtype, device="cpu")
    base, itemsize = packed.data_ptr(), packed.itemsize
    return _penalty(_STORE, [base + start * itemsize for start in starts], arguments, None), packed


def _add_grad_(grad: Sequence[Tensor], arguments: PenaltyArguments, scale: Tensor) -> Tensor:
    """Return the value; add scale * gradient to grad, rounded once."""
    value = _penalty(_ADD, _addresses(grad), arguments, scale)
    increment_version(grad)
    return value


penalty, penalty_with_grad, penalty_add_grad_ = flat_operators(_value, _with_grad, _add_grad_)
