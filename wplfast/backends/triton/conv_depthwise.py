"""The Fisher of a depthwise convolution: a sum over positions for each channel and tap, no matrix product.

A program owns a block of output channels and a few taps, so that one load of the output gradients serves all of them;
the inputs that neighbouring taps see overlap and come from the cache. Wider multipliers repeat input channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_geometry import SIZES, Geometry, choose_box
from .conv_taps import next_box
from .kernel import kernel
from .launch import OPTIONS, n_processors
from .reduce import fold_taps
from .split import OCTET

#: Positions in a box, channels and taps of a program: 2048 sums, 16 a thread. Twice as many halve the occupancy.
BOX, CHANNELS, TAPS, WARPS = 8, 64, 4, 4
_WIDTHS = ("n_samples", "taps", "multiplier", "g_width", "x_width")


@kernel(do_not_specialize=_WIDTHS + SIZES)
def fisher_depthwise_kernel(
    fisher, gradient, grad_outputs, inputs, weights, n_samples, taps, multiplier, g_width, x_width,
    images, l0, l1, l2, s0, s1, s2, k1, k2,
    stride0, stride1, stride2, pad0, pad1, pad2, dilation0, dilation1, dilation2,
    BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, TAPS: tl.constexpr, OCTETS: tl.constexpr,
    REPEAT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Partials [split, taps, C_out] of one block of channels and taps; OCTETS: the widths of G and X count in those."""
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    g_pitch, x_pitch = (g_width * 8, x_width * 8) if OCTETS else (g_width, x_width)
    tap_blocks = tl.cdiv(taps, TAPS)
    tap = tl.program_id(0) % tap_blocks * TAPS + tl.arange(0, TAPS)
    channel = tl.program_id(0) // tap_blocks * BC + tl.arange(0, BC)
    source = channel // multiplier if REPEAT else channel
    inside = (channel < g_pitch)[None, :]
    rk = tl.arange(0, BH * BW)
    box_y, box_x = rk // BW, rk % BW
    see_z = tap // (k1 * k2) * dilation0 - pad0
    see_y = (tap // k2 % k1 * dilation1 - pad1)[:, None] + (box_y * stride1)[None, :]
    see_x = (tap % k2 * dilation2 - pad2)[:, None] + (box_x * stride2)[None, :]
    g_offsets = (box_y * l2 + box_x)[:, None] * g_pitch + channel[None, :]
    x_rows = (see_z[:, None] * s1 + see_y) * s2 + see_x
    x_offsets = x_rows[:, :, None] * x_pitch + source[None, None, :]
    first = (n_samples * split.to(tl.int64) // n_splits).to(tl.int32)
    last = (n_samples * (split + 1).to(tl.int64) // n_splits).to(tl.int32)
    boxes_y, boxes_x = tl.cdiv(l1, BH), tl.cdiv(l2, BW)
    wide: tl.constexpr = fisher.dtype.element_ty
    f_acc = tl.zeros((TAPS, BC), wide)
    d_acc = tl.zeros((TAPS, BC), wide)
    for n in range(first, last):
        acc = tl.zeros((TAPS, BH * BW, BC), wide)
        x, y, z, m = 0, 0, 0, 0
        for _ in range(images * l0 * boxes_y * boxes_x):
            y0, x0 = y * BH, x * BW
            zi, yi, xi = z * stride0, y0 * stride1, x0 * stride2
            steps = (box_y < l1 - y0) & (box_x < l2 - x0)
            rows, columns, depth = yi + see_y, xi + see_x, zi + see_z
            seen = (rows >= 0) & (rows < s1) & (columns >= 0) & (columns < s2) & steps[None, :]
            seen &= ((depth >= 0) & (depth < s0) & (tap < taps))[:, None]
            image = tl.cast(n, tl.int64) * images + m
            g_row = ((image * l0 + z) * l1 + y0) * l2 + x0
            x_row = ((image * s0 + zi) * s1 + yi) * s2 + xi
            g = tl.load(grad_outputs + g_row * g_pitch + g_offsets, mask=steps[:, None] & inside, other=0.0)
            a_mask = seen[:, :, None] & inside[None, :, :]
            a = tl.load(inputs + x_row * x_pitch + x_offsets, mask=a_mask, other=0.0)
            acc += g.to(wide)[None, :, :] * a.to(wide)
            x, y, z, m, _done = next_box(x, y, z, m, boxes_x, boxes_y, l0, images)
        total = tl.sum(acc, axis=1)
        scaled = total
        if HAS_WEIGHTS:
            scaled = total * tl.load(weights + n).to(wide)
        f_acc += scaled * total
        if HAS_GRADIENT:
            d_acc += scaled
    offsets = (split.to(tl.int64) * taps + tap)[:, None] * g_pitch + channel[None, :]
    mask = (tap < taps)[:, None] & inside
    tl.store(fisher + offsets, f_acc, mask=mask)
    if HAS_GRADIENT:
        tl.store(gradient + offsets, d_acc, mask=mask)


def add_depthwise(
    fisher: Tensor, gradient: Tensor | None, g: Tensor, x: Tensor, weights: Tensor | None, shape: Geometry
) -> None:
    """Add the Fisher [C_out, 1, *K] of a convolution whose groups have one input channel each."""
    n, c_out, c_in = len(g), g.shape[-1], x.shape[-1]
    taps = min(TAPS, triton.next_power_of_2(shape.taps))
    programs = triton.cdiv(c_out, CHANNELS) * triton.cdiv(shape.taps, taps)
    splits = max(1, min(n, triton.cdiv(4 * n_processors(fisher.device), programs)))
    out = fisher.new_empty((splits, fisher.numel()))
    d_out = None if gradient is None else torch.empty_like(out)
    octets = c_out % OCTET == 0 and c_in % OCTET == 0
    unit = OCTET if octets else 1
    height, width = choose_box(shape.positions, BOX)
    fisher_depthwise_kernel[(programs, splits)](
        out, d_out, g, x, weights, n, shape.taps, c_out // c_in, c_out // unit, c_in // unit, *shape.sizes(),
        BC=CHANNELS, BH=height, BW=width, TAPS=taps, OCTETS=octets, REPEAT=c_out != c_in,
        HAS_WEIGHTS=weights is not None, HAS_GRADIENT=gradient is not None, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    fold_taps(out, fisher, shape.taps)
    if gradient is not None and d_out is not None:
        fold_taps(d_out, gradient, shape.taps)
