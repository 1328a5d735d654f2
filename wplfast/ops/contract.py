"""The op contract: schemas and fakes of the operators, once for all backends; the checks are in ``check_*.py``.

===========================  ==========================================================================================
``accumulate_squares_``      fisher += sum_n w_n grads[n]^2
``fisher_linear_``           fisher[o, i] += sum_n w_n (sum_t G[n, t, o] A[n, t, i])^2, without an [N, O, I] tensor
``fisher_conv_``             fisher[o, c, k] += sum_n w_n (sum_l G[n, l, o] X[n, l s - p + k d, c])^2
``fisher_embedding_``        fisher[v, :] += sum_n w_n (sum_{t: indices[n, t] = v} G[n, t, :])^2
``scale_grads``              sum_t A[n, t, :] G[n, t, :], the per-sample gradients of an elementwise scale
``penalty``                  sum_p alpha_p/2 sum_i F_pi d_pi^2 + l2/2 sum_i theta_pi^2,  d = theta - theta_hat - offset
``penalty_with_grad``        the same value, and its gradient packed into one buffer, in one pass
``penalty_add_grad_``        the same value, and ``grad += scale * gradient``, in one pass
``scale_unless_one_``        tensor *= factor; where the factor is 1, which is not looked at on the host, nothing moves
===========================  ==========================================================================================

Each backend implements these functions with the schema's arguments; it may rely on what the checks here have
established and need not check again. :class:`.PenaltyArguments` says what the penalty operators' arguments are; like
them, ``scale`` is a float64 tensor, 0-d, on the parameters' device, so that no call needs a host synchronisation. The
value is 0-d, float32 (float64 for float64 parameters). See :mod:`.layout` for how tensors lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import PenaltyArguments, flat_operators
from .check_fisher import (
    check_accumulate_squares,
    check_fisher_conv,
    check_fisher_embedding,
    check_fisher_linear,
    check_scale_grads,
)
from .check_penalty import check_arguments, check_grads, check_scale_unless_one
from .layout import flat_dtype, packed_starts

_ANCHORS = "Tensor[] theta, Tensor[] theta_hat, Tensor[] offset, Tensor[] fisher, Tensor alpha, Tensor l2"
SCHEMAS = {
    "accumulate_squares_": "(Tensor(a!) fisher, Tensor grads, Tensor? weights) -> ()",
    "fisher_linear_": (
        "(Tensor(a!) fisher, Tensor activations, Tensor grad_outputs, Tensor? weights, Tensor(b!)? gradient) -> ()"
    ),
    "fisher_conv_": (
        "(Tensor(a!) fisher, Tensor inputs, Tensor grad_outputs, Tensor? weights, Tensor(b!)? gradient, "
        "int[] stride, int[] padding, int[] dilation, int groups) -> ()"
    ),
    "fisher_embedding_": (
        "(Tensor(a!) fisher, Tensor indices, Tensor grad_outputs, Tensor? weights, Tensor(b!)? gradient) -> ()"
    ),
    "scale_grads": "(Tensor activations, Tensor grad_outputs) -> Tensor",
    "penalty": f"({_ANCHORS}) -> Tensor",
    "penalty_with_grad": f"({_ANCHORS}) -> (Tensor, Tensor)",
    "penalty_add_grad_": f"(Tensor(a!)[] grad, {_ANCHORS}, Tensor scale) -> Tensor",
    "scale_unless_one_": "(Tensor(a!) tensor, Tensor factor) -> ()",
}

library = torch.library.Library("wplfast", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)


_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def add_kernel(name: str, key: str, function: Callable[..., Any]) -> None:
    """Make a backend's function the one that serves an operator under a dispatch key."""
    library.impl(name, function, key)
    _kernels[name, key.lower()] = function


def kernel(name: str, device_type: str) -> Callable[..., Any]:
    """Return what serves an operator on a device type, to be called without checks and without the dispatcher.

    For arguments that were checked before, where nothing must see operators
    (:func:`wplfast.ops.prepared.dispatched`).
    """
    found = _kernels.get((name, device_type))
    return getattr(torch.ops.wplfast, name) if found is None else found


def register_fakes() -> None:
    """Register shape propagation for tracing; the checks run there too, so traced code fails as eager code does."""

    def accumulate_squares(fisher, grads, weights):  # type: ignore[no-untyped-def]
        check_accumulate_squares(fisher, grads, weights)

    def fisher_linear(fisher, activations, grad_outputs, weights, gradient):  # type: ignore[no-untyped-def]
        check_fisher_linear(fisher, activations, grad_outputs, weights, gradient)

    def fisher_conv(fisher, inputs, grad_outputs, weights, gradient, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        check_fisher_conv(fisher, inputs, grad_outputs, weights, gradient, stride, padding, dilation, groups)

    def fisher_embedding(fisher, indices, grad_outputs, weights, gradient):  # type: ignore[no-untyped-def]
        check_fisher_embedding(fisher, indices, grad_outputs, weights, gradient)

    def scale_grads(activations, grad_outputs):  # type: ignore[no-untyped-def]
        check_scale_grads(activations, grad_outputs)
        n, _, d = activations.shape
        return activations.new_empty((n, d), dtype=flat_dtype(activations.dtype))

    def value(arguments: PenaltyArguments) -> Tensor:
        check_arguments(arguments)
        return arguments.theta[0].new_empty((), dtype=flat_dtype(arguments.theta[0].dtype))

    def with_grad(arguments: PenaltyArguments) -> tuple[Tensor, Tensor]:
        _, length = packed_starts([t.numel() for t in arguments.theta])
        return value(arguments), arguments.theta[0].new_empty(length)

    def add_grad(grad: Sequence[Tensor], arguments: PenaltyArguments, scale: Tensor) -> Tensor:
        result = value(arguments)
        check_grads(grad, arguments.theta)
        return result

    def scale_unless_one(tensor, factor):  # type: ignore[no-untyped-def]
        check_scale_unless_one(tensor, factor)

    penalty, penalty_with_grad, penalty_add_grad = flat_operators(value, with_grad, add_grad)
    fakes = {
        "accumulate_squares_": accumulate_squares,
        "fisher_linear_": fisher_linear,
        "fisher_conv_": fisher_conv,
        "fisher_embedding_": fisher_embedding,
        "scale_grads": scale_grads,
        "penalty": penalty,
        "penalty_with_grad": penalty_with_grad,
        "penalty_add_grad_": penalty_add_grad,
        "scale_unless_one_": scale_unless_one,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"wplfast::{name}", fake)  # type: ignore[arg-type]


register_fakes()
