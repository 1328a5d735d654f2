"""What the tests of Triton's kernels share: inputs with guarded surroundings, float64 oracles, bounds.

With a GPU these tests run on it. Without one they run in Triton's interpreter, which must be chosen before the first
import of Triton: ``TRITON_INTERPRET=1 pytest tests/test_triton_penalty.py``, or by each file's
``test_under_interpreter``, which does that in a process of its own so that a plain ``pytest`` covers them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pairwise import pairwise
from torch import Tensor

from wplfast.backends.triton import launch

DEVICE = "cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu"
RUNS_HERE = DEVICE == "cuda" or launch.INTERPRETED
on_device = pytest.mark.skipif(not RUNS_HERE, reason="test_under_interpreter runs it")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: Error of a gradient's element relative to the terms it sums: a few roundings of float32, or one of the storage type.
#: The interpreter truncates to bfloat16 where a GPU rounds to nearest.
TRUNCATES = launch.INTERPRETED
GRADIENT = {
    torch.float32: 3e-7,
    torch.bfloat16: 2**-7 if TRUNCATES else 2**-8,
    torch.float16: 2**-10,
    torch.float64: 1e-15,
}
#: A GPU runs programs in another order every time; the interpreter, which takes seconds, does not.
REPEATS = 2 if DEVICE == "cuda" else 1


def combined(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return all combinations of parameters on a GPU; in the interpreter rows in which any two values of two meet."""
    return list(itertools.product(*choices)) if DEVICE == "cuda" else pairwise(*choices)


def guarded(size: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Return a random tensor with 64 elements of other memory on both sides, ``shift`` elements off alignment."""
    numel = int(torch.tensor(size).prod())
    buffer = torch.randn(numel + 128 + shift, dtype=torch.float32).to(DEVICE, dtype)
    return buffer[64 + shift : 64 + shift + numel].view(size)


def surroundings(tensor: Tensor) -> Tensor:
    """Return a copy of the memory on both sides of a guarded tensor."""
    start = tensor.storage_offset()
    base = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return torch.cat([base[:start], base[start + tensor.numel() :]])


def exact(arguments):  # type: ignore[no-untyped-def]
    """Return arguments in float64 on the CPU."""
    if isinstance(arguments, Tensor):
        return arguments.detach().cpu().double()
    return [exact(a) for a in arguments]


def error(result: Tensor, expected: Tensor, start: Tensor | None = None) -> float:
    """Return the relative error in norm; where ``start`` was added to, relative to what was summed, not to the sum."""
    difference = (result.detach().cpu().double() - expected).norm()
    scale = expected if start is None else start.cpu().double().abs() + (expected - start.cpu().double()).abs()
    return float(difference / scale.norm()) if difference else 0.0


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tell whether tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
