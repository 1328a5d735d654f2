"""Memory layout shared by the op contract, its backends and autograd.

Backends see every tensor as one run of ``numel`` elements that starts at its data pointer. That holds when the tensor
is dense (its elements fill a range of memory without gaps or overlaps, in any order of dimensions) and when theta,
theta_hat, offset, fisher and grad of one parameter agree in their strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Tensors packed into one buffer start at multiples of this many elements: at least 32 bytes in bf16, 64 in fp32.
ALIGNMENT = 16


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill one range of memory without gaps or overlaps."""
    return tensor.is_contiguous() or is_run(tensor.shape, tensor.stride())


def is_run(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether elements of these sizes and strides fill one range of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(first: Tensor, second: Tensor) -> bool:
    """Tell whether two dense tensors of one shape keep their elements in the same order."""
    return first.stride() == second.stride() or (first.is_contiguous() and second.is_contiguous())


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the memory order of a dense one of its shape, copied if need be."""
    if same_order(tensor, like):
        return tensor
    return torch.empty_strided(tensor.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def packed_starts(numels: Sequence[int]) -> tuple[list[int], int]:
    """Return the first element of each tensor in a packed buffer, and the buffer's length."""
    starts, end = [], 0
    for numel in numels:
        starts.append(end)
        end += -(-numel // ALIGNMENT) * ALIGNMENT
    return starts, end


def packed_views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """View a packed buffer as one tensor per dense tensor of ``tensors``, in its shape and memory order."""
    sizes = []
    for tensor in tensors:
        numel = tensor.numel()
        sizes += [numel, -numel % ALIGNMENT]
    parts = buffer.split_with_sizes(sizes)[::2]
    return [
        part.view(like.shape) if like.is_contiguous() else part.as_strided(like.shape, like.stride())
        for part, like in zip(parts, tensors, strict=True)
    ]


class Packing:
    """Views of packed buffers for the same dense tensors again and again, at a quarter of :func:`packed_views`' price.

    It keeps what the tensors are like, and none of them.

    Args:
        tensors: what a buffer holds.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._starts, self.length = packed_starts([tensor.numel() for tensor in tensors])
        self._shapes, self._strides = [t.shape for t in tensors], [t.stride() for t in tensors]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """View a buffer of :attr:`length` elements as the tensors, in their shapes and memory orders."""
        first = buffer.storage_offset()
        starts = [first + start for start in self._starts] if first else self._starts
        return list(map(buffer.as_strided, self._shapes, self._strides, starts))


def by_kind(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Group indices by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    return groups


def flat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that values, Fisher entries and offsets of parameters of ``dtype`` are kept in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as [*shape, 2], its real and imaginary parts, and any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
