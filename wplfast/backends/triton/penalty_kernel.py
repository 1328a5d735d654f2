"""The penalty over many tensors in one launch: value, stored gradient or accumulated gradient.

    d = (theta - theta_hat) - offset,   g = alpha_p F d + l2 theta,
    value = sum_p alpha_p/2 sum F d^2 + l2/2 sum theta^2,   grad += scale g

A table gives each program one chunk of one tensor. Full chunks on 16-byte boundaries, nearly all of them, take a branch
without masks, where every stream moves 16 bytes a thread; tails and misaligned tensors take a masked one. Each program
leaves one float64 partial of the value, which a second kernel sums in fixed order. The value's terms are summed in
float64 throughout: a few double-precision operations an element hide behind its 16 bytes even on consumer GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.layout import flat_dtype, packed_starts
from .launch import OPTIONS, on_device
from .reduce import sum_partials
from .tables import TableCache

#: 8 elements a thread keep two 16-byte loads of each float32 stream in flight and leave room for full occupancy.
BLOCK, WARPS = 2048, 8
#: The masked branch takes smaller blocks: its scalar loads need an address and a predicate each, in registers.
TAIL = 512
#: Blocks a program walks through: large models take more, which spreads the cost of the table and of the reduction.
FEW_BLOCKS, MANY_BLOCKS, MANY_FROM = 1, 4, 1 << 24

VALUE, STORE, ACCUMULATE = 0, 1, 2
#: Columns of the chunk table: addresses at the chunk, its number of elements, and where its gradient belongs.
_COLUMNS = ("theta", "theta_hat", "fisher", "offset", "count", "tensor", "start", "packed")
_POINTERS = ("chunks", "grads", "packed", "partials", "alpha", "l2", "scale")

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_chunk_tables = TableCache(capacity=32)
_grad_tables = TableCache(capacity=32)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Turn an address into a pointer; ALIGNED tells the compiler, truthfully, that it is a multiple of 16 bytes."""
    if ALIGNED:  # a value of its own: the hint must not reach the pointers of the other branch
        address = address // 16 * 16
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load(address, lanes, count, TYPE: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr):
    """Load lanes of one stream in the wide type; beyond ``count``, zeros."""
    pointer = _pointer(address, TYPE, FULL)
    value = tl.load(pointer + lanes) if FULL else tl.load(pointer + lanes, mask=lanes < count, other=0.0)
    return value.to(WIDE)


@triton.jit
def _block(
    theta, theta_hat, fisher, offset, grad, lanes, count, slope, decay,
    TYPE: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr, HAS_OFFSET: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block; return the terms F d^2 and theta^2 of its lanes."""
    p = _load(theta, lanes, count, TYPE, WIDE, FULL)
    d = p - _load(theta_hat, lanes, count, TYPE, WIDE, FULL)
    if HAS_OFFSET:
        d -= _load(offset, lanes, count, WIDE, WIDE, FULL)
    fd = _load(fisher, lanes, count, WIDE, WIDE, FULL) * d
    if MODE != 0:
        g = slope * fd + decay * p
        if MODE == 2:
            g += _load(grad, lanes, count, TYPE, WIDE, FULL)
        target = _pointer(grad, TYPE, FULL) + lanes
        if FULL:
            tl.store(target, g.to(TYPE))
        elif MODE == 1:  # a packed buffer's gaps get the zeros that the masked loads gave
            tl.store(target, g.to(TYPE), mask=lanes < (count + 15) // 16 * 16)
        else:
            tl.store(target, g.to(TYPE), mask=lanes < count)
    return fd * d, p * p


@triton.jit
def _chunk(
    theta, theta_hat, fisher, offset, grad, count, n_blocks, slope, decay, alpha, l2,
    TYPE: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr, HAS_OFFSET: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process the blocks of a chunk; return alpha sum F d^2 + l2 sum theta^2, summed in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(n_blocks):
        lanes = block * BLOCK + tl.arange(0, BLOCK)
        f_term, p_term = _block(
            theta, theta_hat, fisher, offset, grad, lanes, count, slope, decay, TYPE, WIDE, MODE, HAS_OFFSET, FULL
        )
        total += alpha * f_term.to(tl.float64) + l2 * p_term.to(tl.float64)
    return tl.sum(total)


@triton.jit(do_not_specialize_on_alignment=_POINTERS)
def penalty_kernel(
    chunks, grads, packed, partials, alpha, l2, scale,
    TYPE: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr, HAS_OFFSET: tl.constexpr, PER_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Process one chunk; MODE 0: the value alone, 1: store the gradient in ``packed``, 2: add it to ``grads``."""
    pid = tl.program_id(0).to(tl.int64)
    row = chunks + pid * 8
    theta, theta_hat, fisher, offset = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    count, tensor = tl.load(row + 4).to(tl.int32), tl.load(row + 5)
    alpha_p = tl.load(alpha + tensor) if PER_TENSOR else tl.load(alpha)
    l2_value = tl.load(l2)
    slope, decay = alpha_p, l2_value
    addresses = theta | theta_hat | fisher
    if HAS_OFFSET:
        addresses |= offset
    grad = theta
    if MODE == 1:
        grad = packed.to(tl.int64) + tl.load(row + 7) * (TYPE.primitive_bitwidth // 8)
    if MODE == 2:
        grad = tl.load(grads + tensor) + tl.load(row + 6) * (TYPE.primitive_bitwidth // 8)
        factor = tl.load(scale)  # folded into both coefficients in float64: one rounding less for each element
        slope, decay = factor * alpha_p, factor * l2_value
    slope, decay = slope.to(WIDE), decay.to(WIDE)
    addresses |= grad
    # The branch is the same for the whole program.
    if (count == BLOCK * N_BLOCKS) & (addresses % 16 == 0):
        total = _chunk(
            theta, theta_hat, fisher, offset, grad, count, N_BLOCKS, slope, decay, alpha_p, l2_value,
            TYPE, WIDE, MODE, HAS_OFFSET, True, BLOCK,
        )  # fmt: skip
    else:
        total = _chunk(
            theta, theta_hat, fisher, offset, grad, count, tl.cdiv(count, TAIL), slope, decay, alpha_p, l2_value,
            TYPE, WIDE, MODE, HAS_OFFSET, False, TAIL,
        )  # fmt: skip
    tl.store(partials + pid, 0.5 * total)


def _chunk_rows(columns: Sequence[Sequence[int]], numels: Sequence[int], sizes: Sequence[int], chunk: int) -> Tensor:
    """Return the chunk table [C, 8] of tensors of ``numels`` elements, from four streams' addresses and sizes."""
    numel = torch.tensor(numels, dtype=torch.int64)
    n_chunks = (numel + chunk - 1) // chunk
    tensor = torch.repeat_interleave(torch.arange(len(numels)), n_chunks)
    start = (torch.arange(len(tensor)) - (n_chunks.cumsum(0) - n_chunks)[tensor]) * chunk
    rows = torch.zeros(len(tensor), len(_COLUMNS), dtype=torch.int64)
    for index, (addresses, size) in enumerate(zip(columns, sizes, strict=True)):
        if addresses:
            rows[:, index] = torch.tensor(addresses, dtype=torch.int64)[tensor] + start * size
    rows[:, 4] = (numel[tensor] - start).clamp_(max=chunk)
    rows[:, 5] = tensor
    rows[:, 6] = start
    rows[:, 7] = torch.tensor(packed_starts(numels)[0], dtype=torch.int64)[tensor] + start
    return rows


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the tensors' addresses."""
    return tuple([t.data_ptr() for t in tensors])


def _launch(
    mode: int,
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
    grad: Sequence[Tensor] = (),
    packed: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Run the kernel in one of its modes and return the value."""
    dtype, device = theta[0].dtype, theta[0].device
    wide = flat_dtype(dtype)
    numels = tuple([t.numel() for t in theta])
    n_blocks = MANY_BLOCKS if sum(numels) >= MANY_FROM else FEW_BLOCKS
    chunk = BLOCK * n_blocks
    columns = [_addresses(tensors) for tensors in (theta, theta_hat, fisher, offset)]
    sizes = (dtype.itemsize, dtype.itemsize, wide.itemsize, wide.itemsize)
    with on_device(device):
        key = (device, dtype, chunk, numels, *columns)
        chunks = _chunk_tables.get(key, device, lambda: _chunk_rows(columns, numels, sizes, chunk))
        if len(chunks) == 0:
            return theta[0].new_zeros((), dtype=wide)
        # Gradients move when zero_grad() has dropped them: their addresses are a small table of their own.
        grads = None
        if grad:
            addresses = _addresses(grad)
            grads = _grad_tables.get((device, addresses), device, lambda: torch.tensor(addresses, dtype=torch.int64))
        partials = torch.empty(len(chunks), dtype=torch.float64, device=device)
        penalty_kernel[(len(chunks),)](
            chunks, grads, packed, partials, alpha, l2, scale,
            TYPE=_TYPES[dtype], WIDE=_TYPES[wide], MODE=mode, HAS_OFFSET=bool(offset), PER_TENSOR=alpha.dim() == 1,
            BLOCK=BLOCK, N_BLOCKS=n_blocks, TAIL=TAIL, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        return sum_partials(partials, wide)


def penalty(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> Tensor:
    """Return the value alone."""
    return _launch(VALUE, theta, theta_hat, offset, fisher, alpha, l2)


def penalty_with_grad(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the value and the packed gradient, whose gaps are zero."""
    _, length = packed_starts([t.numel() for t in theta])
    packed = theta[0].new_empty(length)
    return _launch(STORE, theta, theta_hat, offset, fisher, alpha, l2, packed=packed), packed


def penalty_add_grad_(
    grad: Sequence[Tensor],
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
    scale: Tensor,
) -> Tensor:
    """Return the value; add scale * gradient to grad, rounded once."""
    return _launch(ACCUMULATE, theta, theta_hat, offset, fisher, alpha, l2, grad=grad, scale=scale)
