"""Deterministic sums of partial results: fixed order, no atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import kernel
from .launch import OPTIONS

#: Partials that one program sums; more than this many take a middle stage.
SPAN = 1 << 16
_BLOCK = 1024
_FOLD_BLOCK = 1024


@kernel(
    do_not_specialize=["n_partials", "n_terms"],
    do_not_specialize_on_alignment=["partials", "out", "alpha", "constant"],
)
def sum_partials_kernel(
    partials, out, n_partials, alpha, constant, n_terms,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, HAS_CONSTANT: tl.constexpr,
):  # fmt: skip
    """out[program] = sum of the program's span of float64 partials, and of alpha constant / 2 where there is one."""
    first = tl.program_id(0).to(tl.int64) * SPAN
    count = tl.minimum(n_partials - first, SPAN).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partials + first + start + lanes, mask=start + lanes < count, other=0.0)
    if HAS_CONSTANT:
        for start in range(0, n_terms, BLOCK):
            mask = start + lanes < n_terms
            alpha_p = tl.load(alpha + start + lanes, mask=mask, other=0.0)
            total += 0.5 * alpha_p * tl.load(constant + start + lanes, mask=mask, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total).to(out.dtype.element_ty))


def sum_partials(
    partials: Tensor,
    dtype: torch.dtype,
    alpha: Tensor | None = None,
    constant: Tensor | None = None,
    last: Any = sum_partials_kernel,
) -> Tensor:
    """Return the sum of float64 partials [C], and of alpha constant / 2, as a 0-d tensor; ``last`` ends it."""
    while len(partials) > SPAN:
        middle = partials.new_empty(triton.cdiv(len(partials), SPAN))
        stage = len(partials), None, None, 0, SPAN, _BLOCK, False
        sum_partials_kernel[(len(middle),)](partials, middle, *stage, **OPTIONS)
        partials = middle
    out = partials.new_empty((), dtype=dtype)
    n_terms = 0 if constant is None else constant.numel()
    last[(1,)](partials, out, len(partials), alpha, constant, n_terms, SPAN, _BLOCK, constant is not None, **OPTIONS)
    return out


@kernel(do_not_specialize=["n_partials"])
def fold_partials_kernel(partials, out, n_partials, numel, BLOCK: tl.constexpr):
    """out[i] += sum over s of partials[s, i]."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < numel
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for s in range(n_partials):
        total += tl.load(partials + tl.cast(s, tl.int64) * numel + columns, mask=mask, other=0.0)
    tl.store(out + columns, tl.load(out + columns, mask=mask, other=0.0) + total, mask=mask)


def fold_partials(partials: Tensor, out: Tensor) -> None:
    """Add partials [S, *shape] to the contiguous ``out`` [*shape], in the order of S."""
    numel = out.numel()
    grid = (triton.cdiv(numel, _FOLD_BLOCK),)
    fold_partials_kernel[grid](partials, out, len(partials), numel, _FOLD_BLOCK, **OPTIONS)


@kernel(do_not_specialize=["n_partials", "taps"])
def fold_taps_kernel(partials, out, n_partials, taps, rows, ROWS: tl.constexpr, TAPS: tl.constexpr):
    """out[row, tap] += sum over s of partials[s, tap, row]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tap = tl.program_id(1) * TAPS + tl.arange(0, TAPS)
    mask = (row < rows)[:, None] & (tap < taps)[None, :]
    total = tl.zeros((ROWS, TAPS), out.dtype.element_ty)
    for s in range(n_partials):
        plane = tl.cast(s, tl.int64) * taps + tap
        total += tl.load(partials + plane[None, :] * rows + row[:, None], mask=mask, other=0.0)
    target = out + row[:, None] * taps + tap[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + total, mask=mask)


def fold_taps(partials: Tensor, out: Tensor, taps: int) -> None:
    """Add partials [S, taps, rows] to the contiguous ``out`` [rows, taps], in the order of S."""
    if taps == 1:
        fold_partials(partials, out)
        return
    rows = out.numel() // taps
    block = min(16, triton.next_power_of_2(taps))
    height = _FOLD_BLOCK // block
    grid = (triton.cdiv(rows, height), triton.cdiv(taps, block))
    fold_taps_kernel[grid](partials, out, len(partials), taps, rows, ROWS=height, TAPS=block, **OPTIONS)
