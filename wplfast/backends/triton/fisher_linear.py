"""The Fisher diagonal of a linear layer without per-sample gradients in memory.

    fisher[o, i] += sum_n w_n (sum_t G[n, t, o] A[n, t, i])^2,   gradient[o, i] += sum_n w_n sum_t G[n, t, o] A[n, t, i]

Each program owns a tile of (o, i) and walks one flat loop over all samples and their chunks of t, so that the loads of
the next sample are in flight while the last one is squared; at a sample's last chunk its product is squared into the
Fisher accumulator. For T = 1 the sum of squared products is a product of squares, (G^2)^T A^2: one plain GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .fisher_config import MAX_PARTIALS, Operands, choose_operands
from .fisher_plan import Layer, Plan, run_planned
from .fold_tiles import GROUP, fold_tiles, tile_corner
from .kernel import kernel
from .launch import INTERPRETED, OPTIONS, capability, on_device, written
from .products import add_sample, add_tile, product
from .split import OCTET, split

#: Bytes that split or padded operands of one launch may take; more samples go in several launches.
WORKSPACE = 1 << 28
#: Wider layers are left to the reference: offsets within a tile of at most 128 rows must fit 32 bits.
MAX_WIDTH = 1 << 24
#: No tile's chunk of t is longer.
_MAX_CHUNK = 64

_SIZES = ("whole", "rest", "splits", "first_shared", "n_samples", "n_steps", "d_out", "d_in", "g_octets", "a_octets")
_STRIDES = ("g_sample", "g_step", "g_plane", "a_sample", "a_step", "a_plane")


@kernel(do_not_specialize=_SIZES + _STRIDES)
def fisher_linear_kernel(
    fisher, gradient, partials, mean_partials, grad_outputs, activations, weights, whole, rest, splits, first_shared,
    n_samples, n_steps, d_out, d_in, g_octets, a_octets, g_sample, g_step, g_plane, a_sample, a_step, a_plane,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SQUARE: tl.constexpr, ONE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One tile of the Fisher of some of the samples; widths and strides of G and A come in octets.

    Counting in octets is what tells the compiler that rows start on 16-byte boundaries. ONE: T <= BK, one product for
    each sample. Without SQUARE the plain products are summed. The first ``whole`` programs add to ``fisher``, the
    others leave partials [splits, rest, BM, BN]: a branch at run time, so that one compiled kernel serves every plan.
    """
    # The first programs have a tile of their own; the others share tiles, each for some of the samples.
    program = tl.program_id(0)
    turn = tl.maximum(program - whole, 0)
    split, n_splits = turn // rest, tl.where(program < whole, 1, splits)
    tile = tl.where(program < whole, program, first_shared + turn % rest)
    m_start, n_start = tile_corner(tile, d_out, d_in, BM, BN, GROUP)
    rm = m_start + tl.arange(0, BM)
    rn = n_start + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    # A tile's offsets fit 32 bits and never change; sample and chunk move the 64-bit base.
    # G is read as its transpose: a transposition in registers would keep it out of the asynchronous copies on sm_80.
    g_offsets = rk[None, :] * (g_step * 8) + rm[:, None]
    a_offsets = rk[:, None] * (a_step * 8) + rn[None, :]
    g_columns = (rm < g_octets * 8)[:, None]
    a_columns = (rn < a_octets * 8)[None, :]
    g_skip, a_skip = tl.cast(g_plane, tl.int64) * 8, tl.cast(a_plane, tl.int64) * 8
    first = (n_samples * split.to(tl.int64) // n_splits).to(tl.int32)
    last = (n_samples * (split + 1).to(tl.int64) // n_splits).to(tl.int32)
    f_acc = tl.zeros((BM, BN), tl.float32)
    d_acc = tl.zeros((BM, BN), tl.float32)
    if ONE:
        steps = rk < n_steps
        for n in range(first, last):
            sample = tl.cast(n, tl.int64)
            g_ptr = grad_outputs + sample * g_sample * 8 + g_offsets
            a_ptr = activations + sample * a_sample * 8 + a_offsets
            g_mask, a_mask = steps[None, :] & g_columns, steps[:, None] & a_columns
            if SQUARE or HAS_WEIGHTS:
                acc = tl.zeros((BM, BN), tl.float32)
                acc = product(g_ptr, a_ptr, g_skip, a_skip, g_mask, a_mask, acc, TERMS, PRECISION, UPCAST)
                f_acc, d_acc = add_sample(acc, f_acc, d_acc, weights, n, SQUARE, HAS_WEIGHTS, HAS_GRADIENT)
            else:
                f_acc = product(g_ptr, a_ptr, g_skip, a_skip, g_mask, a_mask, f_acc, TERMS, PRECISION, UPCAST)
    else:
        chunks = tl.cdiv(n_steps, BK)
        acc = tl.zeros((BM, BN), tl.float32)
        n, chunk = first, 0
        for _ in range((last - first) * chunks):
            sample, step = tl.cast(n, tl.int64), tl.cast(chunk * BK, tl.int64)
            steps = rk < n_steps - chunk * BK
            g_ptr = grad_outputs + (sample * g_sample + step * g_step) * 8 + g_offsets
            a_ptr = activations + (sample * a_sample + step * a_step) * 8 + a_offsets
            g_mask, a_mask = steps[None, :] & g_columns, steps[:, None] & a_columns
            acc = product(g_ptr, a_ptr, g_skip, a_skip, g_mask, a_mask, acc, TERMS, PRECISION, UPCAST)
            chunk += 1
            done = chunk == chunks
            if done:
                f_acc, d_acc = add_sample(acc, f_acc, d_acc, weights, n, SQUARE, HAS_WEIGHTS, HAS_GRADIENT)
                acc = tl.zeros((BM, BN), tl.float32)
            chunk = tl.where(done, 0, chunk)
            n = tl.where(done, n + 1, n)
    if program < whole:
        # d_in is a multiple of 8 here: rows of the result lie on 16-byte boundaries, stores are as wide as loads.
        pitch = a_octets * 8
        base = tl.cast(m_start, tl.int64) * pitch + n_start
        offsets = tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
        mask = (rm < d_out)[:, None] & (rn < pitch)[None, :]
        add_tile(fisher + base, offsets, mask, f_acc, True)
        if HAS_GRADIENT:
            add_tile(gradient + base, offsets, mask, d_acc, True)
    else:
        slot = tl.cast(turn, tl.int64) * (BM * BN)
        offsets = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(partials + slot + offsets, f_acc)
        if HAS_GRADIENT:
            tl.store(mean_partials + slot + offsets, d_acc)


def _readable(x: Tensor, operands: Operands) -> bool:
    """Tell whether the kernel can read x [N, T, D] in place: 16 bytes at a time, a tile within 32-bit offsets."""
    octets = x.shape[2] % OCTET == 0 and x.stride(0) % OCTET == 0 and x.stride(1) % OCTET == 0
    near = x.stride(1) * _MAX_CHUNK + x.shape[2] < 1 << 31
    return operands.terms == 1 and octets and near and x.data_ptr() % 16 == 0


def as_operand(x: Tensor, operands: Operands) -> Tensor:
    """Return x [N, T, D] as [terms, N, T, pitch], a view if the kernel can read it in place."""
    if _readable(x, operands):
        return x.unsqueeze(0)
    n, t, _ = x.shape
    terms = split(x, operands.terms, operands.dtype)
    return terms.view(operands.terms, n, t, -1)


def _or(partials: Tensor | None, result: Tensor | None) -> Tensor | None:
    """Return the partials; where no tile is shared, the result in their place, which nobody writes to as such."""
    return result if partials is None else partials


def add_products(
    fisher: Tensor,
    g: Tensor,
    a: Tensor,
    operands: Operands,
    *,
    weights: Tensor | None = None,
    gradient: Tensor | None = None,
    square: bool = True,
) -> None:
    """Run the kernel over operands [terms, N, T, pitch] and add its result to fisher and gradient."""
    _, n, t, _ = g.shape
    d_out, d_in = fisher.shape
    layer = Layer(d_out, d_in, n, t, in_place=d_in % OCTET == 0)
    strides = [x.stride(dim) // OCTET for x in (g, a) for dim in (1, 2, 0)]

    def run(plan: Plan) -> None:
        tile, tiles = plan.tile, triton.cdiv(d_out, plan.tile.m) * triton.cdiv(d_in, plan.tile.n)
        whole, first = plan.whole, plan.whole
        while whole or first < tiles:
            rest = min(tiles - first, max(1, MAX_PARTIALS // (4 * tile.m * tile.n * plan.splits)))
            shape = (plan.splits, rest, tile.m, tile.n)
            partials = fisher.new_empty(shape) if rest else None
            mean_partials = fisher.new_empty(shape) if rest and gradient is not None else None
            fisher_linear_kernel[(whole + rest * plan.splits,)](
                fisher, gradient, _or(partials, fisher), _or(mean_partials, gradient), g, a, weights,
                whole, max(rest, 1), plan.splits, first,
                n, t, d_out, d_in, g.shape[3] // OCTET, a.shape[3] // OCTET, *strides,
                BM=tile.m, BN=tile.n, BK=tile.k, GROUP=GROUP,
                TERMS=operands.terms, PRECISION=operands.precision, UPCAST=INTERPRETED and g.dtype == torch.bfloat16,
                SQUARE=square, ONE=t <= tile.k, HAS_WEIGHTS=weights is not None, HAS_GRADIENT=gradient is not None,
                num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
            fold_tiles(partials, fisher, first)
            fold_tiles(mean_partials, gradient, first)
            whole, first = 0, first + rest

    run_planned("fisher_linear_kernel", fisher.device, operands, layer, gradient is not None, run)


def _one_step(fisher: Tensor, a: Tensor, g: Tensor, weights: Tensor | None, gradient: Tensor | None) -> None:
    """T = 1: fisher += (w G^2)^T A^2, a GEMM of float32 squares, on our own kernel whatever TF32 switches are set."""
    operands = choose_operands(torch.float32)  # a half type cannot hold the squares
    # Groups of 64 rows stand for samples, so that the splits over samples serve here too; the padding adds zeros.
    rows = triton.cdiv(len(a), 64) * 64
    g_squared = split(g, operands.terms, operands.dtype, square=True, weights=weights, rows=rows)
    a_squared = split(a, operands.terms, operands.dtype, square=True, rows=rows)
    groups = (operands.terms, rows // 64, 64, -1)
    add_products(fisher, g_squared.view(groups), a_squared.view(groups), operands, square=False)
    if gradient is not None:
        operands = choose_operands(a.dtype)
        if weights is None:  # all samples as the steps of one
            a, g = a.transpose(0, 1), g.transpose(0, 1)
        add_products(
            gradient, as_operand(g, operands), as_operand(a, operands), operands, weights=weights, square=False
        )


def fisher_linear_(
    fisher: Tensor, activations: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Fisher += sum_n w_n (G_n^T A_n)^2, and the plain gradient beside it where wanted."""
    n, t, _ = activations.shape
    device = fisher.device
    if n == 0 or t == 0 or fisher.numel() == 0:
        return
    fits = activations.shape[2] < MAX_WIDTH and grad_outputs.shape[2] < MAX_WIDTH
    if activations.dtype == torch.float64 or capability(device) < 80 or not fits:
        reference.fisher_linear_(fisher, activations, grad_outputs, weights, gradient)
        return
    with on_device(device):
        operands = choose_operands(activations.dtype)
        step = n
        if t == 1 or not (_readable(activations, operands) and _readable(grad_outputs, operands)):
            width = activations.shape[2] + grad_outputs.shape[2] + 2 * OCTET
            step = max(1, WORKSPACE // (3 * torch.bfloat16.itemsize * width * t))
        for start in range(0, n, step):
            chunk = slice(start, start + step)
            a, g, w = activations[chunk], grad_outputs[chunk], None if weights is None else weights[chunk]
            if t == 1:
                _one_step(fisher, a, g, w, gradient)
            else:
                a, g = as_operand(a, operands), as_operand(g, operands)
                add_products(fisher, g, a, operands, weights=w, gradient=gradient)
    written(fisher, gradient)
