"""Which sample owns which element of an operation's output: measured, not guessed.

The loss of sample n depends on sample n alone, so the gradient of any output is linear in the weights that the losses
enter the backward pass with. Two passes over one graph, with weights c_n (powers of two) and with weights 1, give
gradients whose ratio is c_n exactly in every element that sample n owns: scaling by a power of two commutes with
rounding. It is enough to compare one random projection of every row (all but the last dimension): a row that mixes
samples does not scale by any one of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ..ops.layout import flat_dtype

#: Codes are 2^-8 .. 2^7; one probing pass tells 16 samples apart, two tell 256 apart, and so on.
RADIX = 16

#: Rounding that the two passes may differ by (atomics in backward kernels), relative to the row and the tensor.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Codes:
    """The power-of-two weights of one batch's probing passes, and how ratios are read back."""

    def __init__(self, n_samples: int, generator: torch.Generator) -> None:
        """Draw a random numbering of the samples; sample n's code in pass d is digit d of its number."""
        self.n_samples = n_samples
        self.order = torch.randperm(n_samples, generator=generator)
        self.rounds = 1
        while RADIX**self.rounds < n_samples:
            self.rounds += 1
        self.signs = torch.randint(0, 2, (n_samples,), generator=generator, dtype=torch.int64) * 2 - 1

    def weights(self, digit: int) -> Tensor:
        """Return the loss weights of one probing pass, float64 [N] on the CPU; those of digit 0 carry random signs."""
        exponents = (self.order // RADIX**digit) % RADIX - RADIX // 2
        magnitude = torch.exp2(exponents.double())
        return magnitude * self.signs if digit == 0 else magnitude


@dataclass(frozen=True)
class Axis:
    """A measured template: the samples lie along one dimension, whose size is ``outer * N * inner``.

    It fits batches of any N, and of any size elsewhere. Another ``outer * inner`` is measured anew: with T = 1, say,
    T * N * K looks like N * (T * K).
    """

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def is_between(self) -> bool:
        """Tell whether the sample axis has others on both sides, whose sizes may change while their product stays."""
        return self.outer > 1 and self.inner > 1

    def fit(self, shape: torch.Size, n_samples: int) -> Layout | None:
        """Return the layout of a tensor of this shape; None if the template does not apply to it."""
        if self.dim >= len(shape) or shape[self.dim] != self.outer * n_samples * self.inner:
            return None
        return _layout(self.dim, self.outer, n_samples, self.inner)


@dataclass(frozen=True)
class Layout:
    """Ownership by position: dimension ``dim`` splits into [outer, N, inner]."""

    dim: int
    outer: int
    n_samples: int
    inner: int

    def split(self, tensor: Tensor) -> Tensor:
        """View a tensor with the sample axis in front: [N, ..., outer, inner, ...]."""
        shape = tensor.shape
        parts = tensor.view(*shape[: self.dim], self.outer, self.n_samples, self.inner, *shape[self.dim + 1 :])
        return parts.movedim(self.dim + 1, 0)

    def has_rows(self, ndim: int) -> bool:
        """Tell whether samples own whole rows (all elements along the last dimension)."""
        return self.dim < ndim - 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows as [N, T, D]."""
        if self.dim == 0 and self.outer == 1:  # the common case, in one step
            return tensor.reshape(self.n_samples, -1, tensor.shape[-1]) if tensor.numel() else self._rows(tensor)
        return self._rows(tensor)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows wherever the samples lie."""
        return self.split(tensor).flatten(1, -2)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return a copy in which all elements of other samples are zero."""
        masked = torch.zeros_like(tensor)
        self.split(masked)[sample].copy_(self.split(tensor)[sample])
        return masked

    def scale(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply each element by its owner's factor."""
        scaled = tensor.clone()
        parts = self.split(scaled)
        parts.mul_(factors.to(tensor.dtype).view(-1, *[1] * (parts.dim() - 1)))
        return scaled

    def owners(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the owner of every row (of every element where the axis is the last dimension), flattened."""
        leading = shape[:-1] if self.dim < len(shape) - 1 else shape[-1:]
        position = torch.arange(shape[self.dim], device=device) // self.inner % self.n_samples
        view = [1] * len(leading)
        view[self.dim if len(leading) > self.dim else 0] = -1
        return position.view(view).expand(leading).reshape(-1)


@lru_cache(maxsize=256)
def _layout(dim: int, outer: int, n_samples: int, inner: int) -> Layout:
    """Return a layout, made once."""
    return Layout(dim, outer, n_samples, inner)


@dataclass(frozen=True)
class Routed:
    """Ownership by a measured table: rows of the output in any order, such as tokens routed to an expert."""

    owner: Tensor  # int64 [rows]; -1 where the row's gradient is zero
    n_samples: int

    def has_rows(self, ndim: int) -> bool:
        """Rows are what the table is about."""
        return ndim > 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows as [N, T, D], T the most rows that one sample owns, padded with zeros (exact: they add 0)."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        owned = (self.owner >= 0).nonzero().squeeze(1)
        owner, order = self.owner[owned].sort(stable=True)
        counts = torch.bincount(owner, minlength=self.n_samples)
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        arranged = flat.new_zeros(self.n_samples, max(1, int(counts.max())), flat.shape[1])
        arranged[owner, place] = flat[owned[order]]
        return arranged

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return a copy in which all rows of other samples are zero."""
        return tensor * (self.owner == sample).view(self._row_shape(tensor))

    def scale(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply each row by its owner's factor."""
        return tensor * factors.to(tensor.dtype)[self.owner.clamp_min(0)].view(self._row_shape(tensor))

    @staticmethod
    def _row_shape(tensor: Tensor) -> tuple[int, ...]:
        """Return the shape that broadcasts one number a row (a 1-D tensor has one row an element)."""
        return (*tensor.shape[:-1], 1) if tensor.dim() > 1 else tuple(tensor.shape)


@dataclass(frozen=True)
class Single:
    """A batch of one sample: it owns everything."""

    n_samples: int = 1

    def split(self, tensor: Tensor) -> Tensor:
        """View a tensor with sample axis and two more in front, as a layout along dimension 0 does: [1, 1, ...]."""
        return tensor.unsqueeze(0).unsqueeze(0)

    def has_rows(self, ndim: int) -> bool:
        """Tell whether the output has rows at all."""
        return ndim > 0

    def rows(self, tensor: Tensor) -> Tensor:
        """Arrange rows as [1, T, D]."""
        return tensor.reshape(1, -1, tensor.shape[-1])

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return the tensor: all of it is the sample's."""
        return tensor

    def scale(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply by the sample's factor."""
        return tensor * factors.to(tensor.dtype)[0]


#: What a rule may be given.
Ownership: TypeAlias = Layout | Routed | Single


def is_summable(owner: Ownership, gradient: Tensor, shape: torch.Size) -> bool:
    """Tell whether :func:`sum_to` serves these: the sample axis is among what broadcasting spread."""
    if isinstance(owner, Single):
        return True
    if isinstance(owner, Routed):
        return shape.numel() == 1 if gradient.dim() == 1 else shape.numel() == shape[-1:].numel()
    before = gradient.dim() - len(shape)
    return owner.dim < before or shape[owner.dim - before] == 1


def sum_to(owner: Ownership, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum a gradient over all that broadcasting spread, for each sample apart.

    Args:
        owner: who owns the elements of the gradient.
        gradient: gradient of an output that a tensor of ``shape`` was broadcast to.
        shape: the shape to sum to, for which :func:`is_summable` holds.

    Returns:
        [N, *shape], accumulated in float32 or wider.
    """
    wide = flat_dtype(gradient.dtype)
    if isinstance(owner, Single):
        return gradient.to(wide).sum_to_size(shape).unsqueeze(0)
    if isinstance(owner, Routed):
        rows = owner.rows(gradient if gradient.dim() > 1 else gradient.unsqueeze(1)).sum(1, dtype=wide)
        return rows.sum_to_size((owner.n_samples, shape[-1] if shape else 1)).reshape(-1, *shape)
    if owner.dim == 0 and owner.outer == owner.inner == 1 and gradient.shape[1:] == shape:
        return gradient.to(wide)
    padded = (1,) * (gradient.dim() - len(shape)) + tuple(shape)
    parts = owner.split(gradient)  # [N, ..., outer, inner, ...]
    parts = parts.sum((owner.dim + 1, owner.dim + 2), dtype=wide).unsqueeze(owner.dim + 1)
    return parts.sum_to_size((owner.n_samples, *padded)).reshape(-1, *shape)


@lru_cache(maxsize=64)
def _direction(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a fixed random vector to project rows on."""
    generator = torch.Generator().manual_seed(0x5EED + length)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(device, dtype)


@dataclass
class Signature:
    """Projections of one gradient, of N + T numbers instead of N * T * D: per row and per position in a row."""

    rows: Tensor
    columns: Tensor | None

    @staticmethod
    def of(gradient: Tensor, n_samples: int) -> Signature:
        """Project a gradient of an output (at least 1-D)."""
        flat = gradient.reshape(-1, 1) if gradient.dim() == 1 else gradient.reshape(-1, gradient.shape[-1])
        rows = flat @ _direction(flat.shape[1], flat.dtype, flat.device)
        columns = None
        if gradient.dim() > 1 and gradient.shape[-1] % n_samples == 0:
            columns = _direction(flat.shape[0], flat.dtype, flat.device) @ flat
        return Signature(rows, columns)

    @property
    def is_zero(self) -> bool:
        """Tell whether the gradient was zero, or so small that codes would be lost in subnormal numbers."""
        return bool((self.rows.abs() <= smallest(self.rows.dtype)).all())

    @property
    def is_finite(self) -> bool:
        """Tell whether the gradient was free of NaN and inf."""
        return bool(torch.isfinite(self.rows).all())


def candidates(shape: torch.Size, n_samples: int) -> list[Axis]:
    """List the templates that a tensor of this shape admits, the most common ones first."""
    found: list[Axis] = []
    between: list[Axis] = []
    for dim, size in enumerate(shape):
        if size % n_samples:
            continue
        rest = size // n_samples
        if rest == 1:
            found.append(Axis(dim))
        elif rest > 1:
            found += [Axis(dim, 1, rest), Axis(dim, rest, 1)]
            between += [Axis(dim, outer, rest // outer) for outer in range(2, rest) if rest % outer == 0]
    return found + between


def smallest(dtype: torch.dtype) -> float:
    """Return the size below which rounding to subnormal numbers exceeds the tolerance."""
    return torch.finfo(dtype).tiny * RADIX**2 / TOLERANCE[dtype]


def matches(layout: Layout, shape: torch.Size, coded: Signature, plain: Signature, codes: Tensor) -> bool:
    """Tell whether every row of a coded pass is its owner's code times the row of the plain pass."""
    by_rows = layout.has_rows(len(shape)) or len(shape) == 1
    after, before = (coded.rows, plain.rows) if by_rows else (coded.columns, plain.columns)
    if after is None or before is None:
        return False
    code = codes.to(before)[layout.owners(shape, before.device)]
    return bool(_agree(after, before, code).all())


def shows_samples(layout: Layout, shape: torch.Size, plain: Signature) -> bool:
    """Tell whether at least half of the samples, and two of them, own something that is not zero."""
    before = plain.rows if layout.has_rows(len(shape)) or len(shape) == 1 else plain.columns
    if before is None:
        return False
    owners = layout.owners(shape, before.device)[before.abs() > smallest(before.dtype)]
    return 2 * len(owners.unique()) >= max(4, layout.n_samples)


def _agree(after: Tensor, before: Tensor, code: Tensor) -> Tensor:
    """Compare projections elementwise: |after - code * before| small against the row and against the tensor."""
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    tolerance, floor = TOLERANCE[before.dtype], smallest(before.dtype)
    after, before, code = after.to(wide), before.to(wide), code.to(wide)
    level = before.abs() + before.abs().mean() + floor
    return (after - code * before).abs() <= tolerance * code.abs() * level


def is_mixed(coded: Signature, plain: Signature) -> bool:
    """Tell whether one probing pass is enough to see that some row is scaled by no single code."""
    nonzero = plain.rows.abs() > smallest(plain.rows.dtype)
    ratio = torch.where(nonzero, coded.rows.double() / plain.rows.double(), 1.0)
    code = ratio.abs().log2().round().clamp(-RADIX // 2, RADIX // 2 - 1).exp2().copysign(ratio)
    return not bool((_agree(coded.rows, plain.rows, code.to(plain.rows.dtype)) | ~nonzero).all())


def decode(digits: list[Signature], plain: Signature, codes: Codes) -> Tensor | None:
    """Read the owner of every row from the probing passes; None if some row belongs to no single sample."""
    before = plain.rows
    wide = before.double()
    number = torch.zeros(len(before), dtype=torch.int64, device=before.device)
    nonzero = before.abs() > smallest(before.dtype)
    sane = torch.ones_like(nonzero)
    for digit, coded in enumerate(digits):
        ratio = (coded.rows.double() / wide).abs()
        exponent = torch.where(nonzero, ratio.log2().round(), 0.0)
        value = exponent.long() + RADIX // 2
        sane &= (value >= 0) & (value < RADIX)
        number += value.clamp(0, RADIX - 1) * RADIX**digit
    sample_of = torch.full((RADIX ** len(digits),), -1, dtype=torch.int64)
    sample_of[codes.order] = torch.arange(codes.n_samples)
    owner = sample_of.to(before.device)[number]
    sane &= owner >= 0
    for digit, coded in enumerate(digits):
        code = codes.weights(digit).to(before.device)[owner.clamp_min(0)]
        sane &= _agree(coded.rows, before, code.to(before.dtype))
    if not bool((sane | ~nonzero).all()):
        return None
    return torch.where(nonzero, owner, -1)
