"""Tiles of the Fisher: where they lie, and how those that several programs share are put together."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .kernel import kernel
from .launch import OPTIONS

#: Tiles that share columns of the activations run side by side, for the L2 cache.
GROUP = 8
_ELEMENTS = 1024


@triton.jit
def tile_corner(tile, d_out, d_in, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and the first column of a tile; they are counted in groups of GROUP rows of tiles."""
    tiles_m, tiles_n = tl.cdiv(d_out, BM), tl.cdiv(d_in, BN)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return (group * GROUP + within % height) * BM, (within // height) * BN


@kernel(do_not_specialize=["first", "n_tiles", "n_splits", "d_out", "d_in"])
def fold_tiles_kernel(
    partials, out, first, n_tiles, n_splits, d_out, d_in,
    BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add ROWS rows of one tile: out[tile] += sum over s of partials[s, tile]."""
    slabs: tl.constexpr = BM // ROWS
    index, slab = tl.program_id(0) // slabs, tl.program_id(0) % slabs
    m_start, n_start = tile_corner(first + index, d_out, d_in, BM, BN, GROUP)
    rows, columns = slab * ROWS + tl.arange(0, ROWS), tl.arange(0, BN)
    within = rows[:, None] * BN + columns[None, :]
    total = tl.zeros((ROWS, BN), tl.float32)
    for s in range(n_splits):
        slot = tl.cast(s, tl.int64) * n_tiles + index
        total += tl.load(partials + slot * (BM * BN) + within)
    mask = (m_start + rows < d_out)[:, None] & (n_start + columns < d_in)[None, :]
    target = out + (tl.cast(m_start, tl.int64) * d_in + n_start) + rows[:, None] * d_in + columns[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + total, mask=mask)


def fold_tiles(partials: Tensor | None, out: Tensor | None, first: int) -> None:
    """Add partials [S, tiles, m, n] of the tiles from ``first`` on to the contiguous ``out``, in the order of S."""
    if partials is None or out is None:
        return
    splits, tiles, m, n = partials.shape
    rows = min(m, _ELEMENTS // n)
    fold_tiles_kernel[(tiles * (m // rows),)](
        partials, out, first, tiles, splits, *out.shape, BM=m, BN=n, ROWS=rows, GROUP=GROUP, **OPTIONS
    )
