"""The op contract: schemas, checks and fakes of the five operators, once for all backends.

===========================  ==========================================================================================
``accumulate_squares_``      fisher += sum_n w_n grads[n]^2
``fisher_linear_``           fisher[o, i] += sum_n w_n (sum_t G[n, t, o] A[n, t, i])^2, without an [N, O, I] tensor
``penalty``                  sum_p alpha_p/2 sum_i F_pi d_pi^2 + l2/2 sum_i theta_pi^2,  d = theta - theta_hat - offset
``penalty_with_grad``        the same value, and its gradient packed into one buffer, in one pass
``penalty_add_grad_``        the same value, and ``grad += scale * gradient``, in one pass
===========================  ==========================================================================================

Each backend implements these five functions with the schema's arguments; it may rely on what the checks here have
established and need not check again. ``alpha`` is a 0-d tensor or one entry per parameter; ``l2`` and ``scale`` are 0-d
tensors; all three are float64 and stay on the parameters' device, so that no call needs a host synchronisation. An
empty ``offset`` list means zero. The value is 0-d, float32 (float64 for float64 parameters). See :mod:`.layout` for
how tensors lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import flat_dtype, is_dense, packed_starts, same_order

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_ANCHORS = "Tensor[] theta, Tensor[] theta_hat, Tensor[] offset, Tensor[] fisher, Tensor alpha, Tensor l2"
SCHEMAS = {
    "accumulate_squares_": "(Tensor(a!) fisher, Tensor grads, Tensor? weights) -> ()",
    "fisher_linear_": (
        "(Tensor(a!) fisher, Tensor activations, Tensor grad_outputs, Tensor? weights, Tensor(b!)? gradient) -> ()"
    ),
    "penalty": f"({_ANCHORS}) -> Tensor",
    "penalty_with_grad": f"({_ANCHORS}) -> (Tensor, Tensor)",
    "penalty_add_grad_": f"(Tensor(a!)[] grad, {_ANCHORS}, Tensor scale) -> Tensor",
}

library = torch.library.Library("wplfast", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)


def _describe(tensor: Tensor) -> str:
    """Describe a tensor for an error message."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def _expect(condition: bool, what: str, expected: str, tensor: Tensor) -> None:
    """Raise a ValueError that names expected and given unless the condition holds."""
    if not condition:
        raise ValueError(f"{what} must be {expected}, got {_describe(tensor)}")


def _check_weights(weights: Tensor | None, n_samples: int, device: torch.device) -> None:
    """Check optional per-sample weights."""
    if weights is not None:
        expected = f"float32 or float64 [{n_samples}] on {device}"
        ok = weights.shape == (n_samples,) and weights.device == device and weights.dtype in FLOATING[:2]
        _expect(ok and weights.is_contiguous(), "weights", f"contiguous {expected}", weights)


def _check_accumulator(accumulator: Tensor, what: str, shape: Sequence[int], source: Tensor) -> None:
    """Check a buffer that squares or gradients of ``source`` are added to."""
    wide = flat_dtype(source.dtype)
    expected = f"contiguous {str(wide).removeprefix('torch.')}{list(shape)} on {source.device}"
    ok = accumulator.shape == tuple(shape) and accumulator.dtype == wide and accumulator.device == source.device
    _expect(ok and accumulator.is_contiguous(), what, expected, accumulator)


def check_accumulate_squares(fisher: Tensor, grads: Tensor, weights: Tensor | None) -> None:
    """Check the arguments of ``accumulate_squares_``: grads [N, *S] contiguous, fisher [*S]."""
    floating = grads.dim() >= 1 and grads.dtype in FLOATING
    _expect(floating and grads.is_contiguous(), "grads", "contiguous floating point [N, ...]", grads)
    _check_accumulator(fisher, "fisher", grads.shape[1:], grads)
    _check_weights(weights, grads.shape[0], grads.device)


def check_fisher_linear(
    fisher: Tensor, activations: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Check the arguments of ``fisher_linear_``: activations [N, T, I], grad_outputs [N, T, O], fisher [O, I].

    The last dimension of both inputs must be contiguous; the first two may have any non-negative stride.
    """
    _expect(
        activations.dim() == 3 and activations.dtype in FLOATING, "activations", "floating [N, T, D_in]", activations
    )
    n, t, _ = activations.shape
    ok = grad_outputs.dim() == 3 and grad_outputs.shape[:2] == (n, t) and grad_outputs.dtype == activations.dtype
    _expect(
        ok and grad_outputs.device == activations.device,
        "grad_outputs",
        f"[{n}, {t}, D_out] with the dtype and device of activations ({_describe(activations)})",
        grad_outputs,
    )
    for what, tensor in (("activations", activations), ("grad_outputs", grad_outputs)):
        _expect(tensor.stride(2) == 1 or tensor.shape[2] <= 1, what, "contiguous in its last dimension", tensor)
    shape = (grad_outputs.shape[2], activations.shape[2])
    _check_accumulator(fisher, "fisher", shape, activations)
    _check_weights(weights, n, activations.device)
    if gradient is not None:
        _check_accumulator(gradient, "gradient", shape, activations)


def check_scalar(what: str, value: Tensor, device: torch.device, length: int | None = None) -> None:
    """Check a 0-d float64 coefficient (or, with ``length``, one entry per parameter) that lives on the device."""
    shape_ok = value.dim() == 0 or (length is not None and value.shape == (length,) and value.is_contiguous())
    expected = f"a 0-d float64 tensor on {device}" + (f" or one of shape [{length}]" if length is not None else "")
    _expect(shape_ok and value.dtype == torch.float64 and value.device == device, what, expected, value)


def check_anchors(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> None:
    """Check the arguments that the three penalty operators share."""
    if not theta:
        raise ValueError("theta must hold at least one tensor, got none")
    for what, tensors in (("theta_hat", theta_hat), ("fisher", fisher), ("offset", offset)):
        if len(tensors) != len(theta) and not (what == "offset" and not tensors):
            raise ValueError(f"{what} must hold {len(theta)} tensors, as theta does, got {len(tensors)}")
    dtype, device = theta[0].dtype, theta[0].device
    wide = flat_dtype(dtype)
    if dtype not in FLOATING:
        raise ValueError(f"theta[0] must be of a floating point type, got {_describe(theta[0])}")
    columns = [("theta_hat", theta_hat, dtype), ("fisher", fisher, wide), ("offset", offset, wide)]
    columns = [column for column in columns if column[1]]
    for index, parameter in enumerate(theta):
        if parameter.dtype != dtype or parameter.device != device:
            _expect(False, f"theta[{index}]", f"of dtype {dtype} on {device}, as theta[0] is", parameter)
        if not is_dense(parameter):
            _expect(False, f"theta[{index}]", "dense in memory", parameter)
        for what, tensors, expected in columns:
            _check_like(what, index, tensors[index], parameter, expected)
    check_scalar("alpha", alpha, device, len(theta))
    check_scalar("l2", l2, device)


def _check_like(what: str, index: int, tensor: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """Check that a tensor has the shape, device and memory order of a parameter, and the given dtype."""
    if tensor.shape != like.shape or tensor.device != like.device or tensor.dtype != dtype:
        name = str(dtype).removeprefix("torch.")
        _expect(False, f"{what}[{index}]", f"{name}{list(like.shape)} on {like.device}", tensor)
    if not same_order(tensor, like):
        raise ValueError(f"{what}[{index}] must have strides {like.stride()} as its parameter, got {tensor.stride()}")


def check_grads(grad: Sequence[Tensor], theta: Sequence[Tensor]) -> None:
    """Check the gradients that ``penalty_add_grad_`` adds to."""
    if len(grad) != len(theta):
        raise ValueError(f"grad must hold {len(theta)} tensors, as theta does, got {len(grad)}")
    for index, (tensor, parameter) in enumerate(zip(grad, theta, strict=True)):
        _check_like("grad", index, tensor, parameter, parameter.dtype)


def _value_like(theta: Sequence[Tensor]) -> Tensor:
    """Return an uninitialised 0-d value."""
    return theta[0].new_empty((), dtype=flat_dtype(theta[0].dtype))


def register_fakes() -> None:
    """Register shape propagation for tracing; the checks run there too, so traced code fails as eager code does."""

    def accumulate_squares(fisher, grads, weights):  # type: ignore[no-untyped-def]
        check_accumulate_squares(fisher, grads, weights)

    def fisher_linear(fisher, activations, grad_outputs, weights, gradient):  # type: ignore[no-untyped-def]
        check_fisher_linear(fisher, activations, grad_outputs, weights, gradient)

    def penalty(theta, theta_hat, offset, fisher, alpha, l2):  # type: ignore[no-untyped-def]
        check_anchors(theta, theta_hat, offset, fisher, alpha, l2)
        return _value_like(theta)

    def penalty_with_grad(theta, theta_hat, offset, fisher, alpha, l2):  # type: ignore[no-untyped-def]
        check_anchors(theta, theta_hat, offset, fisher, alpha, l2)
        _, length = packed_starts([t.numel() for t in theta])
        return _value_like(theta), theta[0].new_empty(length)

    def penalty_add_grad(grad, theta, theta_hat, offset, fisher, alpha, l2, scale):  # type: ignore[no-untyped-def]
        check_anchors(theta, theta_hat, offset, fisher, alpha, l2)
        check_grads(grad, theta)
        return _value_like(theta)

    fakes = {
        "accumulate_squares_": accumulate_squares,
        "fisher_linear_": fisher_linear,
        "penalty": penalty,
        "penalty_with_grad": penalty_with_grad,
        "penalty_add_grad_": penalty_add_grad,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"wplfast::{name}", fake)  # type: ignore[arg-type]


register_fakes()
