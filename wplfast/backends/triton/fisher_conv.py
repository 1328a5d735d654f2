"""The Fisher diagonal of a convolution's weight: which kernel serves which convolution.

==========================  ===============================================================================
pointwise, one group        a linear layer over all positions
one input channel a group   ``conv_depthwise``: sums for each channel and tap
few input channels          ``conv_unfold``: the unfolded inputs, then a linear layer
all others                  ``conv_taps``: implicit im2col; narrow groups share a tile
==========================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from . import fisher_linear
from .conv_depthwise import add_depthwise
from .conv_geometry import Geometry, choose_blocks, geometry
from .conv_taps import add_taps, as_channels
from .conv_unfold import unfold
from .fisher_config import choose_operands
from .launch import capability, on_device, written
from .split import OCTET

#: From this many input channels in a group on, a tap fills enough of a tile.
MIN_CHANNELS = 16
#: Narrow groups share a tile unless they have this many output channels: then all taps of one fill a tile better.
_MIN_UNFOLDED = 32
#: No box has more positions, no tile more rows.
_MAX_BOX, _MAX_TILE = 64, 128


def _near(shape: Geometry, c_in: int, c_out: int, groups: int) -> bool:
    """Tell whether offsets within a box and between taps fit 32 bits, and a sample's positions too."""
    x_pitch, g_pitch = (c + groups * OCTET for c in (c_in, c_out))  # at most, if groups are padded to octets
    deep, high, wide = ((k - 1) * d + p for k, d, p in zip(shape.kernel, shape.dilation, shape.padding, strict=True))
    high, wide = high + _MAX_BOX * shape.stride[1], wide + _MAX_BOX * shape.stride[2]
    widest = ((deep * shape.size[1] + high) * shape.size[2] + wide) * x_pitch
    longest = _MAX_BOX * (shape.positions[2] + 1) * g_pitch
    return max(widest, longest, c_in * shape.taps * _MAX_TILE, shape.n_steps) < 1 << 31


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
    """Fisher += sum_n w_n (sum_l G[n, l] X[n, l s - p + k d])^2, and the plain gradient beside it where wanted."""
    if fisher.numel() == 0 or inputs.numel() == 0 or grad_outputs.numel() == 0:
        return
    inputs, grad_outputs = inputs.contiguous(), grad_outputs.contiguous()
    n, c_in, c_out = len(inputs), inputs.shape[-1], grad_outputs.shape[-1]
    shape = geometry(inputs, grad_outputs, fisher.shape[2:], stride, padding, dilation)
    served = inputs.dtype != torch.float64 and capability(fisher.device) >= 80
    if not served or not _near(shape, c_in, c_out, groups):
        reference.fisher_conv_(fisher, inputs, grad_outputs, weights, gradient, stride, padding, dilation, groups)
        return
    group_in, group_out = c_in // groups, c_out // groups
    if shape.pointwise and groups == 1:
        x, g = inputs.view(n, shape.n_steps, c_in), grad_outputs.view(n, shape.n_steps, c_out)
        mean = None if gradient is None else gradient.view(c_out, c_in)
        fisher_linear.fisher_linear_(fisher.view(c_out, c_in), x, g, weights, mean)
        return
    with on_device(fisher.device):
        if group_in == 1 and groups > 1:
            add_depthwise(fisher, gradient, grad_outputs, inputs, weights, shape)
        elif group_in < MIN_CHANNELS and (groups == 1 or group_out >= _MIN_UNFOLDED):
            _unfolded(fisher, gradient, grad_outputs, inputs, weights, shape, groups)
        else:
            _in_place(fisher, gradient, grad_outputs, inputs, weights, shape, groups)
    written(fisher, gradient)


def _unfolded(
    fisher: Tensor,
    gradient: Tensor | None,
    grad_outputs: Tensor,
    inputs: Tensor,
    weights: Tensor | None,
    shape: Geometry,
    groups: int,
) -> None:
    """Unfold the inputs of one group and of a few samples at a time, and treat them as a linear layer."""
    n, t = len(inputs), shape.n_steps
    operands = choose_operands(inputs.dtype)
    group_in, group_out = inputs.shape[-1] // groups, grad_outputs.shape[-1] // groups
    flat = fisher.view(groups, group_out, group_in * shape.taps)
    flat_gradient = [None] * groups if gradient is None else gradient.view(flat.shape)
    rows = grad_outputs.view(n, t, groups, group_out)
    width = (group_in * shape.taps + group_out) * operands.terms * operands.dtype.itemsize
    step = max(1, fisher_linear.WORKSPACE // (width * t))
    for start in range(0, n, step):
        chunk = slice(start, start + step)
        w = None if weights is None else weights[chunk]
        for group in range(groups):
            a = unfold(inputs[chunk], shape, group * group_in, group_in, operands)
            g = fisher_linear.as_operand(rows[chunk, :, group], operands)
            fisher_linear.add_products(flat[group], g, a, operands, weights=w, gradient=flat_gradient[group])


def _in_place(
    fisher: Tensor,
    gradient: Tensor | None,
    grad_outputs: Tensor,
    inputs: Tensor,
    weights: Tensor | None,
    shape: Geometry,
    groups: int,
) -> None:
    """Multiply taps with the inputs as they lie, or with padded or split copies of them, a few samples at a time."""
    n, c_in, c_out = len(inputs), inputs.shape[-1], grad_outputs.shape[-1]
    operands = choose_operands(inputs.dtype)
    blocks = choose_blocks(groups, c_out // groups, c_in // groups)
    step = n
    if operands.terms > 1 or groups * blocks.in_pitch != c_in or groups * blocks.out_pitch != c_out:
        copied = inputs[0].numel() // c_in * blocks.in_pitch + shape.n_steps * blocks.out_pitch
        step = max(1, fisher_linear.WORKSPACE // (copied * groups * operands.terms * operands.dtype.itemsize))
    for start in range(0, n, step):
        chunk = slice(start, start + step)
        g = as_channels(grad_outputs[chunk], groups, blocks.out_pitch, operands)
        x = as_channels(inputs[chunk], groups, blocks.in_pitch, operands)
        w = None if weights is None else weights[chunk]
        add_taps(fisher, gradient, g, x, w, shape, blocks, groups, operands)
