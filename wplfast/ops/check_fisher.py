"""The checks of the Fisher operators' arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .expect import FLOATING, describe, expect
from .layout import flat_dtype


def _check_weights(weights: Tensor | None, n_samples: int, device: torch.device) -> None:
    """Check optional per-sample weights."""
    if weights is not None:
        expected = f"float32 or float64 [{n_samples}] on {device}"
        ok = weights.shape == (n_samples,) and weights.device == device and weights.dtype in FLOATING[:2]
        expect(ok and weights.is_contiguous(), "weights", f"contiguous {expected}", weights)


def _check_accumulator(accumulator: Tensor, what: str, shape: Sequence[int], source: Tensor) -> None:
    """Check a buffer that squares or gradients of ``source`` are added to."""
    wide = flat_dtype(source.dtype)
    expected = f"contiguous {str(wide).removeprefix('torch.')}{list(shape)} on {source.device}"
    ok = accumulator.shape == tuple(shape) and accumulator.dtype == wide and accumulator.device == source.device
    expect(ok and accumulator.is_contiguous(), what, expected, accumulator)


def check_accumulate_squares(fisher: Tensor, grads: Tensor, weights: Tensor | None) -> None:
    """Check the arguments of ``accumulate_squares_``: grads [N, *S] contiguous, fisher [*S]."""
    floating = grads.dim() >= 1 and grads.dtype in FLOATING
    expect(floating and grads.is_contiguous(), "grads", "contiguous floating point [N, ...]", grads)
    _check_accumulator(fisher, "fisher", grads.shape[1:], grads)
    _check_weights(weights, grads.shape[0], grads.device)


def check_fisher_linear(
    fisher: Tensor, activations: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Check the arguments of ``fisher_linear_``: activations [N, T, I], grad_outputs [N, T, O], fisher [O, I].

    The last dimension of both inputs must be contiguous; the first two may have any non-negative stride.
    """
    expect(
        activations.dim() == 3 and activations.dtype in FLOATING, "activations", "floating [N, T, D_in]", activations
    )
    n, t, _ = activations.shape
    ok = grad_outputs.dim() == 3 and grad_outputs.shape[:2] == (n, t) and grad_outputs.dtype == activations.dtype
    expect(
        ok and grad_outputs.device == activations.device,
        "grad_outputs",
        f"[{n}, {t}, D_out] with the dtype and device of activations ({describe(activations)})",
        grad_outputs,
    )
    for what, tensor in (("activations", activations), ("grad_outputs", grad_outputs)):
        expect(tensor.stride(2) == 1 or tensor.shape[2] <= 1, what, "contiguous in its last dimension", tensor)
    shape = (grad_outputs.shape[2], activations.shape[2])
    _check_accumulator(fisher, "fisher", shape, activations)
    _check_weights(weights, n, activations.device)
    if gradient is not None:
        _check_accumulator(gradient, "gradient", shape, activations)


def check_fisher_conv(
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
    """Check the arguments of ``fisher_conv_``: inputs [N, M, *S, C_in], grad_outputs [N, M, *L, C_out], channels last.

    Both may have any strides. fisher is [C_out, C_in / groups, *K] with 1 to 3 spatial dimensions.
    """
    ok = inputs.dim() in (4, 5, 6) and inputs.dtype in FLOATING
    expect(ok, "inputs", "floating [N, M, *S, C_in] with 1 to 3 spatial dimensions", inputs)
    n_spatial = inputs.dim() - 3
    ok = grad_outputs.dim() == inputs.dim() and grad_outputs.shape[:2] == inputs.shape[:2]
    ok = ok and grad_outputs.dtype == inputs.dtype and grad_outputs.device == inputs.device
    expected = f"[{inputs.shape[0]}, {inputs.shape[1]}, *L, C_out] with the dtype and device of inputs"
    expect(ok, "grad_outputs", f"{expected} ({describe(inputs)})", grad_outputs)
    for what, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != n_spatial or min(values) < least:
            raise ValueError(f"{what} must be {n_spatial} integers of at least {least}, got {list(values)}")
    c_in, c_out = inputs.shape[-1], grad_outputs.shape[-1]
    if groups < 1 or c_in % groups or c_out % groups:
        raise ValueError(f"groups must divide C_in = {c_in} and C_out = {c_out}, got {groups}")
    ok = fisher.dim() == n_spatial + 2 and fisher.shape[:2] == (c_out, c_in // groups) and fisher.numel() > 0
    expect(ok or fisher.numel() == 0, "fisher", f"[{c_out}, {c_in // groups}, *K]", fisher)
    for dim, kernel in enumerate(fisher.shape[2:]):
        size, positions = inputs.shape[2 + dim], grad_outputs.shape[2 + dim]
        reach = (positions - 1) * stride[dim] + (kernel - 1) * dilation[dim] + 1
        if positions and reach > size + 2 * padding[dim]:
            raise ValueError(
                f"grad_outputs has {positions} positions along spatial dimension {dim}, which reach {reach} elements, "
                f"more than the {size} of inputs and their padding of {padding[dim]}"
            )
    _check_accumulator(fisher, "fisher", fisher.shape, inputs)
    _check_weights(weights, inputs.shape[0], inputs.device)
    if gradient is not None:
        _check_accumulator(gradient, "gradient", fisher.shape, inputs)


def check_fisher_embedding(
    fisher: Tensor, indices: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Check the arguments of ``fisher_embedding_``: indices [N, T] int64, grad_outputs [N, T, D], fisher [V, D].

    That indices are below V is not checked here, since it would need the device's answer.
    """
    ok = grad_outputs.dim() == 3 and grad_outputs.dtype in FLOATING and grad_outputs.is_contiguous()
    expect(ok, "grad_outputs", "contiguous floating [N, T, D]", grad_outputs)
    ok = indices.shape == grad_outputs.shape[:2] and indices.dtype == torch.int64 and indices.is_contiguous()
    expected = f"contiguous int64{list(grad_outputs.shape[:2])} on {grad_outputs.device}"
    expect(ok and indices.device == grad_outputs.device, "indices", expected, indices)
    expect(fisher.dim() == 2, "fisher", "[V, D]", fisher)
    shape = (fisher.shape[0], grad_outputs.shape[2])
    _check_accumulator(fisher, "fisher", shape, grad_outputs)
    _check_weights(weights, indices.shape[0], indices.device)
    if gradient is not None:
        _check_accumulator(gradient, "gradient", shape, grad_outputs)


def check_scale_grads(activations: Tensor, grad_outputs: Tensor) -> None:
    """Check the arguments of ``scale_grads``: both [N, T, D] of any strides, of one dtype and device."""
    ok = activations.dim() == 3 and activations.dtype in FLOATING
    expect(ok, "activations", "floating [N, T, D]", activations)
    ok = grad_outputs.shape == activations.shape and grad_outputs.dtype == activations.dtype
    expected = f"like activations ({describe(activations)})"
    expect(ok and grad_outputs.device == activations.device, "grad_outputs", expected, grad_outputs)
