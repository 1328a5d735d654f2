"""The per-sample gradients of an elementwise scale: sum_t A[n, t, :] G[n, t, :], in one pass over both.

A tile spans steps and columns, longer along the dimension that lies contiguous in memory: columns of normalised
features [N, T, D], steps of images [N, C, L] seen as [N, L, C]. Where samples and columns are few, the steps are split
over programs, whose partial sums are added in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops.layout import flat_dtype
from .kernel import kernel
from .launch import OPTIONS, n_processors, on_device
from .reduce import fold_partials
from .split import OCTET

#: Elements of a tile, 16 a thread, and steps that a program takes at least.
TILE, WARPS, MIN_STEPS = 2048, 4, 64
#: Which stride is one.
NONE, COLUMNS, STEPS = 0, 1, 2
_SIZES = ("n_steps", "width")
_STRIDES = ("a_sample", "a_step", "a_column", "g_sample", "g_step", "g_column")


@triton.jit
def _tile(x, sample, step, column, steps, columns, UNIT: tl.constexpr, UNIT_DIM: tl.constexpr):
    """Return pointers to a tile of one sample; strides count in units, and one of them may be known to be 1."""
    step_stride = 1 if UNIT_DIM == 2 else tl.cast(step, tl.int64) * UNIT
    column_stride = 1 if UNIT_DIM == 1 else tl.cast(column, tl.int64) * UNIT
    return x + sample * UNIT + steps[:, None] * step_stride + columns[None, :] * column_stride


@kernel(do_not_specialize=_SIZES + _STRIDES)
def scale_grads_kernel(
    out, activations, grad_outputs, n_steps, width, a_sample, a_step, a_column, g_sample, g_step, g_column,
    BT: tl.constexpr, BD: tl.constexpr, T_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    A_UNIT: tl.constexpr, G_UNIT: tl.constexpr, A_DIM: tl.constexpr, G_DIM: tl.constexpr,
):  # fmt: skip
    """out[split, n, columns] = the sum over one split of the steps; sizes and strides count in their units."""
    n_columns, t_end = width * D_UNIT, n_steps * T_UNIT
    blocks = tl.cdiv(n_columns, BD)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(t_end, BT)
    first = (tiles * split.to(tl.int64) // n_splits).to(tl.int32) * BT
    last = tl.minimum((tiles * (split + 1).to(tl.int64) // n_splits).to(tl.int32) * BT, t_end)
    lanes = tl.arange(0, BT)
    a_ptr = _tile(activations, sample * a_sample, a_step, a_column, lanes, columns, A_UNIT, A_DIM)
    g_ptr = _tile(grad_outputs, sample * g_sample, g_step, g_column, lanes, columns, G_UNIT, G_DIM)
    wide: tl.constexpr = out.dtype.element_ty
    inside = (columns < n_columns)[None, :]
    a_next = 1 if A_DIM == 2 else tl.cast(a_step, tl.int64) * A_UNIT
    g_next = 1 if G_DIM == 2 else tl.cast(g_step, tl.int64) * G_UNIT
    total = tl.zeros((BT, BD), wide)
    for start in range(first, last, BT):
        mask = (lanes < last - start)[:, None] & inside
        a = tl.load(a_ptr + tl.cast(start, tl.int64) * a_next, mask=mask, other=0.0).to(wide)
        total += a * tl.load(g_ptr + tl.cast(start, tl.int64) * g_next, mask=mask, other=0.0).to(wide)
    n_rows = (tl.num_programs(0) // blocks).to(tl.int64)
    row = out + (split * n_rows + sample) * n_columns
    tl.store(row + columns, tl.sum(total, axis=0), mask=columns < n_columns)


def _unit(x: Tensor, dim: int, strides: tuple[int, ...]) -> int:
    """Return what all strides but the contiguous dimension's are multiples of: 8 where loads may then be wide."""
    others = [stride for index, stride in enumerate(strides) if index != {COLUMNS: 2, STEPS: 1}.get(dim)]
    wide = dim != NONE and x.data_ptr() % 16 == 0 and all(stride % OCTET == 0 for stride in others)
    return OCTET if wide else 1


def _contiguous_dim(x: Tensor) -> int:
    """Return the dimension with stride 1, if it has more than one element."""
    if x.stride(2) == 1 and x.shape[2] > 1:
        return COLUMNS
    return STEPS if x.stride(1) == 1 and x.shape[1] > 1 else NONE


def scale_grads(activations: Tensor, grad_outputs: Tensor) -> Tensor:
    """Return sum_t A[n, t] G[n, t]."""
    n, t, d = activations.shape
    out = activations.new_empty((n, d), dtype=flat_dtype(activations.dtype))
    if out.numel() == 0 or t == 0:
        return out.zero_()
    a_dim, g_dim = _contiguous_dim(activations), _contiguous_dim(grad_outputs)
    if STEPS in (a_dim, g_dim) and COLUMNS not in (a_dim, g_dim):
        steps = min(256, max(16, triton.next_power_of_2(t)))
        columns = min(TILE // steps, triton.next_power_of_2(d))
    else:
        columns = min(128, max(16, triton.next_power_of_2(d)))
        steps = min(TILE // columns, triton.next_power_of_2(t))
    programs = n * triton.cdiv(d, columns)
    wanted = triton.cdiv(4 * n_processors(out.device), programs)
    splits = max(1, min(wanted, triton.cdiv(t, steps), t // MIN_STEPS))
    a_unit = _unit(activations, a_dim, activations.stride())
    g_unit = _unit(grad_outputs, g_dim, grad_outputs.stride())
    # A load's mask must be known to end on its boundary too.
    t_unit = OCTET if t % OCTET == 0 else 1
    d_unit = OCTET if d % OCTET == 0 else 1
    strides = [s // unit for x, unit in ((activations, a_unit), (grad_outputs, g_unit)) for s in x.stride()]
    with on_device(out.device):
        target = out if splits == 1 else out.new_empty((splits, n, d))
        scale_grads_kernel[(programs, splits)](
            target, activations, grad_outputs, t // t_unit, d // d_unit, *strides,
            BT=steps, BD=columns, T_UNIT=t_unit, D_UNIT=d_unit, A_UNIT=a_unit, G_UNIT=g_unit, A_DIM=a_dim, G_DIM=g_dim,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        if splits > 1:
            fold_partials(target, out.zero_())
    return out
