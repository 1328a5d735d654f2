"""The Fisher of a linear layer with operands that come through tensor descriptors (TMA, sm_90 and later).

One thread asks for a whole tile and the copy engine finds the addresses: no thread keeps any, and what lies beyond the
end of a sample or a row arrives as zeros. The loop, the plan of shared tiles and their sums are the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wplfast.backends.triton import fisher_linear
from wplfast.backends.triton.fisher_plan import Layer, n_tiles
from wplfast.backends.triton.fold_tiles import GROUP, fold_tiles, tile_corner
from wplfast.backends.triton.launch import INTERPRETED, OPTIONS
from wplfast.backends.triton.split import OCTET


@triton.jit
def _read(x, n, step, column, BK: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows from ``step`` on of sample n, [BK, WIDTH]."""
    return x.load([n, step, column]).reshape(BK, WIDTH)


@triton.jit(do_not_specialize=["whole", "rest", "splits", "n_samples", "n_steps", "d_out", "d_in"])
def fisher_tma_kernel(
    fisher, partials, grad_outputs, activations, whole, rest, splits, n_samples, n_steps, d_out, d_in,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    WHOLE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """See ``fisher_linear_kernel``; d_in is a multiple of 8."""
    program = tl.program_id(0)
    turn = tl.maximum(program - whole, 0)
    split, n_splits = turn // rest, tl.where(program < whole, 1, splits)
    tile = tl.where(program < whole, program, whole + turn % rest)
    m_start, n_start = tile_corner(tile, d_out, d_in, BM, BN, GROUP)
    first = (n_samples * split.to(tl.int64) // n_splits).to(tl.int32)
    last = (n_samples * (split + 1).to(tl.int64) // n_splits).to(tl.int32)
    chunks = tl.cdiv(n_steps, BK)
    f_acc = tl.zeros((BM, BN), tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    n, chunk = first, 0
    for _ in range((last - first) * chunks):
        g = _read(grad_outputs, n, chunk * BK, m_start, BK, BM)
        a = _read(activations, n, chunk * BK, n_start, BK, BN)
        if UPCAST:
            g, a = g.to(tl.float32), a.to(tl.float32)
        acc = tl.dot(g.T, a, acc)
        chunk += 1
        done = chunk == chunks
        if done:
            f_acc += acc * acc
            acc = tl.zeros((BM, BN), tl.float32)
        chunk = tl.where(done, 0, chunk)
        n = tl.where(done, n + 1, n)
    if WHOLE:  # noqa: SIM102  (Triton leaves code out by constants alone)
        if program < whole:
            rows, columns = m_start + tl.arange(0, BM), n_start + tl.arange(0, BN)
            pitch = d_in // 8 * 8
            target = fisher + tl.cast(m_start, tl.int64) * pitch + n_start
            target += tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
            mask = (rows < d_out)[:, None] & (columns < pitch)[None, :]
            tl.store(target, tl.load(target, mask=mask, other=0.0) + f_acc, mask=mask)
    if SHARED:  # noqa: SIM102
        if program >= whole:
            slot = tl.cast(turn, tl.int64) * (BM * BN)
            tl.store(partials + slot + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], f_acc)


def fisher_tma_(fisher: Tensor, a: Tensor, g: Tensor, weights: None = None, gradient: None = None) -> None:
    """Fisher += sum_n (G_n^T A_n)^2 for half types whose rows lie on 16-byte boundaries, with the library's plan."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (n, t, d_out), d_in = g.shape, a.shape[2]
    if weights is not None or gradient is not None or d_out % OCTET or d_in % OCTET or g.dtype == torch.float32:
        raise ValueError(f"served are half types, widths in eights, no weights, no gradient; got {g.dtype}, {g.shape}")
    layer = Layer(d_out, d_in, n, t)
    plan = fisher_linear.choose_plan(fisher.device, fisher_linear.choose_operands(g.dtype), layer, False)
    tile, rest = plan.tile, n_tiles(plan.tile, layer) - plan.whole
    partials = fisher.new_empty((plan.splits, rest, tile.m, tile.n)) if rest else None
    described = (
        TensorDescriptor.from_tensor(x.contiguous(), [1, tile.k, width]) for x, width in ((g, tile.m), (a, tile.n))
    )
    fisher_tma_kernel[(plan.whole + rest * plan.splits,)](
        fisher, partials, *described, plan.whole, max(rest, 1), plan.splits, n, t, d_out, d_in,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP=GROUP, UPCAST=INTERPRETED and g.dtype == torch.bfloat16,
        WHOLE=plan.whole > 0, SHARED=rest > 0, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
    fold_tiles(partials, fisher, plan.whole)
