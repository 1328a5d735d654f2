"""The losses' weights in probing passes, powers of two, and how ratios of gradients are read as samples.

The loss of sample n depends on sample n alone, so the gradient of any output is linear in the weights that the losses
enter the backward pass with. Two passes over one graph, with weights c_n (powers of two) and with weights 1, give
gradients whose ratio is c_n exactly in every element that sample n owns: scaling by a power of two commutes with
rounding. It is enough to compare one random projection of every row (all but the last dimension): a row that mixes
samples does not scale by any one of the weights.

A hook on an activation may clip gradients, or normalise each row: then nothing scales, though sample n's rows still
depend on its own loss alone. And float16 has no room for such weights. There, passes come in *pairs*: some losses enter
with weight -2 in one pass and the others in the next, all else with 1. Whatever happens to a row in the first of these,
it must stay as it is in the other one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..sample_layout import AxisLayout, AxisTemplate

#: Projections on the host. One call of a recurrent cell has few, and NumPy takes half as long for them as PyTorch does.
_Host: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

#: Weights are 2^-8 .. 2^-1 and 2^1 .. 2^8; one probing pass tells 16 samples apart, two tell 256 apart, and so on.
#: None is 1: a gradient that stays as it is does not come from the losses.
RADIX = 16

#: Weights of 2^-32 .. 2^32 tell 64 apart in one pass. Where ordinary gradients are compared, samples of the smaller
#: weights would be lost in the rounding of the others.
WIDE_RADIX = 64

#: Rounding that the two passes may differ by (atomics in backward kernels), relative to the row and the tensor.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class ProbeWeights:
    """The weights of one batch's probing passes, and how gradients are read back.

    Attributes:
        n_samples: size of the batch.
        in_pairs: samples are told by what changes in which of two passes, not by ratios.
        radix: how many samples one pass tells apart.
        order: a random numbering of the samples, [N].
        rounds: how many passes tell any two samples apart.
        signs: a random sign for each sample, int64 [N].
    """

    def __init__(self, n_samples: int, generator: torch.Generator, in_pairs: bool = False, radix: int = RADIX) -> None:
        """Draw a random numbering; digit d of a number decides about the weight in pass d, or the d-th pair."""
        self.n_samples, self.in_pairs, self.radix = n_samples, in_pairs, radix
        self.order = torch.randperm(n_samples, generator=generator, device="cpu")
        self.rounds = 1
        while (2 if in_pairs else radix) ** self.rounds < n_samples:
            self.rounds += 1
        self.rounds *= 2 if in_pairs else 1
        signs = torch.randint(0, 2, (n_samples,), generator=generator, dtype=torch.int64, device="cpu")
        self.signs = signs * 2 - 1
        self._weights: dict[int, Tensor] = {}
        self._by_rows: dict[tuple[int, AxisLayout, torch.Size, torch.dtype], tuple[_Host, _Host]] = {}

    def weights(self, digit: int) -> Tensor:
        """Return the loss weights of one probing pass, float64 [N] on the CPU; those of digit 0 carry random signs."""
        if digit not in self._weights:
            if self.in_pairs:
                chosen = (self.order >> digit // 2) % 2 != digit % 2
                self._weights[digit] = torch.where(chosen, -2.0, 1.0).double()
            else:
                exponents = (self.order // self.radix**digit) % self.radix - self.radix // 2
                magnitude = torch.exp2((exponents + (exponents >= 0)).double())
                self._weights[digit] = magnitude * self.signs if digit == 0 else magnitude
        return self._weights[digit]

    @property
    def verifying(self) -> Tensor:
        """The weights of the losses in the pass whose ordinary gradients are compared, float64 [N] on the CPU."""
        if self.in_pairs or self.n_samples == 1:
            return torch.ones(self.n_samples, dtype=torch.float64, device="cpu")
        return self.weights(0)

    def by_rows(self, digit: int, layout: AxisLayout, shape: torch.Size, dtype: torch.dtype) -> tuple[_Host, _Host]:
        """Return the weight of every row's sample, and how far off a row may be, relative to its level.

        They are made once for all outputs of one shape: recurrent cells have many.

        Args:
            digit: of the probing pass.
            layout: who owns the rows.
            shape: of the output.
            dtype: of the output's gradient.
        """
        key = digit, layout, shape, dtype
        found = self._by_rows.get(key)
        if found is None:
            weights = self.weights(digit).to(_wide(dtype))[layout.segment_ids(shape, torch.device("cpu"))].numpy()
            found = self._by_rows[key] = weights, TOLERANCE[dtype] * np.abs(weights)
        return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a gradient's projections."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def _direction(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a fixed random vector to project rows on."""
    generator = torch.Generator("cpu").manual_seed(0x5EED + length)
    return torch.randn(length, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


@dataclass
class Projection:
    """Projections of one gradient, of N + T numbers instead of N * T * D: per row and per position in a row.

    They are float64 for gradients of that type, and float32 for all others.
    """

    rows: Tensor
    columns: Tensor | None
    dtype: torch.dtype  # of the gradient

    @staticmethod
    def of(gradient: Tensor, n_samples: int) -> Projection:
        """Project a gradient of an output (at least 1-D)."""
        flat = gradient.reshape(-1, 1) if gradient.dim() == 1 else gradient.flatten(0, -2)
        if gradient.dtype == torch.float16:  # which overflows
            flat = flat.float()
        wide = _wide(gradient.dtype)
        rows = (flat @ _direction(flat.shape[1], flat.dtype, flat.device)).to(wide)
        columns = None
        if gradient.dim() > 1 and gradient.shape[-1] % n_samples == 0:
            columns = (_direction(flat.shape[0], flat.dtype, flat.device) @ flat).to(wide)
        return Projection(rows, columns, gradient.dtype)

    @cached_property
    def host_rows(self) -> _Host:
        """The rows' projections, on the host."""
        return self.rows.cpu().numpy()

    @cached_property
    def _sizes(self) -> _Host:
        """The sizes of the rows' projections."""
        return np.abs(self.host_rows)

    @cached_property
    def largest(self) -> float:
        """The largest size of a row's projection; NaN if one is NaN."""
        return float(self._sizes.max()) if self._sizes.size else 0.0

    @cached_property
    def levels(self) -> _Host:
        """What differences of rows are compared with."""
        return _levels(self._sizes, self.dtype)

    @cached_property
    def is_zero_nowhere(self) -> bool:
        """Whether no row's projection is zero, or so small that it counts for nothing."""
        return bool(self._sizes.size) and float(self._sizes.min()) > smallest(self.dtype)

    def without(self, rows: Tensor) -> Projection:
        """Return the projection with some rows (bool) set to zero, and without columns."""
        return Projection(self.rows.masked_fill(rows, 0.0), None, self.dtype)

    @property
    def is_zero(self) -> bool:
        """Tell whether the gradient was zero, or so small that weights would be lost in subnormal numbers."""
        return self.largest <= smallest(self.dtype)

    @property
    def is_finite(self) -> bool:
        """Tell whether the gradient was free of NaN and inf."""
        return math.isfinite(self.largest)

    def is_scaled(self, plain: Projection, factor: float) -> bool:
        """Tell whether this is another projection times a factor."""
        return bool(_agree(self.rows, plain.rows, torch.tensor(factor).to(plain.rows), plain.dtype).all())


@lru_cache(maxsize=1024)
def candidates(shape: torch.Size, n_samples: int) -> tuple[AxisTemplate, ...]:
    """Return the templates that a tensor of this shape admits, the most common ones first."""
    found: list[AxisTemplate] = []
    between: list[AxisTemplate] = []
    for dim, size in enumerate(shape):
        if size % n_samples:
            continue
        rest = size // n_samples
        if rest == 1:
            found.append(AxisTemplate(dim))
        elif rest > 1:
            found += [AxisTemplate(dim, 1, rest), AxisTemplate(dim, rest, 1)]
            between += [AxisTemplate(dim, outer, rest // outer) for outer in range(2, rest) if rest % outer == 0]
    return (*found, *between)


@lru_cache(maxsize=16)
def smallest(dtype: torch.dtype) -> float:
    """Return the size below which rounding to subnormal numbers exceeds the tolerance; float16 is never scaled down.

    A gradient of that size counts for nothing: its square is lost in an accumulator.
    """
    dtype = dtype.to_real()
    return 0.0 if dtype == torch.float16 else torch.finfo(dtype).tiny * 2.0 ** (WIDE_RADIX // 2) / TOLERANCE[dtype]


def matches(
    layout: AxisLayout,
    shape: torch.Size,
    probed: Projection,
    plain: Projection,
    probe_weights: ProbeWeights,
    digit: int,
) -> bool:
    """Tell whether every row of a probing pass is its sample's weight times the row of the plain pass.

    In pairs: whether every row of a sample of weight 1 is that of the plain pass.
    """
    if layout.has_rows(len(shape)) or len(shape) == 1:
        after, before, levels = probed.host_rows, plain.host_rows, plain.levels
    elif probed.columns is None or plain.columns is None:
        return False
    else:
        after, before = probed.columns.cpu().numpy(), plain.columns.cpu().numpy()
        levels = _levels(np.abs(before), plain.dtype)
    weight, tolerance = probe_weights.by_rows(digit, layout, shape, plain.dtype)
    with np.errstate(all="ignore"):
        if probe_weights.in_pairs:
            return bool(((np.abs(after - before) <= TOLERANCE[plain.dtype] * levels) | (weight != 1)).all())
        return bool((np.abs(after - weight * before) <= tolerance * levels).all())


def shows_samples(layout: AxisLayout, shape: torch.Size, plain: Projection) -> bool:
    """Tell whether at least half of the samples, and two of them, own something that is not zero."""
    by_rows = layout.has_rows(len(shape)) or len(shape) == 1
    before = plain.rows if by_rows else plain.columns
    if before is None:
        return False
    if by_rows and plain.is_zero_nowhere:
        return layout.n_samples > 1
    nonzero = before.abs() > smallest(plain.dtype)
    if by_rows:
        own = layout.split(nonzero.view(shape[:-1] if len(shape) > 1 else shape))
    else:
        own = nonzero.view(layout.outer, layout.n_samples, layout.inner).movedim(1, 0)
    return 2 * int(own.flatten(1).any(1).sum()) >= max(4, layout.n_samples)


def _agree(after: Tensor, before: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compare projections elementwise: |after - weight * before| small against the row and against the tensor."""
    levels = before.abs() + (before.abs().mean() + smallest(dtype))
    return (after - weight * before).abs() <= TOLERANCE[dtype] * weight.abs() * levels


def _levels(sizes: _Host, dtype: torch.dtype) -> _Host:
    """Return what differences of projections of such sizes are compared with."""
    found: _Host = sizes + (sizes.mean() + smallest(dtype))
    return found


def is_mixed(probed: Projection, plain: Projection, radix: int) -> bool:
    """Tell whether one probing pass is enough to see that some row is scaled by no single weight."""
    nonzero = plain.rows.abs() > smallest(plain.dtype)
    ratio = torch.where(nonzero, probed.rows.double() / plain.rows.double(), 1.0)
    exponent = ratio.abs().log2().round().clamp(-radix // 2, radix // 2)
    weight = torch.where(exponent == 0, 2.0, exponent.exp2()).copysign(ratio)
    return not bool((_agree(probed.rows, plain.rows, weight.to(plain.rows.dtype), plain.dtype) | ~nonzero).all())


def decode(digits: list[Projection], plain: Projection, probe_weights: ProbeWeights) -> Tensor | None:
    """Read the sample of every row from the probing passes; None if some row belongs to no single sample."""
    before = plain.rows
    nonzero = before.abs() > smallest(plain.dtype)
    number, sane = (_read_pairs if probe_weights.in_pairs else _read_ratios)(
        digits, plain, nonzero, probe_weights.radix
    )
    numbers = 2 ** (len(digits) // 2) if probe_weights.in_pairs else probe_weights.radix ** len(digits)
    sample_of = torch.full((numbers,), -1, dtype=torch.int64, device="cpu")
    sample_of[probe_weights.order] = torch.arange(probe_weights.n_samples, device="cpu")
    sample = sample_of.to(before.device)[number]
    sane &= sample >= 0
    for digit, probed in enumerate(digits):
        weight = probe_weights.weights(digit).to(before.device)[sample.clamp_min(0)].to(before.dtype)
        if probe_weights.in_pairs:
            sane &= _agree(probed.rows, before, torch.ones_like(weight), plain.dtype) | (weight != 1)
        else:
            sane &= _agree(probed.rows, before, weight, plain.dtype)
    if not bool((sane | ~nonzero).all()):
        return None
    return torch.where(nonzero, sample, -1)


def _read_ratios(digits: list[Projection], plain: Projection, nonzero: Tensor, radix: int) -> tuple[Tensor, Tensor]:
    """Return the number that the ratios of every row spell, and whether they spell one."""
    before = plain.rows.double()
    number, sane = torch.zeros(before.shape, dtype=torch.int64, device=before.device), torch.ones_like(nonzero)
    for digit, probed in enumerate(digits):
        exponent = torch.where(nonzero, (probed.rows.double() / before).abs().log2().round(), 1.0).long()
        value = exponent - (exponent > 0).long() + radix // 2
        sane &= (value >= 0) & (value < radix) & (exponent != 0)
        number += value.clamp(0, radix - 1) * radix**digit
    return number, sane


def _read_pairs(digits: list[Projection], plain: Projection, nonzero: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Return the number that tells in which pass of each pair every row changed, and whether it did."""
    before = plain.rows.double()
    number, sane = torch.zeros(before.shape, dtype=torch.int64, device=before.device), torch.ones_like(nonzero)
    for digit in range(len(digits) // 2):
        changes = [(one.rows.double() - before).abs() for one in digits[2 * digit : 2 * digit + 2]]
        number += (changes[0] > changes[1]).long() << digit
        sane &= torch.maximum(*changes) > TOLERANCE[plain.dtype] * before.abs()
    return number, sane
