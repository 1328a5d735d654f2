"""How often -log p of each row's label is in the gradient of a loss, and whether anything else is.

The gradient of -log p by a row's logits is known: p - e_y (categorical), p - y (bernoulli), mean - y (gaussian); by
log-probabilities, that of -log p_y is -e_y. A row of a loss's gradient must be a multiple of it: 1, one over the number
of tokens, or 0 where the label does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reading import Reading

#: Logits that are compared at a time.
CHUNK = 1 << 20

#: A row whose scale is so much smaller than the largest one does not count.
NONE = 1e-6


HALVES = (torch.bfloat16, torch.float16)


class MismatchError(ValueError):
    """The loss is not the likelihood's -log p of its labels."""


class Precision(NamedTuple):
    """What rounding may make of a gradient.

    Attributes:
        tolerance: relative to it.
        eps: relative to probabilities and logits, whose differences it is.
    """

    tolerance: float
    eps: float


#: A loss in float32 or wider; one whose gradient was rounded to half precision; one computed in half precision.
FULL, ROUNDED, HALF = Precision(1e-4, 2.0**-23), Precision(2.0**-6, 2.0**-23), Precision(5e-2, 2.0**-8)


class RowScales(NamedTuple):
    """A loss's gradient beside that of -log p, in the rows' shape.

    Attributes:
        scales: how often each row's -log p is in the loss.
        errors: what rounding may make of the scales, relative to them: much where p of the label is 1 nearly.
        excess: what else is in a row's gradient, as a multiple of what rounding may leave there; where its scale cannot
            be told, the row's gradient as a multiple of what it may be if the scale is 1 (or the largest, if above).
        nll: -log p of each row's label.
        labels: of the rows.
        known: rows whose label may count.
    """

    scales: Tensor
    errors: Tensor
    excess: Tensor
    nll: Tensor
    labels: Tensor
    known: Tensor

    @property
    def certain(self) -> Tensor:
        """Rows whose scale can be told."""
        return self.known & (self.errors < 0.2)

    @property
    def unused(self) -> Tensor:
        """Rows that do not count though their label may."""
        largest = torch.where(self.certain, self.scales, 0).abs().amax() if self.scales.numel() else 0.0
        return self.certain & (self.scales.abs() <= NONE * largest)

    def are(self, expected: Tensor | float, used: Tensor) -> Tensor:
        """Tell whether the scales of all rows in use are as expected, as far as they can be told (bool, 0-d)."""
        certain = self.certain
        fits = torch.where(certain, (self.scales / expected - 1).abs() <= self.errors, self.excess <= expected)
        return (fits | ~used).all()


def row_scales(
    reading: Reading,
    logits: Tensor,
    labels: Tensor,
    known: Tensor,
    gradient: Tensor,
    precision: Precision,
    of_log_p: bool = False,
) -> RowScales:
    """Compare a loss's gradient with that of -log p.

    Args:
        reading: how the loss reads outputs and labels.
        logits: what the loss was evaluated on.
        labels: of each row, in the rows' shape.
        known: which of them may count.
        gradient: of the sum of losses by the logits.
        precision: what rounding may make of it.
        of_log_p: categorical: logits are log-probabilities, and the loss is the negative of one of them.
    """
    if not reading.categorical:
        means, found = (t.reshape(known.shape) for t in (logits, gradient))
        parts = [_elementwise(reading.likelihood == "gaussian", means, found, labels, known, precision)]
    else:
        rows, gradients = (t.movedim(reading.dim, -1).flatten(0, -2) for t in (logits, gradient))
        size = max(1, CHUNK // rows.shape[-1])
        columns = (t.split(size) for t in (rows, gradients, labels.flatten(), known.flatten()))
        parts = [_categorical(*chunk, precision=precision, of_log_p=of_log_p) for chunk in zip(*columns, strict=True)]
    scales, rest, floor, error, nll = (torch.cat(column).view(known.shape) for column in zip(*parts, strict=True))
    certain = known & (error < 0.2)
    level = torch.where(certain, scales, 0).abs()
    largest = torch.maximum(level.amax(), 1e-3 * rest.amax()) if bool(certain.any()) else level.new_ones(())
    # Of rows whose scale cannot be told the gradient is zero nearly, and the scale may exceed those that can be told:
    # that of a sample's only token where losses are means. Of rows without a label the gradient must be nothing.
    level = torch.where(certain, level.clamp_min(1e-3 * precision.tolerance * largest), largest.clamp_min(1))
    allowed = torch.where(known, level * floor, 1e-3 * precision.tolerance * largest)
    excess = torch.where(rest > 0, rest / allowed, 0).nan_to_num(nan=math.inf)
    return RowScales(scales, error, excess, nll, labels, known)


def is_gradient(
    reading: Reading, logits: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Tell whether a gradient is that of -log p of rows that count so often each, in few operations.

    Args:
        reading: how the loss reads outputs and labels.
        logits: what the loss was evaluated on.
        labels: of each row, in the rows' shape.
        weights: how often each row's -log p should be in the loss, 0 where its label does not count.
        gradient: of the sum of losses by the logits.
        precision: what rounding may make of it.

    Returns:
        Whether it is (bool, 0-d; False also where numbers are so large that :func:`row_scales` must tell), and -log p
        of each row, 0 where the label does not count.
    """
    if not reading.categorical:
        gaussian = reading.likelihood == "gaussian"
        mean, y = _wide(logits).reshape(weights.shape), torch.where(weights > 0, _wide(labels), 0)
        away = (mean if gaussian else mean.sigmoid()) - y
        differs = (weights * away - _wide(gradient).reshape(weights.shape)).abs()
        nll = away.square() / 2 if gaussian else torch.nn.functional.softplus(mean) - mean * y
        allowed = precision.tolerance * away.abs() + 16 * precision.eps
        return (differs <= weights * allowed).all(), torch.where(weights > 0, nll, 0)
    rows, gradients = (t.movedim(reading.dim, -1).flatten(0, -2) for t in (logits, gradient))
    size = max(1, CHUNK // rows.shape[-1])
    columns = (t.split(size) for t in (rows, gradients, labels.flatten(), weights.flatten()))
    right, values = [], []
    for row, found, label, weight in zip(*columns, strict=True):
        index = label.clamp(0, rows.shape[-1] - 1).unsqueeze(-1)
        expected = _wide(row).log_softmax(-1)
        nll = -expected.gather(-1, index)
        expected = expected.exp_().scatter_add_(-1, index, -torch.ones_like(nll)).mul_(weight.unsqueeze(-1))
        differs = torch.linalg.vector_norm(expected.sub_(found), 1, -1)
        allowed = 2 * precision.tolerance * torch.expm1(-nll.squeeze(-1)).abs() + 64 * precision.eps
        right.append((differs <= weight * allowed).all())
        values.append(torch.where(weight > 0, nll.squeeze(-1), 0))
    return torch.stack(right).all(), torch.cat(values).view(weights.shape)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def are_normalised(rows: Tensor) -> Tensor:
    """Tell which rows [..., C] are log-probabilities, up to the rounding of their type."""
    rounding = torch.finfo(rows.dtype).eps * math.log(rows.shape[-1])
    return _wide(rows).logsumexp(-1).abs() < 1e-2 + rounding


def _categorical(
    logits: Tensor, gradient: Tensor, labels: Tensor, known: Tensor, *, precision: Precision, of_log_p: bool
) -> tuple[Tensor, ...]:
    """Compare the gradients of rows [R, C]: scales, the rest of a row, what it may be, the scale's error, -log p."""
    index = labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    found, level = _wide(gradient), _wide(logits.amax(-1)).abs()
    at_label = torch.where(known, found.gather(-1, index).squeeze(-1), 0)
    if of_log_p:
        nll = -_wide(logits.gather(-1, index).squeeze(-1))
        away, p = torch.ones_like(nll), None
        normalised = are_normalised(logits)
    else:
        log_p = _wide(logits).log_softmax(-1)
        nll = -log_p.gather(-1, index).squeeze(-1)
        away, p = torch.expm1(-nll).abs(), log_p.exp_()
    noise = precision.eps * (16 + 8 * level)
    error = 10 * precision.tolerance + noise / away
    scales = torch.where(error < math.inf, -at_label / away, 0)
    told = torch.where(error < 0.2, scales, 0)
    rest = found.clone() if p is None else torch.addcmul(found, told.unsqueeze(-1), p, value=-1)
    rest = torch.linalg.vector_norm(rest.scatter_add_(-1, index, told.unsqueeze(-1)), 1, -1)
    if p is None:
        rest = torch.where(normalised | ~known, rest, math.inf)
    return scales, rest, 2 * (precision.tolerance * away + noise) + 2 * away * (error >= 0.2), error, nll


def _elementwise(
    gaussian: bool, logits: Tensor, gradient: Tensor, labels: Tensor, known: Tensor, precision: Precision
) -> tuple[Tensor, ...]:
    """Do the same for rows that are one logit, or one mean."""
    mean, found, y = _wide(logits), _wide(gradient), torch.where(known, _wide(labels), 0)
    away = (mean if gaussian else mean.sigmoid()) - y
    noise = 16 * precision.eps * (1 + y.abs() + (mean.abs() if gaussian else 0))
    error = 10 * precision.tolerance + noise / away.abs()
    scales = torch.where(known & (error < math.inf), found / away, 0)
    rest = torch.where(known & (error < 0.2), 0, found.abs())
    nll = away.square() / 2 if gaussian else torch.nn.functional.softplus(mean) - mean * y
    return scales, rest, 2 * (away.abs() + noise), error, nll


def expected_scales(
    rows: RowScales,
    used: Tensor,
    reading: Reading,
    logits: Tensor,
    n_labels: int,
    n_samples: int,
    samples_of: Callable[[], Tensor],
) -> Tensor:
    """Return the scales that rows should have: 1, or one over the number of a sample's tokens.

    Args:
        rows: what was found.
        used: the rows that count.
        reading: how the loss reads outputs and labels.
        logits: the logits.
        n_labels: how many labels the targets hold, with those that do not count.
        n_samples: how many losses there are.
        samples_of: tells which sample each row belongs to, where that is not along the first dimension.

    Raises:
        MismatchError: if rows have others.
    """
    one = torch.ones_like(rows.scales)
    if bool(rows.are(1.0, used)):
        return one
    shape = logits.shape
    features = {1} if reading.categorical else {shape[1], shape[-1]} if len(shape) > 2 else set()
    totals = {used.numel(), n_labels} | {used.numel() - used.numel() // size for size in used.shape[1:]}
    for by_shape in (True, False)[used.shape[0] != n_samples :]:
        in_order = torch.arange(n_samples, device=used.device).view(-1, *[1] * (used.dim() - 1))
        samples = in_order.expand_as(used) if by_shape else samples_of()
        per_sample = torch.bincount(samples[used], minlength=n_samples)[samples].clamp_min(1)
        for width in features:
            if bool(rows.are(width / per_sample, used)):
                return width / per_sample
    for width in features:
        for total in totals:
            if total and bool(rows.are(width * n_samples / total, used)):
                return one * (width * n_samples / total)
    values = rows.scales[used & rows.certain]
    if bool((rows.are(float(values[0]), used)) & (values[0] != 0)):
        raise MismatchError(f"the loss is {float(values[0]):.4g} times -log p")
    raise MismatchError("the loss is -log p times a factor that differs from label to label")
