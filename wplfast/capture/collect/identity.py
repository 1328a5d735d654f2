"""The verification of a batch: captured rows against plain autograd, on the same graph and on a sample alone.

``sum_n c_n g_n``, summed from the captured rows with their samples, must equal the ordinary gradient of
``sum_n c_n loss_n`` on the same graph. The c_n are random signs and powers of two, so that any exchange of samples
shows, and so does a use that was missed. It is exact up to rounding, holds under dropout, slices no inputs, and costs
one more backward pass. Both sides are compared by a few random projections of each gradient, so that nothing of the
parameters' size is kept. What it does not check is the squaring, which unit tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...errors import VerificationError
from ..accumulators import Accumulators
from ..probe.weights import smallest
from ..rules.projection import N_DIRECTIONS, Directions
from .batch import Batch
from .squares import Uses, project


def watching(batch: Batch, weights: Tensor, directions: Directions) -> Callable[[Uses], None]:
    """Return what keeps, of grad samples about to be squared, the projections that :func:`verify_batch` compares.

    Args:
        batch: takes them.
        weights: the c_n, [N].
        directions: what to project on.
    """

    def watch(uses: Uses) -> None:
        sample = None if batch.single_sample is None else batch.single_sample.sample
        sums, alone = project(uses, directions, weights, sample)
        batch.captured |= sums
        batch.of_single_sample |= alone

    return watch


@torch.no_grad()
def verify_batch(
    batch: Batch,
    weights: Tensor,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    seen: set[torch.dtype],
    unseen: set[int],
    accumulators: Accumulators,
) -> bool:
    """Compare captured gradients with plain autograd; False if something overflowed, which the accumulator reports.

    Args:
        batch: the batch, with both sides.
        weights: the c_n, [N].
        names: of the parameters.
        parameters: these.
        seen: dtypes of gradients that the batch had: the coarsest decides about tolerances.
        unseen: parameters that were not captured.
        accumulators: with the sums of squares so far.

    Raises:
        VerificationError: if they disagree.
    """
    sums = _on_host(accumulators.sums())
    if not bool(torch.isfinite(sums).all()):
        return False
    own = {p.dtype.to_real() for p in parameters}
    coarsest = {dtype: max(seen | {dtype}, key=lambda d: torch.finfo(d).eps) for dtype in own}
    dtypes, numels = [coarsest[p.dtype.to_real()] for p in parameters], [f.numel() for f in accumulators.like]
    check_identity(
        names,
        batch.captured,
        batch.ordinary,
        sums.sqrt(),
        numels,
        weights,
        dtypes,
        batch.one_by_one | unseen,
    )
    if batch.single_sample is not None:
        check_single_sample(names, batch.of_single_sample, batch.single_sample.gradients, numels, dtypes)
    return True


#: Largest difference, relative to sqrt(sum_n |g_n|^2).
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def check_identity(
    names: Sequence[str],
    captured: Mapping[int, Tensor],
    ordinary: Mapping[int, Tensor],
    scales: Tensor,
    numels: Sequence[int],
    probe_weights: Tensor,
    dtypes: Sequence[torch.dtype],
    skipped: set[int],
) -> None:
    """Compare both sides, parameter by parameter.

    Args:
        names: the parameters' names.
        captured: index -> projections of ``sum_n c_n g_n`` from captured rows; absent where no use was collected.
        ordinary: those of the ordinary gradients; absent where none arrived.
        scales: sqrt(sum_n |g_n|^2), which rounding is relative to, [P].
        numels: the parameters' numbers of elements.
        probe_weights: the weights c_n.
        dtypes: the parameters' dtypes.
        skipped: indices not to compare (they were not captured but computed by autograd itself).

    Raises:
        VerificationError: naming the first parameter that differs.
    """
    chosen = [i for i in range(len(names)) if i not in skipped and (i in captured or i in ordinary)]
    if not chosen:
        return
    got, expected = (_norms_and_projections(side, chosen) for side in (captured, ordinary))
    largest = float(probe_weights.abs().max())
    floor = 1e-3 * max(1e-300, float(scales.square().sum())) ** 0.5  # some gradients are zero but for rounding
    sizes = torch.maximum(scales[chosen].clamp_min(floor), expected[0] / largest)
    errors = _norms(got[1] - expected[1]) / largest
    tolerances = torch.tensor([TOLERANCE[dtypes[i]] for i in chosen], dtype=torch.float64, device="cpu")
    allowed = torch.maximum(tolerances * sizes, _least(dtypes, numels, chosen))
    for position in (~(errors <= allowed)).nonzero().flatten().tolist():
        raise VerificationError(
            f"captured per-sample gradients of {names[chosen[position]]!r} disagree with autograd (|difference| about "
            f"{float(errors[position]):.3g}, |g| {float(sizes[position]):.3g}); this is a bug in wplfast: please "
            "report the model. wplfast.verify_fisher compares with a one-sample loop"
        )


#: Largest difference between a gradient in a batch and alone, relative to its size: another order of summation, and
#: the units that a ReLU switches by it (2% of a layer's gradient were seen, 8 layers of 1536 in float32).
SINGLE_SAMPLE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-1, torch.bfloat16: 0.3, torch.float16: 0.3}


def check_single_sample(
    names: Sequence[str],
    captured: Mapping[int, Tensor],
    alone: Mapping[int, Tensor],
    numels: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> None:
    """Compare one sample's captured gradient with the one that plain autograd gives it in a batch of its own.

    Both sides of the identity go through the taps; this one does not. It sees an operation that the capture misread,
    and gradients that a batch scales by its own statistics.

    Args:
        names: the parameters' names.
        captured: index -> projections of the sample's gradient; absent where no use was collected.
        alone: those of the gradients alone; absent where none arrived.
        numels: the parameters' numbers of elements.
        dtypes: the parameters' dtypes.

    Raises:
        VerificationError: naming the first parameter that differs.
    """
    chosen = [i for i in range(len(names)) if i in captured or i in alone]
    if not chosen:
        return
    got, expected = (_norms_and_projections(side, chosen) for side in (captured, alone))
    tolerances = torch.tensor([SINGLE_SAMPLE_TOLERANCE[dtypes[i]] for i in chosen], dtype=torch.float64, device="cpu")
    sizes = expected[0].clamp_min(1e-3 * float(expected[0].max()))
    allowed = torch.maximum(tolerances * sizes, _least(dtypes, numels, chosen))
    errors = _norms(got[1] - expected[1])
    for position in (~(errors <= allowed)).nonzero().flatten().tolist():
        raise VerificationError(
            f"the gradient of {names[chosen[position]]!r} for one sample is not that of a batch of its own "
            f"(|difference| about {float(errors[position]):.3g}, |g| {float(sizes[position]):.3g}): either the "
            "batch enters it (a detached batch statistic?), or the model amplifies rounding (is it so in float64? are "
            "inputs scaled?), or wplfast misread an operation of the model; please report it then"
        )


def _least(dtypes: Sequence[torch.dtype], numels: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """Return the norms [P] below which all is rounding, or not collected since squares are lost in an accumulator."""
    wide = (torch.float64 if dtypes[i] == torch.float64 else torch.float32 for i in chosen)
    least = [max(smallest(w), torch.finfo(dtypes[i]).tiny) for w, i in zip(wide, chosen, strict=True)]
    elements = torch.tensor([numels[i] for i in chosen], dtype=torch.float64, device="cpu")
    return torch.tensor(least, dtype=torch.float64, device="cpu") * elements.sqrt()


def _norms_and_projections(side: Mapping[int, Tensor], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return norms [P] and projections [P, k], float64 on the host; zero where nothing is known."""
    zero = torch.zeros(N_DIRECTIONS, device="cpu")
    projections = _on_host([side.get(i, zero) for i in chosen])
    return _norms(projections), projections


def _norms(projections: Tensor) -> Tensor:
    """Estimate norms [P] of gradients from their projections [P, k]."""
    return projections.square().mean(1).sqrt()


def _on_host(tensors: Sequence[Tensor]) -> Tensor:
    """Stack small tensors, of any device, in float64 on the host, with one transfer a device."""
    by_device: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(position)
    found = torch.empty((len(tensors), *tensors[0].shape), dtype=torch.float64, device="cpu")
    for positions in by_device.values():
        found[positions] = torch.stack([tensors[i].double() for i in positions]).cpu()
    return found
