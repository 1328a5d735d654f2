"""Operands for the Fisher kernel: float32 as a sum of bfloat16 terms, rows padded so that loads are 16 bytes wide.

Three bfloat16 numbers hold the 24 bits of a float32: x = x_0 + x_1 + x_2 exactly. The six leading products of two such
sums reproduce a float32 product to 2^-24 on tensor cores, which load bfloat16 16 bytes at a time from any layout, as
they cannot for float32. A pass that splits (and pads) the operands beforehand costs a few bytes an element and leaves
the kernel's registers to its accumulators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import kernel
from .launch import OPTIONS

#: Rows are padded to this many elements: 16 bytes of bfloat16, and the unit that the Fisher kernel counts strides in.
OCTET = 8
_BLOCK = 1024


@kernel(do_not_specialize=["n_steps", "width", "pitch", "stride_n", "stride_t", "n_rows", "plane"])
def split_kernel(
    x, out, weights, n_steps, width, pitch, stride_n, stride_t, n_rows, plane,
    TERMS: tl.constexpr, SQUARE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[:, row] = the terms of one row of x [N, T, width], or of its weighted squares; zeros in the padding."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sample = row // n_steps
    source = x + sample * stride_n + row % n_steps * stride_t
    readable = tl.where(row < n_rows, width, 0)
    value = tl.load(source + columns, mask=columns < readable, other=0.0)
    if SQUARE:
        value = value.to(tl.float32)
        value = value * value
        if HAS_WEIGHTS:
            value *= tl.load(weights + tl.where(row < n_rows, sample, 0)).to(tl.float32)
    target = out + row * pitch + columns
    inside = columns < pitch
    for term in tl.static_range(TERMS):
        part = value.to(out.dtype.element_ty)
        tl.store(target + tl.cast(plane, tl.int64) * term, part, mask=inside)
        if term < TERMS - 1:
            value = value.to(tl.float32) - part.to(tl.float32)


def split(
    x: Tensor, terms: int, dtype: torch.dtype, *, square: bool = False, weights: Tensor | None = None, rows: int = 0
) -> Tensor:
    """Return x [N, T, D] as [terms, max(N T, rows), pitch] in ``dtype``, with D padded to whole octets by zeros.

    Args:
        x: floating point, contiguous in its last dimension.
        terms: 1 copies; 2 or 3 give bfloat16 terms whose sum is x to 16 or 24 bits.
        dtype: type of the terms.
        square: split x^2 instead of x.
        weights: with ``square``, factors [N] of the squares.
        rows: rows of the result; those beyond N T are zero.
    """
    n, t, width = x.shape
    pitch = triton.cdiv(width, OCTET) * OCTET
    rows = max(rows, n * t)
    out = torch.empty((terms, rows, pitch), dtype=dtype, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(pitch))
    split_kernel[(rows, triton.cdiv(pitch, block))](
        x, out, weights, t, width, pitch, x.stride(0), x.stride(1), n * t, rows * pitch,
        TERMS=terms, SQUARE=square, HAS_WEIGHTS=weights is not None, BLOCK=block, **OPTIONS,
    )  # fmt: skip
    return out
