"""What a call of the Fisher kernel may get: operand precision, tile, pipeline depth.

A short fixed table instead of an autotuner: the first call costs one compilation, and equal calls are equal in bits.
The rows were chosen by the compiler's resource use (no spills, tensor-core instructions, 16-byte loads); see
``tests/test_triton_aot.py``, which checks every one of them, and ``fisher_plan`` for which a layer takes.

Environment:
    WPLFAST_TRITON_FP32: how float32 operands are multiplied. ``bf16x6`` (default; as exact as float32), ``bf16x3``
        (half the work, F to about 2e-6), ``tf32`` (F to about 2e-4) or ``ieee`` (no tensor cores).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
import triton

from .launch import capability

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
    """Tile [m, n] of the Fisher, chunk k of t, and how many programs a multiprocessor needs to be busy."""

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


#: Triton before 3.9 keeps every product of a chain in tensor memory of its own, of which sm_100 has 512 columns, and
#: makes a program that traps of a tile that needs more (3.6 to 3.8: 896 to 1408 columns of the largest one).
_TILES_OF_TERMS_FIT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)

#: (generation, kind of operands) -> candidates without and with a plain-gradient accumulator: a thread then holds three
#: accumulators of its tile instead of two, and spills from 256 values on. The first of equally good ones is taken.
_TILES: dict[tuple[int, str], tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    (8, "half"): (
        (
            Tile(128, 128, 32, 8, 4, 1),
            Tile(64, 128, 32, 8, 4, 1),
            Tile(128, 64, 32, 8, 4, 1),
            Tile(64, 64, 32, 4, 4, 2),
        ),
        (Tile(64, 128, 32, 8, 3, 1), Tile(128, 64, 32, 8, 3, 1), Tile(64, 64, 32, 4, 4, 2)),
    ),
    (8, "terms"): (
        (
            Tile(128, 128, 16, 8, 3, 1),
            Tile(64, 128, 32, 8, 2, 1),
            Tile(128, 64, 32, 8, 2, 1),
            Tile(64, 64, 32, 4, 3, 2),
        ),
        (Tile(64, 128, 32, 8, 2, 1), Tile(128, 64, 32, 8, 2, 1), Tile(64, 64, 32, 4, 3, 2)),
    ),
    (9, "half"): (
        (
            Tile(128, 128, 64, 8, 4, 1),
            Tile(64, 128, 64, 8, 4, 1),
            Tile(128, 64, 64, 8, 4, 1),
            Tile(64, 64, 64, 4, 4, 3),
        ),
        (Tile(64, 128, 64, 8, 4, 1), Tile(128, 64, 64, 8, 4, 1), Tile(64, 64, 64, 4, 4, 3)),
    ),
    (9, "terms"): (
        (
            Tile(128, 128, 32, 8, 3, 1),
            Tile(64, 128, 32, 8, 3, 1),
            Tile(128, 64, 32, 8, 3, 1),
            Tile(64, 64, 32, 4, 3, 3),
        ),
        (Tile(64, 128, 32, 8, 3, 1), Tile(128, 64, 32, 8, 3, 1), Tile(64, 64, 32, 4, 3, 3)),
    ),
}
_TILES[10, "half"] = _TILES[9, "half"]
_TILES[10, "terms"] = _TILES[9, "terms"] if _TILES_OF_TERMS_FIT else ((Tile(64, 64, 32, 4, 3, 1),),) * 2
for _generation in (8, 9, 10):
    _TILES[_generation, "float"] = ((Tile(64, 64, 32, 4, 3, 2),),) * 2


def smaller(tile: Tile) -> Tile | None:
    """Return what to take where a tile does not fit: fewer and shorter chunks in flight, then a smaller tile."""
    if tile.stages > 2:
        return replace(tile, stages=tile.stages - 1)
    if tile.k > 16:
        return replace(tile, k=tile.k // 2)
    if max(tile.m, tile.n) > 32:
        m, n = (tile.m // 2, tile.n) if tile.m >= tile.n else (tile.m, tile.n // 2)
        return replace(tile, m=m, n=n, warps=min(tile.warps, 4))
    return replace(tile, stages=1) if tile.stages > 1 else None


def rows_of(capability: int) -> int:
    """Return whose rows a GPU takes: sm_120 has the tensor cores and the shared memory of sm_80's kind."""
    major = capability // 10
    return 8 if major >= 12 else min(10, max(8, major))


def generation(device: torch.device) -> int:
    """Return whose rows of the table a device takes."""
    return rows_of(capability(device))


def tiles_of(rows: int, operands: Operands, n_steps: int, gradient: bool) -> tuple[Tile, ...]:
    """Return the tiles that a layer may get; short samples take a chunk that holds one of them whole."""
    kind = "terms" if operands.terms > 1 else ("float" if operands.dtype == torch.float32 else "half")
    longest = max(16, triton.next_power_of_2(n_steps))
    return tuple(replace(tile, k=min(tile.k, longest)) for tile in _TILES[rows, kind][gradient])
