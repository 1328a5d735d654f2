"""What the Fisher kernels share: products on tensor cores, and what becomes of a sample's product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(g, a, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return acc + g a; UPCAST is for the interpreter, which multiplies bfloat16 as integers."""
    if UPCAST:
        g = g.to(tl.float32)
        a = a.to(tl.float32)
    return tl.dot(g, a, acc, input_precision=PRECISION)


@triton.jit
def product(
    g_ptr, a_ptr, g_plane, a_plane, g_mask, a_mask, acc,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc + G^T A over one chunk of t; with several terms the small products come first."""
    g0 = tl.load(g_ptr, mask=g_mask, other=0.0)
    a0 = tl.load(a_ptr, mask=a_mask, other=0.0)
    if TERMS > 1:
        g1 = tl.load(g_ptr + g_plane, mask=g_mask, other=0.0)
        a1 = tl.load(a_ptr + a_plane, mask=a_mask, other=0.0)
        if TERMS > 2:
            g2 = tl.load(g_ptr + 2 * g_plane, mask=g_mask, other=0.0)
            a2 = tl.load(a_ptr + 2 * a_plane, mask=a_mask, other=0.0)
            acc = dot(g2, a0, acc, PRECISION, UPCAST)
            acc = dot(g0, a2, acc, PRECISION, UPCAST)
            acc = dot(g1, a1, acc, PRECISION, UPCAST)
        acc = dot(g1, a0, acc, PRECISION, UPCAST)
        acc = dot(g0, a1, acc, PRECISION, UPCAST)
    return dot(g0, a0, acc, PRECISION, UPCAST)


@triton.jit
def add_tile(out, offsets, mask, tile, ADD: tl.constexpr):
    """Add a tile to the accumulator, or store it as a partial result."""
    if ADD:
        tile += tl.load(out + offsets, mask=mask, other=0.0)
    tl.store(out + offsets, tile, mask=mask)


@triton.jit
def add_sample(
    acc, f_acc, d_acc, weights, n, SQUARE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_GRADIENT: tl.constexpr
):
    """Return both accumulators with the product ``acc`` of sample n added, squared in the first."""
    scaled = acc
    if HAS_WEIGHTS:
        scaled = acc * tl.load(weights + n).to(tl.float32)
    if SQUARE:
        f_acc += scaled * acc
    else:
        f_acc += scaled
    if HAS_GRADIENT:
        d_acc += scaled
    return f_acc, d_acc
