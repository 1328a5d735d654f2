"""The verification of a batch: captured rows against plain autograd, on the same graph and on a sample alone.

``sum_n c_n g_n``, summed from the captured rows with their samples, must equal the ordinary gradient of
``sum_n c_n loss_n`` on the same graph. The c_n are random signs and powers of two, so that any exchange of samples
shows, and so does a use that was missed. It is exact up to rounding, holds under dropout, slices no inputs, and costs
one more backward pass. What it does not check is the squaring, which unit tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...errors import VerificationError
from .batch import Batch
from .squares import Uses, gradients_of, weighted_sums


def watching(batch: Batch, weights: Tensor, fisher: Sequence[Tensor]) -> Callable[[Uses], None]:
    """Return what keeps, of grad samples about to be squared, the sums that :func:`verify_batch` compares.

    Args:
        batch: takes the sums.
        weights: the c_n, [N].
        fisher: tensors of the parameters' shapes, by index.
    """

    def watch(uses: Uses) -> None:
        batch.captured |= weighted_sums(uses, weights, fisher)
        if batch.single_sample is not None:
            batch.of_single_sample |= gradients_of(uses, batch.single_sample.sample, fisher)

    return watch


@torch.no_grad()
def verify_batch(
    batch: Batch,
    weights: Tensor,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    seen: set[torch.dtype],
    unseen: set[int],
    fisher: Sequence[Tensor],
) -> bool:
    """Compare captured gradients with plain autograd; False if something overflowed, which the accumulator reports.

    Args:
        batch: the batch, with both sides.
        weights: the c_n, [N].
        names: of the parameters.
        parameters: these.
        seen: dtypes of gradients that the batch had: the coarsest decides about tolerances.
        unseen: parameters that were not captured.
        fisher: the sums of squares so far.

    Raises:
        VerificationError: if they disagree.
    """
    if not all(bool(torch.isfinite(f.sum())) for f in fisher):
        return False
    own = {p.dtype for p in parameters}
    coarsest = {dtype: max(seen | {dtype}, key=lambda d: torch.finfo(d).eps) for dtype in own}
    dtypes = [coarsest[p.dtype] for p in parameters]
    check_identity(names, batch.captured, batch.ordinary, fisher, weights, dtypes, batch.one_by_one | unseen)
    if batch.single_sample is not None:
        check_single_sample(names, batch.of_single_sample, batch.single_sample.gradients, dtypes)
    return True


#: Largest difference, relative to sqrt(sum_n |g_n|^2).
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def check_identity(
    names: Sequence[str],
    captured: Mapping[int, Tensor],
    ordinary: Sequence[Tensor | None],
    fisher: Sequence[Tensor],
    probe_weights: Tensor,
    dtypes: Sequence[torch.dtype],
    skipped: set[int],
) -> None:
    """Compare both sides, parameter by parameter.

    Args:
        names: the parameters' names.
        captured: index -> ``sum_n c_n g_n`` from captured rows; absent where no use was collected.
        ordinary: the ordinary gradients; None where none arrived.
        fisher: the sums of squares so far, for the scale that rounding is relative to.
        probe_weights: the weights c_n.
        dtypes: the parameters' dtypes.
        skipped: indices not to compare (they were not captured but computed by autograd itself).

    Raises:
        VerificationError: naming the first parameter that differs.
    """
    largest = float(probe_weights.abs().max())
    scales = [float(f.sum(dtype=torch.float64)) ** 0.5 for f in fisher]
    floor = 1e-3 * max(1e-300, sum(scale**2 for scale in scales)) ** 0.5  # some gradients are zero but for rounding
    for index, expected in enumerate(ordinary):
        got = captured.get(index)
        if index in skipped or (expected is None and got is None):
            continue
        difference = torch.zeros_like(fisher[index]) if got is None else got.clone()
        least = torch.finfo(dtypes[index]).tiny * difference.numel() ** 0.5  # below, all is rounding
        size = max(scales[index], floor, least)
        if expected is not None:
            difference -= expected.to(difference.dtype)
            size = max(size, float(expected.norm()) / largest)
        error = float(difference.norm()) / largest
        if not error <= TOLERANCE[dtypes[index]] * size:
            raise VerificationError(
                f"captured per-sample gradients of {names[index]!r} disagree with autograd (|difference| {error:.3g}, "
                f"|g| {size:.3g}); this is a bug in wplfast: please report the model. "
                "wplfast.verify_fisher compares with a one-sample loop"
            )


#: Largest difference between a gradient in a batch and alone, relative to its size: another order of summation.
SINGLE_SAMPLE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}


def check_single_sample(
    names: Sequence[str],
    captured: Mapping[int, Tensor],
    alone: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
) -> None:
    """Compare one sample's captured gradient with the one that plain autograd gives it in a batch of its own.

    Both sides of the identity go through the taps; this one does not. It sees an operation that the capture misread,
    and gradients that a batch scales by its own statistics.

    Args:
        names: the parameters' names.
        captured: index -> the sample's gradient; absent where no use was collected.
        alone: the gradients alone; None where none arrived.
        dtypes: the parameters' dtypes.

    Raises:
        VerificationError: naming the first parameter that differs.
    """
    norms = {i: float(g.double().norm()) for i, g in enumerate(alone) if g is not None}
    floor = 1e-3 * max(norms.values(), default=0.0)
    for index, expected in enumerate(alone):
        got = captured.get(index)
        if expected is None and got is None:
            continue
        least = torch.finfo(dtypes[index]).tiny / SINGLE_SAMPLE_TOLERANCE[dtypes[index]]  # below, all is rounding
        size = max(norms.get(index, 0.0), floor, least)
        difference = 0.0 if got is None else got.double()
        if expected is not None:
            difference = difference - expected.to_dense().double()
        error = float(torch.as_tensor(difference).norm())
        if not error <= SINGLE_SAMPLE_TOLERANCE[dtypes[index]] * size:
            raise VerificationError(
                f"the gradient of {names[index]!r} for one sample is not that of a batch of its own "
                f"(|difference| {error:.3g}, |g| {size:.3g}): either the batch enters it (a detached batch "
                "statistic?), or wplfast misread an operation of the model; please report it then"
            )
