"""The penalty over many tensors in one launch: value, stored gradient or accumulated gradient.

    d = (theta - theta_hat) - offset,   g = alpha_p F d + l2 theta,
    value = sum_p alpha_p/2 sum F d^2 + l2/2 sum theta^2,   grad += scale g

A table gives each program one chunk of one tensor. Full chunks on 16-byte boundaries, nearly all of them, take a branch
without masks, where a thread moves 16 bytes of each stream at a time (8 of an F in bfloat16 beside wider parameters);
tails and misaligned tensors take a masked one. Each program leaves one float64 partial of the value, which a second
kernel sums in fixed order. The value's terms are summed in float64 throughout: a few double-precision operations an
element hide behind its 16 bytes even on consumer GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel

#: 8 elements a thread keep two 16-byte loads of each float32 stream in flight and leave room for full occupancy.
BLOCK, WARPS = 2048, 8
#: The masked branch takes smaller blocks: its scalar loads need an address and a predicate each, in registers.
TAIL = 512
#: Blocks a program walks through: large models take more, which spreads the cost of the table and of the reduction.
FEW_BLOCKS, MANY_BLOCKS, MANY_FROM = 1, 4, 1 << 24

VALUE, STORE, ACCUMULATE = 0, 1, 2
#: Columns of the chunk table: addresses at the chunk, its number of elements, and where its gradient belongs.
COLUMNS = ("theta", "theta_hat", "fisher", "offset", "count", "tensor", "start", "packed")
_POINTERS = ("chunks", "grads", "packed", "partials", "alpha", "l2", "scale")


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Turn an address into a pointer; ALIGNED tells the compiler, truthfully, what it is a multiple of, in bytes."""
    if ALIGNED:  # a value of its own: the hint must not reach the pointers of the other branch
        address = address // ALIGNED * ALIGNED
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, ALIGNED) if ALIGNED else pointer


@triton.jit
def _load(address, lanes, count, TYPE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load lanes of one stream in the wide type; where nothing is known of their alignment, zeros beyond ``count``."""
    pointer = _pointer(address, TYPE, ALIGNED)
    value = tl.load(pointer + lanes) if ALIGNED else tl.load(pointer + lanes, mask=lanes < count, other=0.0)
    return value.to(WIDE)


@triton.jit
def _block(
    theta, theta_hat, fisher, offset, grad, lanes, count, wanted, slope, decay,
    TYPE: tl.constexpr, FISHER: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block; return the terms F d^2 and theta^2 of its lanes."""
    ALIGNED: tl.constexpr = 16 if FULL else 0
    # A thread takes as many elements of F as it stores of the gradient, if that makes loads of 8 bytes: with more, the
    # two would be in different threads, and meet by way of shared memory.
    NARROW: tl.constexpr = FISHER.primitive_bitwidth < TYPE.primitive_bitwidth
    p = _load(theta, lanes, count, TYPE, WIDE, ALIGNED)
    d = p - _load(theta_hat, lanes, count, TYPE, WIDE, ALIGNED)
    if HAS_OFFSET:
        d -= _load(offset, lanes, count, WIDE, WIDE, ALIGNED)
    fd = _load(fisher, lanes, count, FISHER, WIDE, ALIGNED // 2 if NARROW else ALIGNED) * d
    if MODE != 0:
        g = slope * fd + decay * p
        target = _pointer(grad, TYPE, ALIGNED) + lanes
        if MODE == 2:  # full blocks: all or none, so that accesses stay wide
            mask = (tl.zeros_like(lanes) if FULL else lanes) < wanted
            g += tl.load(target, mask=mask, other=0.0).to(WIDE)
            tl.store(target, g.to(TYPE), mask=mask)
        elif FULL:
            tl.store(target, g.to(TYPE))
        else:  # a packed buffer's gaps get the zeros that the masked loads gave
            tl.store(target, g.to(TYPE), mask=lanes < (count + 15) // 16 * 16)
    return fd * d, p * p


@triton.jit
def _chunk(
    theta, theta_hat, fisher, offset, grad, count, wanted, n_blocks, slope, decay, alpha, l2,
    TYPE: tl.constexpr, FISHER: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process the blocks of a chunk; return alpha sum F d^2 + l2 sum theta^2, summed in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(n_blocks):
        lanes = block * BLOCK + tl.arange(0, BLOCK)
        f_term, p_term = _block(
            theta, theta_hat, fisher, offset, grad, lanes, count, wanted, slope, decay,
            TYPE, FISHER, WIDE, MODE, HAS_OFFSET, FULL,
        )  # fmt: skip
        total += alpha * f_term.to(tl.float64) + l2 * p_term.to(tl.float64)
    return tl.sum(total)


@kernel(do_not_specialize_on_alignment=_POINTERS)
def penalty_kernel(
    chunks, grads, packed, partials, alpha, l2, scale,
    TYPE: tl.constexpr, FISHER: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    PER_TENSOR: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Process one chunk; MODE 0: the value alone, 1: store the gradient in ``packed``, 2: add it to ``grads``.

    An address of 0 in ``grads`` is that of a parameter whose gradient nobody wants.
    """
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
    grad, wanted = theta, count
    if MODE == 1:
        grad = packed.to(tl.int64) + tl.load(row + 7) * (TYPE.primitive_bitwidth // 8)
    if MODE == 2:
        grad = tl.load(grads + tensor)
        wanted = tl.where(grad != 0, count, 0)
        grad += tl.load(row + 6) * (TYPE.primitive_bitwidth // 8)
        factor = tl.load(scale)  # folded into both coefficients in float64: one rounding less for each element
        slope, decay = factor * alpha_p, factor * l2_value
    slope, decay = slope.to(WIDE), decay.to(WIDE)
    addresses |= grad
    # The branch is the same for the whole program.
    if (count == BLOCK * N_BLOCKS) & (addresses % 16 == 0):
        total = _chunk(
            theta, theta_hat, fisher, offset, grad, count, wanted, N_BLOCKS, slope, decay, alpha_p, l2_value,
            TYPE, FISHER, WIDE, MODE, HAS_OFFSET, True, BLOCK,
        )  # fmt: skip
    else:
        total = _chunk(
            theta, theta_hat, fisher, offset, grad, count, wanted, tl.cdiv(count, TAIL), slope, decay, alpha_p,
            l2_value, TYPE, FISHER, WIDE, MODE, HAS_OFFSET, False, TAIL,
        )  # fmt: skip
    tl.store(partials + pid, 0.5 * total)
