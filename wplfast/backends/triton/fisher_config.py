"""What a call of the Fisher kernel gets: operand precision, tile, pipeline depth, and the split over samples.

A short fixed table instead of an autotuner: the first call costs one compilation, and equal calls are equal in bits.
The rows were chosen by the compiler's resource use (no spills, tensor-core instructions, 16-byte loads); see
``tests/test_triton_aot.py``, which checks every one of them.

Environment:
    WPLFAST_TRITON_FP32: how float32 operands are multiplied. ``bf16x6`` (default; as exact as float32), ``bf16x3``
        (half the work, F to about 2e-6), ``tf32`` (F to about 2e-4) or ``ieee`` (no tensor cores).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

from .launch import capability, n_processors

FP32_MODES = ("bf16x6", "bf16x3", "tf32", "ieee")
#: Bytes of partial results that a split over samples may take.
MAX_PARTIALS = 1 << 26


@dataclass(frozen=True)
class Operands:
    """How operands reach the tensor cores: ``terms`` tensors of ``dtype`` whose sum each of them is."""

    terms: int
    dtype: torch.dtype
    precision: str = "ieee"


@dataclass(frozen=True)
class Tile:
    """Tile [m, n] of the Fisher, chunk k of t, and how many programs share one multiprocessor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int


def fp32_mode() -> str:
    """Return how float32 operands are multiplied."""
    mode = os.environ.get("WPLFAST_TRITON_FP32", FP32_MODES[0])
    if mode not in FP32_MODES:
        raise ValueError(f"WPLFAST_TRITON_FP32 must be one of {FP32_MODES}, got {mode!r}")
    return mode


def choose_operands(dtype: torch.dtype) -> Operands:
    """Return the operands for inputs of ``dtype``."""
    if dtype != torch.float32:
        return Operands(1, dtype)
    mode = fp32_mode()
    if mode.startswith("bf16"):
        return Operands(3 if mode == "bf16x6" else 2, torch.bfloat16)
    return Operands(1, torch.float32, mode)


#: (generation, kind of operands) -> tiles of a large layer, of a small one, and of a large one with a plain-gradient
#: accumulator: a thread then holds three accumulators of its tile instead of two, and spills from 256 values on.
_TILES: dict[tuple[int, str], tuple[Tile, Tile, Tile]] = {
    (8, "half"): (Tile(128, 128, 32, 8, 4, 1), Tile(64, 64, 32, 4, 4, 2), Tile(64, 128, 32, 8, 3, 1)),
    (8, "terms"): (Tile(128, 128, 16, 8, 3, 1), Tile(64, 64, 32, 4, 3, 2), Tile(64, 128, 32, 8, 2, 1)),
    (8, "float"): (Tile(64, 64, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 2)),
    (9, "half"): (Tile(128, 128, 64, 8, 4, 1), Tile(64, 64, 64, 4, 4, 3), Tile(64, 128, 64, 8, 4, 1)),
    (9, "terms"): (Tile(128, 128, 32, 8, 3, 1), Tile(64, 64, 32, 4, 3, 3), Tile(64, 128, 32, 8, 3, 1)),
    (9, "float"): (Tile(64, 64, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 2)),
    (10, "half"): (Tile(128, 128, 64, 8, 4, 1), Tile(64, 64, 64, 4, 4, 3), Tile(64, 128, 64, 8, 4, 1)),
    (10, "terms"): (Tile(128, 128, 32, 8, 3, 1), Tile(64, 64, 32, 4, 3, 3), Tile(64, 128, 32, 8, 3, 1)),
    (10, "float"): (Tile(64, 64, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 2)),
}


@lru_cache(maxsize=1024)
def choose_tile(device: torch.device, operands: Operands, d_out: int, d_in: int, n_steps: int, gradient: bool) -> Tile:
    """Return the tile for a layer's shape; short samples take a chunk that holds one of them whole."""
    generation = min(10, max(8, capability(device) // 10))
    kind = "terms" if operands.terms > 1 else ("float" if operands.dtype == torch.float32 else "half")
    large, small, with_gradient = _TILES[generation, kind]
    tile = small if min(d_out, d_in) <= small.m else (with_gradient if gradient else large)
    return replace(tile, k=min(tile.k, max(16, triton.next_power_of_2(n_steps))))


@lru_cache(maxsize=1024)
def choose_splits(device: torch.device, tile: Tile, tiles: int, n_samples: int, numel: int) -> int:
    """Return over how many programs the samples of one tile are spread: the fewest of those that finish first."""
    slots = n_processors(device) * tile.resident
    most = max(1, min(n_samples, triton.cdiv(3 * slots, tiles), MAX_PARTIALS // (4 * numel)))

    def rounds(splits: int) -> int:
        return int(triton.cdiv(tiles * splits, slots) * triton.cdiv(n_samples, splits))

    return min(range(1, most + 1), key=lambda splits: (rounds(splits), splits))
