"""Every batch's losses beside -log p of the labels that were drawn: by gradient, row by row, and by value.

The gradient of the losses by the outputs is what F is made of. It is taken from the graph that the pass will use, which
costs the loss's own backward pass, and compared with that of -log p on the same outputs and labels. So whatever acts on
some logits, labels or batches alone is seen where it acts. What reaches parameters past the outputs shows in
the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .likelihood import refusal
from .loss_probe import Evaluation, Probe
from .places import leaves_of
from .reading import Reading
from .row_scales import (
    FULL,
    HALVES,
    ROUNDED,
    MismatchError,
    Precision,
    RowScales,
    expected_scales,
    is_gradient,
    row_scales,
)


class LossCheck:
    """Compares the losses of one batch with -log p of labels.

    Args:
        reading: how the loss reads outputs and labels.
        loss_fn: the per-sample loss.
        parameters: the watched parameters.
        outputs: the batch's outputs, before the loss has seen them.
        targets: the given targets, or those of a sampler.
        number: the batch's, from 1.
    """

    def __init__(
        self,
        reading: Reading,
        loss_fn: Callable[[Any, Any], Tensor],
        parameters: Sequence[Tensor],
        outputs: Any,
        targets: Any,
        number: int,
    ) -> None:
        """See the class."""
        self.reading, self._loss_fn, self._parameters = reading, loss_fn, parameters
        self._targets, self._number = targets, number
        self.follow(outputs)
        self.logits = reading.logits.get(outputs).detach()
        self._given = reading.given(self.logits, targets)
        rows = reading.row_shape(self.logits)
        if self._given is None:
            self._known = torch.ones(rows, dtype=torch.bool, device=self.logits.device)
            self._own = None
        else:
            counts = reading.counts(self._given, reading.n_classes(self.logits))
            self._known = reading.alignment.to_rows(counts, rows, False)
            fill = -1 if reading.categorical else math.nan
            self._own = reading.alignment.to_rows(self._given, rows, fill)
        # How often each row counts: as the last draw for this batch showed, or else once where its label may.
        self._weights = self._known.to(torch.float64 if self.logits.dtype == torch.float64 else torch.float32)

    def follow(self, outputs: Any) -> None:
        """Take the outputs of another forward pass on the same batch, whose graph the losses to come will have."""
        self._outputs, found = outputs, leaves_of(outputs)
        self._parts = [found[index] for index in self.reading.logits.indices]
        self._versions = [_version(part) for part in self._parts]

    @cached_property
    def _probe(self) -> Probe:
        """Evaluates the loss on other logits and labels."""
        return Probe(self.reading, self._loss_fn, self._outputs, self._targets, self._parameters, soft=False)

    @cached_property
    def _ever_used(self) -> Tensor:
        """The rows that count with some logits and labels."""
        return self._probe.ever_used(self.reading)

    def ignored(self, losses: Tensor, targets: Any, labels: Tensor | None) -> float | None:
        """Compare losses with -log p.

        Args:
            losses: [N], with their graph.
            targets: what they were computed from.
            labels: of each row; None: those in the targets.

        Returns:
            None if the losses are right; a class that the loss turns out to ignore, if this alone is wrong.

        Raises:
            ValueError: if they are not.
        """
        if not self._known.numel():
            return None
        if any(_version(part) != version for part, version in zip(self._parts, self._versions, strict=True)):
            raise ValueError(
                "loss_fn changes the model's outputs in place, so it cannot be compared with -log p: let it work on a "
                "copy (outputs.clone())"
            )
        labels = self._own if labels is None else labels.reshape(self._known.shape)
        assert labels is not None
        gradient = self._arriving(losses)
        half = {losses.dtype, self.logits.dtype} & set(HALVES)
        precision = ROUNDED if half else FULL
        right, nll = is_gradient(self.reading, self.logits, labels, self._weights, gradient, precision)
        if bool(right & self._is_value(nll, self._weights, losses, precision)):
            return None
        if not bool(torch.isfinite(losses.detach()).all() & torch.isfinite(gradient).all()):
            return None  # which has an error of its own
        closer = _Closer(self, self._rows(labels, gradient, precision), losses, targets, precision)
        try:
            return closer.ignored()
        except MismatchError as error:
            raise ValueError(refusal(self.reading.likelihood, error, closer.values(), self._number)) from error

    def _arriving(self, losses: Tensor) -> Tensor:
        """Return the gradient of all losses by the logits."""
        wanted = [part for part in self._parts if part.requires_grad and losses.requires_grad]
        with torch._C.DisableTorchFunctionSubclass():
            ones = torch.ones_like(losses)
            found = torch.autograd.grad(losses, wanted, ones, retain_graph=True, allow_unused=True) if wanted else ()
            arrived = iter(found)
            filled = [next(arrived) if part.requires_grad and wanted else None for part in self._parts]
            whole = [torch.zeros_like(p) if g is None else g for g, p in zip(filled, self._parts, strict=True)]
            return (whole[0] if len(whole) == 1 else torch.stack(whole, 1)).detach()

    def _rows(self, labels: Tensor, gradient: Tensor, precision: Precision) -> RowScales:
        """Compare a gradient with that of -log p."""
        known = self._known
        found = row_scales(self.reading, self.logits, labels, known, gradient, precision)
        if self.reading.normalised and bool((found.excess > 1).any()):
            found = row_scales(self.reading, self.logits, labels, known, gradient, precision, True)
        return found

    def _is_value(self, nll: Tensor, weights: Tensor, losses: Tensor, precision: Precision) -> Tensor:
        """Tell whether the losses add up to -log p of the rows, each of which counts so often (bool, 0-d).

        Where the first dimension may be that of samples, each sample's loss must.
        """
        apart = len(weights) == len(losses)
        found, expected, weight = (
            t.double().reshape(len(losses) if apart else 1, -1).sum(1)
            for t in (losses.detach(), weights * nll, weights)
        )
        differs = found - expected
        if self.reading.likelihood == "gaussian":
            constant = weight * (math.log(2 * math.pi) / 2)
            differs = torch.minimum(differs.abs(), (differs - constant).abs())
        tolerance = 1e-5 if precision is FULL else precision.tolerance
        return (differs.abs() <= tolerance * (expected.abs() + weight)).all()


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


class _Closer:
    """A closer look at losses that are not plainly the sum of -log p: means, masks, offsets, half precision."""

    def __init__(self, check: LossCheck, found: RowScales, losses: Tensor, targets: Any, precision: Precision) -> None:
        """See :meth:`LossCheck.ignored`."""
        self._check, self._found, self._losses, self._precision = check, found, losses, precision
        self._targets = targets

    def ignored(self) -> float | None:
        """See :meth:`LossCheck.ignored`.

        Raises:
            MismatchError: if the loss is not -log p.
        """
        try:
            return self._ignored()
        except MismatchError:
            if self._precision is FULL:
                raise
        again = self._apart()  # in float32, where the loss takes that
        gradient = again.gradient(torch.ones_like(again.losses))
        self._found = self._check._rows(self._found.labels, gradient, again.precision)
        return self._ignored()

    def _apart(self) -> Evaluation:
        """Evaluate the loss on the same outputs and labels, apart from the graph of the pass.

        Raises:
            MismatchError: if it depends on parameters.
        """
        check = self._check
        given = self._found.labels if check._given is None else check._given  # whose shape counts
        return check._probe.evaluate(self._targets, given, check.logits)

    def _check_offset(self) -> None:
        """Check losses whose gradient is right but not their values: an offset that depends on nothing is no matter.

        Raises:
            MismatchError: if they depend on parameters or on outputs other than the logits, or if what is one sample's
                is in the losses of several.
        """
        again, reading, probe = self._apart(), self._check.reading, self._check._probe
        again.gradient(torch.ones_like(again.losses))
        if again.losses.dtype in HALVES:  # whose gradients cannot be told apart
            return
        samples = probe.samples(again, reading)
        generator = torch.Generator(samples.device).manual_seed(3)
        weights = 1 + torch.rand(len(again.losses), generator=generator, dtype=torch.float64, device=samples.device)
        plain, weighted = (probe.by_row(again, reading, w) for w in (torch.ones_like(weights), weights))
        away = (weighted - weights[samples].unsqueeze(-1) * plain).abs().amax(-1)
        if bool((away > 20 * again.precision.tolerance * plain.abs().amax(-1))[self._found.certain].any()):
            raise MismatchError("the losses of several samples hold -log p of one sample's label")

    def _ignored(self) -> float | None:
        """Look at the gradient in one precision."""
        found, known, check = self._found, self._found.known, self._check
        excess = float(found.excess.amax())
        if not excess <= 1:
            raise MismatchError("its gradient by the outputs is another one")
        unused, used = found.unused, known
        if bool(unused.any()):
            ever = check._ever_used
            dropped = unused & ever
            if bool(dropped.any()):
                return self._label(dropped, ever)
            used = known & ever
        reading, losses = check.reading, self._losses
        n_labels = known.numel() if check._given is None else check._given.numel()
        scales = expected_scales(found, used, reading, check.logits, n_labels, len(losses), self._samples)
        weights, nll = torch.where(used, scales, 0), torch.where(used, found.nll, 0)
        if not bool(check._is_value(nll, weights, losses, self._precision)):
            self._check_offset()
        check._weights = weights.to(check._weights)
        return None

    def _samples(self) -> Tensor:
        """Return which sample each row belongs to."""
        probe = self._check._probe
        return probe.samples(probe.own(0), self._check.reading)

    def _label(self, dropped: Tensor, ever: Tensor) -> float:
        """Return the one class that all rows have which do not count, if the loss ignores it whatever the logits.

        Raises:
            MismatchError: if there is another reason.
        """
        labels, reading = self._found.labels[dropped].unique(), self._check.reading
        if reading.categorical and reading.ignored is None and len(labels) == 1:
            counting = ever & self._found.certain & ~self._found.unused
            label = int(labels[0])
            counts = bool((self._found.labels[counting] == label).any())
            if not counts and not bool((self._check._probe.ever_used(reading, label) & ever).any()):
                return label
        raise MismatchError("which rows of the outputs count depends on the outputs or on the labels drawn")

    def values(self) -> str:
        """Say what the loss is for the sample where it differs most, and what -log p is."""
        found, losses = self._found, self._losses.detach().double()
        if found.known.shape[0] != len(losses):
            return ""
        nll = torch.where(found.known, found.nll.double(), 0).reshape(len(losses), -1)
        counts = found.known.reshape(len(losses), -1).sum(1).clamp_min(1)
        sums = nll.sum(1)
        expected = min(sums, sums / counts, key=lambda e: float((losses - e).abs().median()))
        worst = int((losses - expected).abs().argmax())
        of = int(found.excess.reshape(len(losses), -1).amax(1).argmax())
        if abs(float(losses[worst] - expected[worst])) <= 1e-3 * abs(float(expected[worst])):
            return f"for sample {of} the loss is {float(losses[of]):.5g} as -log p is, but not its gradient. "
        return f"for sample {worst} the loss is {float(losses[worst]):.5g}, -log p is {float(expected[worst]):.5g}. "
