"""The checks of the penalty operators' arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import PenaltyArguments
from .expect import FLOATING, describe, expect
from .layout import flat_dtype, is_dense, same_order


def check_scalar(what: str, value: Tensor, device: torch.device, length: int | None = None) -> None:
    """Check a 0-d float64 coefficient (or, with ``length``, one entry per parameter) that lives on the device."""
    shape_ok = value.dim() == 0 or (length is not None and value.shape == (length,) and value.is_contiguous())
    expected = f"a 0-d float64 tensor on {device}" + (f" or one of shape [{length}]" if length is not None else "")
    expect(shape_ok and value.dtype == torch.float64 and value.device == device, what, expected, value)


def check_arguments(arguments: PenaltyArguments, ordered: bool = True) -> None:
    """Check the arguments that the three penalty operators share.

    Args:
        arguments: theirs.
        ordered: whether tensors must be dense, and in their parameter's memory order, as kernels need them.
    """
    theta, theta_hat, offset, fisher, alpha, l2 = arguments
    if not theta:
        raise ValueError("theta must hold at least one tensor, got none")
    for what, tensors in (("theta_hat", theta_hat), ("fisher", fisher), ("offset", offset)):
        if len(tensors) != len(theta) and not (what == "offset" and not tensors):
            raise ValueError(f"{what} must hold {len(theta)} tensors, as theta does, got {len(tensors)}")
    dtype, device = theta[0].dtype, theta[0].device
    wide = flat_dtype(dtype)
    if dtype not in FLOATING:
        raise ValueError(f"theta[0] must be of a floating point type, got {describe(theta[0])}")
    columns = [
        ("theta_hat", theta_hat, dtype),
        ("fisher", fisher, _fisher_dtype(fisher, wide)),
        ("offset", offset, wide),
    ]
    columns = [column for column in columns if column[1]]
    for index, parameter in enumerate(theta):
        if parameter.dtype != dtype or parameter.device != device:
            expect(False, f"theta[{index}]", f"of dtype {dtype} on {device}, as theta[0] is", parameter)
        if ordered and not is_dense(parameter):
            expect(False, f"theta[{index}]", "dense in memory", parameter)
        for what, tensors, expected in columns:
            _check_like(what, index, tensors[index], parameter, expected, ordered)
    check_scalar("alpha", alpha, device, len(theta))
    check_scalar("l2", l2, device)


def _fisher_dtype(fisher: Sequence[Tensor], wide: torch.dtype) -> torch.dtype:
    """Return the dtype that all Fishers must have: bfloat16 if the first has it and may, else the wide one."""
    return torch.bfloat16 if fisher[0].dtype == torch.bfloat16 and wide == torch.float32 else wide


def _check_like(what: str, index: int, tensor: Tensor, like: Tensor, dtype: torch.dtype, ordered: bool = True) -> None:
    """Check that a tensor has the shape, device and (if ordered) memory order of a parameter, and the given dtype."""
    if tensor.shape != like.shape or tensor.device != like.device or tensor.dtype != dtype:
        name = str(dtype).removeprefix("torch.")
        expect(False, f"{what}[{index}]", f"{name}{list(like.shape)} on {like.device}", tensor)
    if ordered and not same_order(tensor, like):
        raise ValueError(f"{what}[{index}] must have strides {like.stride()} as its parameter, got {tensor.stride()}")


def check_grads(grad: Sequence[Tensor], theta: Sequence[Tensor]) -> None:
    """Check the gradients that ``penalty_add_grad_`` adds to."""
    if len(grad) != len(theta):
        raise ValueError(f"grad must hold {len(theta)} tensors, as theta does, got {len(grad)}")
    for index, (tensor, parameter) in enumerate(zip(grad, theta, strict=True)):
        _check_like("grad", index, tensor, parameter, parameter.dtype)


def check_scale_unless_one(tensor: Tensor, factor: Tensor) -> None:
    """Check a contiguous buffer of any floating point type and the 0-d factor on its device."""
    expect(tensor.dtype in FLOATING and tensor.is_contiguous(), "tensor", "contiguous and floating point", tensor)
    expected = f"a 0-d float32 or float64 tensor on {tensor.device}"
    wide = factor.dtype in (torch.float32, torch.float64)
    expect(factor.dim() == 0 and wide and factor.device == tensor.device, "factor", expected, factor)
