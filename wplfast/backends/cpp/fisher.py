"""The Fisher operators on CPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import wplfast._C as _C

from ...ops.layout import flat_dtype
from .dtypes import DTYPES


def _wide_weights(weights: Tensor | None) -> Tensor | None:
    """Return the sample weights as float64, the one type the kernels take."""
    return None if weights is None else weights.double()


def accumulate_squares_(fisher: Tensor, grads: Tensor, weights: Tensor | None) -> None:
    """Fisher += sum_n w_n grads[n]^2."""
    weights = _wide_weights(weights)
    _C.accumulate_squares(
        DTYPES[grads.dtype],
        fisher.data_ptr(),
        grads.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        len(grads),
        fisher.numel(),
        torch.get_num_threads(),
    )
    increment_version(fisher)


def _sample_matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Describe a [N, T, size] tensor for the extension."""
    return tensor.data_ptr(), tensor.shape[2], tensor.stride(0), tensor.stride(1)


def fisher_linear_(
    fisher: Tensor, activations: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Fisher += sum_n w_n (G_n^T A_n)^2, with T = 1 as one product of squares."""
    weights = _wide_weights(weights)
    _C.fisher_linear(
        DTYPES[activations.dtype],
        fisher.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        _sample_matrix(grad_outputs),
        _sample_matrix(activations),
        0 if weights is None else weights.data_ptr(),
        activations.shape[0],
        activations.shape[1],
        torch.get_num_threads(),
    )
    increment_version(fisher)
    if gradient is not None:
        increment_version(gradient)


def _channels_last(images: Tensor) -> Tensor:
    """Return images [N, M, *S, C] that lie channels last in memory; from channels first in one pass over them."""
    if images.is_contiguous():
        return images
    first = images.movedim(-1, 2)
    if not first.is_contiguous():
        return images.contiguous()
    turned = torch.empty(images.shape, dtype=images.dtype, device=images.device)
    n, m, channels = first.shape[:3]
    sizes = n * m, channels, math.prod(first.shape[3:])
    _C.turn(first.data_ptr(), turned.data_ptr(), *sizes, images.element_size(), torch.get_num_threads())
    return turned


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
    """Fisher += sum_n w_n (G_n^T patches of X_n)^2; the patches exist a few rows at a time, in the caches."""
    weights, inputs = _wide_weights(weights), _channels_last(inputs)
    channels_first = not grad_outputs.is_contiguous() and grad_outputs.movedim(-1, 1).is_contiguous()
    if not channels_first:
        grad_outputs = _channels_last(grad_outputs)
    spatial = (inputs.shape[2:-1], grad_outputs.shape[2:-1], fisher.shape[2:], stride, padding, dilation)
    _C.fisher_conv(
        DTYPES[inputs.dtype],
        fisher.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        inputs.data_ptr(),
        grad_outputs.data_ptr(),
        channels_first,
        0 if weights is None else weights.data_ptr(),
        inputs.shape[0],
        inputs.shape[1],
        inputs.shape[-1],
        grad_outputs.shape[-1],
        groups,
        tuple(map(tuple, spatial)),
        torch.get_num_threads(),
    )
    increment_version(fisher)
    if gradient is not None:
        increment_version(gradient)


def fisher_embedding_(
    fisher: Tensor, indices: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Fisher[v] += sum_n w_n (sum_{t: indices[n, t] = v} G[n, t])^2, row by row of the table.

    Raises:
        IndexError: if an index is V or more; nothing has been written then.
    """
    weights = _wide_weights(weights)
    _C.fisher_embedding(
        DTYPES[grad_outputs.dtype],
        fisher.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        indices.data_ptr(),
        grad_outputs.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        *grad_outputs.shape[:2],
        *fisher.shape,
        torch.get_num_threads(),
    )
    increment_version(fisher)
    if gradient is not None:
        increment_version(gradient)


def _contiguous_in(tensor: Tensor, dim: int) -> bool:
    """Tell whether elements along a dimension lie beside each other."""
    return tensor.stride(dim) == 1 or tensor.shape[dim] <= 1


def scale_grads(activations: Tensor, grad_outputs: Tensor) -> Tensor:
    """Return sum_t A[n, t] G[n, t]; the kernels take tensors that are both contiguous in t, or both in d."""
    both = [activations, grad_outputs]
    steps = all(_contiguous_in(tensor, 1) for tensor in both) and not all(_contiguous_in(t, 2) for t in both)
    if not steps:
        both = [tensor if _contiguous_in(tensor, 2) else tensor.contiguous() for tensor in both]
    grads = torch.empty(activations.shape[::2], dtype=flat_dtype(activations.dtype), device="cpu")
    a, g = ((tensor.data_ptr(), *tensor.stride()) for tensor in both)
    _C.scale_grads(
        DTYPES[activations.dtype], grads.data_ptr(), a, g, *activations.shape, steps, torch.get_num_threads()
    )
    return grads
