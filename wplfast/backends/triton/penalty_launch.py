"""The launches of the penalty kernel: how tensors are cut into chunks, and the operators of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops.arguments import PenaltyArguments, flat_operators
from ...ops.layout import flat_dtype, packed_starts
from .launch import OPTIONS, on_device, written
from .penalty_kernel import (
    ACCUMULATE,
    BLOCK,
    COLUMNS,
    FEW_BLOCKS,
    MANY_BLOCKS,
    MANY_FROM,
    STORE,
    TAIL,
    VALUE,
    WARPS,
    penalty_kernel,
)
from .reduce import SPAN, sum_partials, sum_partials_kernel
from .tables import TableCache

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_chunk_tables = TableCache(capacity=32)
_grad_tables = TableCache(capacity=32)
#: The kinds of sums that were launched before.
_SUMMED: set[tuple[object, ...]] = set()


class Streams:
    """What a launch reads: addresses, sizes and types of the tensors of one call.

    Args:
        arguments: the call's.
    """

    def __init__(self, arguments: PenaltyArguments) -> None:
        theta, theta_hat, offset, fisher, _, _ = arguments
        self.device, self.dtype, self.fisher_dtype = theta[0].device, theta[0].dtype, fisher[0].dtype
        self.wide = flat_dtype(self.dtype)
        self.has_offset = bool(offset)
        self.numels = tuple([t.numel() for t in theta])
        self.n_blocks = MANY_BLOCKS if sum(self.numels) >= MANY_FROM else FEW_BLOCKS
        self._columns = [addresses(tensors) for tensors in (theta, theta_hat, fisher, offset)]

    def key(self) -> tuple[object, ...]:
        """Return all that the chunk table follows from."""
        return (self.device, self.dtype, self.fisher_dtype, self.n_blocks, self.numels, *self._columns)

    def chunks(self) -> Tensor:
        """Return the chunk table [C, 8], on the CPU."""
        with torch.device("cpu"):  # whatever the default device is
            return self._chunks()

    def _chunks(self) -> Tensor:
        """Return the chunk table on the default device."""
        chunk = BLOCK * self.n_blocks
        numel = torch.tensor(self.numels, dtype=torch.int64)
        n_chunks = (numel + chunk - 1) // chunk
        tensor = torch.repeat_interleave(torch.arange(len(numel)), n_chunks)
        start = (torch.arange(len(tensor)) - (n_chunks.cumsum(0) - n_chunks)[tensor]) * chunk
        rows = torch.zeros(len(tensor), len(COLUMNS), dtype=torch.int64)
        dtypes = (self.dtype, self.dtype, self.fisher_dtype, self.wide)
        for index, (column, dtype) in enumerate(zip(self._columns, dtypes, strict=True)):
            if column:
                rows[:, index] = torch.tensor(column, dtype=torch.int64)[tensor] + start * dtype.itemsize
        rows[:, 4] = (numel[tensor] - start).clamp_(max=chunk)
        rows[:, 5] = tensor
        rows[:, 6] = start
        rows[:, 7] = torch.tensor(packed_starts(self.numels)[0], dtype=torch.int64)[tensor] + start
        return rows


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the tensors' addresses."""
    return tuple([t.data_ptr() for t in tensors])


def launch(
    mode: int,
    streams: Streams,
    chunks: Tensor,
    alpha: Tensor,
    l2: Tensor,
    constant: Tensor | None = None,
    grads: Tensor | None = None,
    packed: Tensor | None = None,
    scale: Tensor | None = None,
    kernels: tuple[Any, Any] = (penalty_kernel, sum_partials_kernel),
) -> Tensor:
    """Run the kernel in one of its modes over a chunk table on the current device, and return the value."""
    partials = torch.empty(len(chunks), dtype=torch.float64, device=streams.device)
    kernel, last = kernels
    stages = streams.device, streams.dtype, len(chunks) > SPAN, constant is None
    if mode == ACCUMULATE and stages not in _SUMMED:  # what cannot be started must fail before anything is added
        sum_partials(partials, streams.wide, None if constant is None else alpha, constant)
    if len(chunks) > 0:
        kernel[(len(chunks),)](
            chunks, grads, packed, partials, alpha, l2, scale,
            _TYPES[streams.dtype], _TYPES[streams.fisher_dtype], _TYPES[streams.wide], mode, streams.has_offset,
            alpha.dim() == 1, BLOCK, streams.n_blocks, TAIL, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    value = sum_partials(partials, streams.wide, None if constant is None else alpha, constant, last)
    _SUMMED.add(stages)
    return value


def _launch(
    mode: int,
    arguments: PenaltyArguments,
    grad: Sequence[Tensor] = (),
    packed: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Find or make the tables of tensors that may be anywhere, and launch."""
    streams = Streams(arguments)
    device = streams.device
    with on_device(device):
        chunks = _chunk_tables.get(streams.key(), device, streams.chunks)
        # Gradients move when zero_grad() has dropped them: their addresses are a small table of their own.
        grads = None
        if grad:
            places = addresses(grad)
            grads = _grad_tables.get((device, places), device, lambda: torch.tensor(places, device="cpu"))
        return launch(mode, streams, chunks, arguments.alpha, arguments.l2, grads=grads, packed=packed, scale=scale)


def _value(arguments: PenaltyArguments) -> Tensor:
    """Return the value alone."""
    return _launch(VALUE, arguments)


def _with_grad(arguments: PenaltyArguments) -> tuple[Tensor, Tensor]:
    """Return the value and the packed gradient, whose gaps are zero."""
    _, length = packed_starts([t.numel() for t in arguments.theta])
    packed = arguments.theta[0].new_empty(length)
    return _launch(STORE, arguments, packed=packed), packed


def _add_grad_(grad: Sequence[Tensor], arguments: PenaltyArguments, scale: Tensor) -> Tensor:
    """Return the value; add scale * gradient to grad, rounded once."""
    value = _launch(ACCUMULATE, arguments, grad=grad, scale=scale)
    written(*grad)
    return value


penalty, penalty_with_grad, penalty_add_grad_ = flat_operators(_value, _with_grad, _add_grad_)
