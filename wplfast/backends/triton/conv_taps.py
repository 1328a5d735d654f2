"""The Fisher of a convolution, one filter tap for each program: implicit im2col on tensor cores.

A tap's share of a sample's gradient is a product like that of a linear layer, of the output gradients and of the inputs
that the tap sees. The inner loop runs over boxes of output positions: where the rows of a box lie, relative to its
corner, never changes, so that a step costs a few scalar operations and no division.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_geometry import SIZES, Blocks, Geometry, choose_box
from .fisher_config import Operands
from .fisher_plan import Layer, Plan, n_tiles, run_planned
from .kernel import kernel
from .launch import INTERPRETED, OPTIONS
from .products import add_sample, add_tile, product
from .reduce import fold_taps
from .split import OCTET, split

_WIDTHS = ("n_samples", "taps", "n_groups", "group_out", "group_in", "g_octets", "x_octets", "g_block", "x_block")
_PLANES = ("g_plane", "x_plane")
#: Larger results are added to as they lie, four bytes at a time.
_MAX_SCRATCH = 1 << 28


@triton.jit
def next_box(x, y, z, m, boxes_x, boxes_y, l0, images):
    """Return the coordinates of the box after this one, and whether this one was the last of its sample."""
    x += 1
    carry = x == boxes_x
    x = tl.where(carry, 0, x)
    y = tl.where(carry, y + 1, y)
    carry = y == boxes_y
    y = tl.where(carry, 0, y)
    z = tl.where(carry, z + 1, z)
    carry = z == l0
    z = tl.where(carry, 0, z)
    m = tl.where(carry, m + 1, m)
    carry = m == images
    m = tl.where(carry, 0, m)
    return x, y, z, m, carry


@kernel(do_not_specialize=_WIDTHS + _PLANES + SIZES)
def fisher_conv_kernel(
    fisher, gradient, grad_outputs, inputs, weights,
    n_samples, taps, n_groups, group_out, group_in, g_octets, x_octets, g_block, x_block, g_plane, x_plane,
    images, l0, l1, l2, s0, s1, s2, k1, k2,
    stride0, stride1, stride2, pad0, pad1, pad2, dilation0, dilation1, dilation2,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr,
    OUT_PITCH: tl.constexpr, IN_PITCH: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ONE: tl.constexpr, ADD: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, WIDE_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of one tap of one block of groups, for one split of the samples.

    Row widths and blocks of G and X come in octets (see ``fisher_linear_kernel``), planes of their terms too. ADD: into
    ``fisher`` [C_out, C_in / groups, taps], else partials [split, taps, C_out, C_in / groups]. ONE: a box is a sample.
    PACKED blocks hold several groups at pitches OUT_PITCH and IN_PITCH.
    """
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    # The taps of a tile run side by side: they read the same rows of G and nearly those of X.
    tap, tile = tl.program_id(0) % taps, tl.program_id(0) // taps
    tiles_m, tiles_n = tl.cdiv(g_block * 8, BM), tl.cdiv(x_block * 8, BN)
    block = tile // (tiles_m * tiles_n)
    m_start, n_start = tile // tiles_n % tiles_m * BM, tile % tiles_n * BN
    rm, rn, rk = m_start + tl.arange(0, BM), n_start + tl.arange(0, BN), tl.arange(0, BH * BW)
    box_y, box_x = rk // BW, rk % BW
    see_z = tap // (k1 * k2) * dilation0 - pad0
    see_y = tap // k2 % k1 * dilation1 - pad1
    see_x = tap % k2 * dilation2 - pad2
    g_offsets = (box_y * l2 + box_x)[None, :] * (g_octets * 8) + rm[:, None]
    x_offsets = (box_y * stride1 * s2 + box_x * stride2)[:, None] * (x_octets * 8) + rn[None, :]
    # The last block may hold fewer groups than the others.
    g_columns = (rm < tl.minimum(g_block, g_octets - block * g_block) * 8)[:, None]
    x_columns = (rn < tl.minimum(x_block, x_octets - block * x_block) * 8)[None, :]
    g_skip, x_skip = tl.cast(g_plane, tl.int64) * 8, tl.cast(x_plane, tl.int64) * 8
    first = (n_samples * split.to(tl.int64) // n_splits).to(tl.int32)
    last = (n_samples * (split + 1).to(tl.int64) // n_splits).to(tl.int32)
    boxes_y, boxes_x = tl.cdiv(l1, BH), tl.cdiv(l2, BW)
    f_acc = tl.zeros((BM, BN), tl.float32)
    d_acc = tl.zeros((BM, BN), tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    n, m, z, y, x = first, 0, 0, 0, 0
    for _ in range((last - first) * images * l0 * boxes_y * boxes_x):
        y0, x0 = y * BH, x * BW
        zi, yi, xi = z * stride0 + see_z, y0 * stride1 + see_y, x0 * stride2 + see_x
        steps = (box_y < l1 - y0) & (box_x < l2 - x0)
        rows, columns = yi + box_y * stride1, xi + box_x * stride2
        # Masked positions have no gradient, but what X holds there may be infinite: it must not be read either.
        height = tl.where((zi >= 0) & (zi < s0), s1, 0)
        seen = steps & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < s2)
        image = tl.cast(n, tl.int64) * images + m
        g_row = ((image * l0 + z) * l1 + y0) * l2 + x0
        x_row = ((image * s0 + zi) * s1 + yi) * s2 + xi
        g_ptr = grad_outputs + (g_row * g_octets + block * g_block) * 8 + g_offsets
        x_ptr = inputs + (x_row * x_octets + block * x_block) * 8 + x_offsets
        g_mask, x_mask = steps[None, :] & g_columns, seen[:, None] & x_columns
        if ONE:
            acc = tl.zeros((BM, BN), tl.float32)
            acc = product(g_ptr, x_ptr, g_skip, x_skip, g_mask, x_mask, acc, TERMS, PRECISION, UPCAST)
            f_acc, d_acc = add_sample(acc, f_acc, d_acc, weights, n, True, HAS_WEIGHTS, HAS_GRADIENT)
            n += 1
        else:
            acc = product(g_ptr, x_ptr, g_skip, x_skip, g_mask, x_mask, acc, TERMS, PRECISION, UPCAST)
            x, y, z, m, done = next_box(x, y, z, m, boxes_x, boxes_y, l0, images)
            if done:
                f_acc, d_acc = add_sample(acc, f_acc, d_acc, weights, n, True, HAS_WEIGHTS, HAS_GRADIENT)
                acc = tl.zeros((BM, BN), tl.float32)
            n = tl.where(done, n + 1, n)
    pitch = x_block * 8 if WIDE_ROWS else group_in
    if PACKED:
        group = block * (g_block * 8 // OUT_PITCH) + rm // OUT_PITCH
        own = (rm // OUT_PITCH)[:, None] == (rn // IN_PITCH)[None, :]
        inside = (rm < g_block * 8) & (rm % OUT_PITCH < group_out) & (group < n_groups)
        mask = own & inside[:, None] & ((rn < x_block * 8) & (rn % IN_PITCH < group_in))[None, :]
        start = tl.cast(block, tl.int64) * (g_block * 8 // OUT_PITCH) * group_out
        within = (rm // OUT_PITCH * group_out + rm % OUT_PITCH)[:, None] * pitch + (rn % IN_PITCH)[None, :]
        corner = start * pitch
    else:
        mask = (rm < group_out)[:, None] & (rn < pitch)[None, :]
        within = tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
        corner = (tl.cast(block, tl.int64) * group_out + m_start) * pitch + n_start
    if ADD:
        base, offsets = corner * taps + tap, within * taps
    else:
        plane = tl.cast(n_groups * group_out, tl.int64) * pitch
        base, offsets = (split.to(tl.int64) * taps + tap) * plane + corner, within
    add_tile(fisher + base, offsets, mask, f_acc, ADD)
    if HAS_GRADIENT:
        add_tile(gradient + base, offsets, mask, d_acc, ADD)


def as_channels(x: Tensor, groups: int, pitch: int, operands: Operands) -> Tensor:
    """Return contiguous x [N, M, *S, C] as [terms, ..., groups * pitch], a view if the kernel can read it in place."""
    channels = x.shape[-1]
    if channels != groups * pitch:
        rows = split(x.view(-1, groups, channels // groups), operands.terms, operands.dtype)
    elif operands.terms > 1 or x.data_ptr() % 16:
        rows = split(x.view(-1, 1, x.shape[-2] * channels), operands.terms, operands.dtype)  # long rows: few programs
    else:
        return x.unsqueeze(0)
    return rows.view(operands.terms, *x.shape[:-1], groups * pitch)


def add_taps(
    fisher: Tensor,
    gradient: Tensor | None,
    g: Tensor,
    x: Tensor,
    weights: Tensor | None,
    shape: Geometry,
    blocks: Blocks,
    groups: int,
    operands: Operands,
) -> None:
    """Run the kernel over operands of :func:`as_channels` and add its result to fisher and gradient."""
    n, (c_out, group_in) = g.shape[1], fisher.shape[:2]
    m, k = blocks.groups * blocks.out_pitch, blocks.groups * blocks.in_pitch
    copies = triton.cdiv(groups, blocks.groups) * shape.taps
    layer = Layer(m, k, n, shape.n_steps, blocks=copies, plane=fisher.nbytes)

    def run(plan: Plan) -> None:
        tile, tiles, splits = plan.tile, n_tiles(plan.tile, layer), plan.splits
        height, width = choose_box(shape.positions, tile.k)
        # Taps lie side by side in the result: partials let programs write whole rows even where nothing is split.
        packed = blocks.groups > 1
        scratch = splits > 1 or fisher.nbytes <= _MAX_SCRATCH
        out = fisher.new_empty((splits, fisher.numel())) if scratch else fisher
        d_out = gradient if gradient is None or not scratch else torch.empty_like(out)
        fisher_conv_kernel[(tiles, splits)](
            out, d_out, g, x, weights, n, shape.taps, groups, c_out // groups, group_in,
            g.shape[-1] // OCTET, x.shape[-1] // OCTET, m // OCTET, k // OCTET,
            g[0].numel() // OCTET, x[0].numel() // OCTET, *shape.sizes(),
            BM=tile.m, BN=tile.n, BH=height, BW=width, PACKED=packed,
            OUT_PITCH=blocks.out_pitch if packed else 0, IN_PITCH=blocks.in_pitch if packed else 0,
            TERMS=operands.terms, PRECISION=operands.precision, UPCAST=INTERPRETED and g.dtype == torch.bfloat16,
            ONE=shape.images * shape.positions[0] == 1 and height >= shape.positions[1] and width >= shape.positions[2],
            ADD=not scratch, HAS_WEIGHTS=weights is not None, HAS_GRADIENT=gradient is not None,
            WIDE_ROWS=blocks.groups == 1 and blocks.in_pitch == group_in,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
        if scratch:
            fold_taps(out, fisher, shape.taps)
            if gradient is not None and d_out is not None:
                fold_taps(d_out, gradient, shape.taps)

    run_planned("fisher_conv_kernel", fisher.device, operands, layer, gradient is not None, run)
