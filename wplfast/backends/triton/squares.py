"""Sums of squared per-sample gradients that are already in memory: fisher += sum_n w_n grads[n]^2."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .kernel import kernel
from .launch import OPTIONS, n_processors, on_device, written
from .reduce import fold_partials

ROWS, BLOCK, WARPS = 8, 256, 4
#: A program sums at least this many samples, so that partial sums stay a small part of the memory traffic.
MIN_SAMPLES = 64


@kernel(do_not_specialize=["n_samples"])
def accumulate_squares_kernel(
    out, grads, weights, n_samples, numel,
    ADD: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[split] (+)= the weighted squares of the split's samples, for one block of columns."""
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    first = (n_samples * split.to(tl.int64) // n_splits).to(tl.int32)
    last = (n_samples * (split + 1).to(tl.int64) // n_splits).to(tl.int32)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    inside = columns < numel
    wide: tl.constexpr = out.dtype.element_ty
    total = tl.zeros((ROWS, BLOCK), wide)
    lost = tl.zeros((ROWS, BLOCK), wide)
    for n in range(first, last, ROWS):
        sample = tl.cast(n, tl.int64) + rows
        present = sample < last
        offsets = sample[:, None] * numel + columns[None, :]
        g = tl.load(grads + offsets, mask=present[:, None] & inside[None, :], other=0.0).to(wide)
        square = g * g
        if HAS_WEIGHTS:
            square *= tl.load(weights + sample, mask=present, other=0.0).to(wide)[:, None]
        # Kahan's sum: 1e5 samples lose nothing in float32, and the loop still waits for memory.
        square -= lost
        updated = total + square
        lost = (updated - total) - square
        total = updated
    result = tl.sum(total, axis=0)
    target = out + split.to(tl.int64) * numel + columns
    if ADD:
        result += tl.load(target, mask=inside, other=0.0)
    tl.store(target, result, mask=inside)


def accumulate_squares_(fisher: Tensor, grads: Tensor, weights: Tensor | None) -> None:
    """Fisher += sum_n w_n grads[n]^2."""
    n_samples, numel = len(grads), fisher.numel()
    if n_samples == 0 or numel == 0:
        return
    n_blocks = triton.cdiv(numel, BLOCK)
    wanted = triton.cdiv(4 * n_processors(fisher.device), n_blocks)
    n_splits = max(1, min(wanted, n_samples // MIN_SAMPLES))
    with on_device(fisher.device):
        out = fisher if n_splits == 1 else fisher.new_empty((n_splits, *fisher.shape))
        accumulate_squares_kernel[(n_blocks, n_splits)](
            out, grads, weights, n_samples, numel,
            ADD=n_splits == 1, HAS_WEIGHTS=weights is not None, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        if n_splits > 1:
            fold_partials(out, fisher)
    written(fisher)
