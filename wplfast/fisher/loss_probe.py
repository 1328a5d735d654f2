"""A loss evaluated on logits and labels of our own, and its gradient compared with that of -log p."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capture.probe.graph import leaves
from .checks import check_losses
from .places import leaves_of, replaced
from .reading import Reading
from .row_scales import (
    FULL,
    HALF,
    HALVES,
    NONE,
    MismatchError,
    Precision,
    RowScales,
    are_normalised,
    expected_scales,
    row_scales,
)


@dataclass
class Evaluation:
    """The loss on given labels and logits.

    Attributes:
        losses: [N].
        labels: in their own shape; those that do not count are out of the likelihood's range.
        logits: in the outputs' shape.
        gradient: ``gradient(weights)`` is that of the weighted sum of losses by the logits.
        precision: what rounding may make of the gradient.
    """

    losses: Tensor
    labels: Tensor
    logits: Tensor
    gradient: Callable[[Tensor], Tensor]
    precision: Precision


class Probe:
    """Evaluates a loss on logits and labels of our own, on the first batch's shapes.

    Args:
        reading: where logits and labels lie.
        loss_fn: the per-sample loss.
        outputs: the first batch's outputs.
        targets: its targets.
        parameters: the watched parameters.
        soft: bernoulli: try labels between 0 and 1.
    """

    def __init__(
        self,
        reading: Reading,
        loss_fn: Callable[[Any, Any], Tensor],
        outputs: Any,
        targets: Any,
        parameters: Sequence[Tensor],
        soft: bool,
    ) -> None:
        """See the class."""
        self.soft = soft
        self.reading, self.loss_fn, self.targets = reading, loss_fn, targets
        self.outputs = outputs
        self.logits = reading.logits.get(outputs).detach()
        self.rows = reading.row_shape(self.logits)
        self.given = reading.given(self.logits, targets)
        self.labels_shape = self.rows if self.given is None else self.given.shape
        self.parameters = {id(p) for p in parameters}
        device = self.logits.device
        generator = torch.Generator(device).manual_seed(0)
        shape = (reading.n_classes(self.logits),) if reading.categorical else self.logits.shape
        base = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if reading.likelihood == "bernoulli":  # a loss of probabilities would end the process on a GPU
            base = base.sigmoid()
        self.normalised = reading.categorical and _is_normalised(self.logits, reading.dim)
        self.base = base.log_softmax(0) if self.normalised else base

    def own_labels(self, first: int) -> Tensor:
        """Make labels of which neighbours differ along every dimension; soft ones for a loss that must take them."""
        if self.reading.likelihood == "gaussian":
            device = self.logits.device
            generator = torch.Generator(device).manual_seed(1 + first)
            return torch.randn(self.labels_shape, generator=generator, device=device).to(self.logits.dtype)
        n_values = self.reading.n_classes(self.logits) or 2
        count, step = torch.full((), first, device=self.logits.device), 1
        for size in reversed(self.labels_shape):
            step += step % n_values == 0
            steps = torch.arange(size, device=self.logits.device) * step
            count = steps.view(-1, *[1] * count.dim()) + count
            step *= size
        labels = count % n_values
        if self.reading.categorical:
            return labels
        return labels.to(self.logits.dtype) * (0.5 if self.soft else 1.0) + (0.25 if self.soft else 0.0)

    def labels_that_count(self, labels: Tensor) -> Tensor:
        """Return labels with the given ones in place of those that do not count."""
        if self.given is None:
            return labels
        return torch.where(self.reading.counts(self.given, self.reading.n_classes(self.logits)), labels, self.given)

    def own(self, first: int) -> Evaluation:
        """Evaluate the loss on labels of our own where the given ones count."""
        return self.own_evaluation(self.own_labels(first))

    def own_evaluation(self, labels: Tensor) -> Evaluation:
        """Evaluate the loss on labels, but for those that do not count."""
        targets = self.reading.targets(self.logits, self.targets, labels, of_rows=False)
        return self.evaluate(targets, self.labels_that_count(labels))

    def of_rows(self, labels: Tensor, reading: Reading) -> Evaluation:
        """Evaluate the loss on labels for the rows, where the given ones count."""
        blank = torch.zeros(self.labels_shape, dtype=labels.dtype, device=labels.device)
        arranged = reading.alignment.to_labels(labels, blank)
        return self.own_evaluation(arranged)

    def second(self) -> Evaluation:
        """Evaluate the loss on the given labels, or on others of our own if it does not take those."""
        soft = self.reading.one_hot or (self.reading.categorical and self._given_is_float())
        if self.given is not None and not soft:
            try:
                return self.evaluate(self.targets, self.given)
            except Exception:  # placeholders that the loss does not take
                pass
        return self.own(1)

    def _given_is_float(self) -> bool:
        labels = self.reading.labels
        return labels is not None and labels.get(self.targets).is_floating_point()

    def evaluate(self, targets: Any, labels: Tensor, logits: Tensor | None = None) -> Evaluation:
        """Evaluate the loss.

        Args:
            targets: what it is given.
            labels: those in the targets.
            logits: in the outputs' shape; None: random ones, all rows the same where they are vectors.

        Raises:
            MismatchError: if it depends on parameters or on outputs other than the logits.
        """
        if logits is None:
            shape = [1] * self.logits.dim()
            if self.reading.categorical:
                shape[self.reading.dim] = -1
            logits = self.base.view(shape).expand(self.logits.shape) if self.reading.categorical else self.base
        half = self.logits.dtype in HALVES
        try:
            return self._evaluate(targets, labels, logits.to(torch.float32 if half else self.logits.dtype), FULL)
        except Exception:
            if not half:
                raise
        return self._evaluate(targets, labels, logits.to(self.logits.dtype), HALF)

    def _evaluate(self, targets: Any, labels: Tensor, logits: Tensor, precision: Precision) -> Evaluation:
        """Evaluate the loss with logits of a type."""
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            others = {
                number: tensor.detach().requires_grad_()
                for number, tensor in enumerate(leaves_of(self.outputs))
                if tensor.is_floating_point() and number not in self.reading.logits.indices
            }
            own = self.reading.logits.put(
                replaced(self.outputs, others), leaf.clone(memory_format=torch.contiguous_format)
            )
            losses = self.loss_fn(own, targets)
            if not (isinstance(losses, Tensor) and losses.dim() == 1 and not losses.requires_grad):
                check_losses(losses, own, targets)

        def gradient(weights: Tensor) -> Tensor:
            if not losses.requires_grad:
                return torch.zeros_like(leaf)
            found, *rest = torch.autograd.grad(
                losses, [leaf, *others.values()], weights.to(losses), retain_graph=True, allow_unused=True
            )
            if any(part is not None and bool(part.any()) for part in rest):
                raise MismatchError("the loss depends on outputs other than the logits, too")
            return torch.zeros_like(leaf) if found is None else found

        if losses.requires_grad and any(id(leaf) in self.parameters for leaf in leaves(losses)):
            raise MismatchError(
                "the loss depends on parameters in other ways than through the outputs (a penalty on them?)"
            )
        return Evaluation(losses, labels, logits, gradient, precision)

    # ---- the likelihood's gradient ---------------------------------------------------------------------------------

    def scales(self, evaluation: Evaluation, reading: Reading) -> RowScales:
        """Return how often -log p of each row's label is in the loss (0: not at all).

        Raises:
            MismatchError: if the gradient is not that of -log p, summed over rows or averaged.
        """
        try:
            return self._scales(evaluation, reading)
        except MismatchError as error:
            dtype = evaluation.losses.dtype
            if dtype not in HALVES or self.logits.dtype in HALVES:
                raise
            name = str(dtype).removeprefix("torch.")
            raise MismatchError(f"the loss is computed in {name}, with its rounding: compute it in float32") from error

    def _scales(self, evaluation: Evaluation, reading: Reading) -> RowScales:
        """Do the same without a hint at rounding."""
        labels, known = self._of_rows(evaluation.labels, reading)
        plain = evaluation.gradient(torch.ones_like(evaluation.losses))
        found = None
        for of_log_p in (False, True)[: 1 + self.normalised]:
            rows = row_scales(reading, evaluation.logits, labels, known, plain, evaluation.precision, of_log_p)
            if found is None or bool(rows.excess.amax() < found.excess.amax()):
                found = rows
        assert found is not None
        if not bool((found.excess <= 1).all()):
            raise MismatchError("")
        used = known & ~found.unused
        n_samples, n_labels = len(evaluation.losses), evaluation.labels.numel()
        expected_scales(
            found, used, reading, self.logits, n_labels, n_samples, lambda: self.samples(evaluation, reading)
        )
        return found._replace(scales=torch.where(used, found.scales, 0))

    def _of_rows(self, labels: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """Return the label of each row, and which may count."""
        arranged = reading.alignment.to_rows(labels, self.rows, -1 if reading.categorical else float("nan"))
        return arranged, reading.counts(arranged, reading.n_classes(self.logits))

    def samples(self, evaluation: Evaluation, reading: Reading) -> Tensor:
        """Return which sample each row belongs to, by a gradient whose samples are told apart (0 where none is)."""
        n_samples = len(evaluation.losses)
        numbers = torch.arange(1, n_samples + 1, device=evaluation.losses.device, dtype=torch.float64)
        weighted, plain = (self.by_row(evaluation, reading, w) for w in (numbers, torch.ones_like(numbers)))
        place = plain.abs().argmax(-1, keepdim=True)
        ratio = (weighted.gather(-1, place) / plain.gather(-1, place)).squeeze(-1)
        return ratio.nan_to_num(nan=1.0).abs().round().long().sub(1).clamp(0, n_samples - 1)

    def by_row(self, evaluation: Evaluation, reading: Reading, weights: Tensor) -> Tensor:
        """Return the gradient of weighted losses, in the rows' shape with all that belongs to a row last."""
        shape = reading.alignment.row_shape(self.rows, evaluation.labels.shape)
        return self._arranged(evaluation.gradient(weights), shape).double()

    def _arranged(self, gradient: Tensor, shape: Sequence[int]) -> Tensor:
        """Bring a gradient to the rows' shape, with all that belongs to a row last."""
        return (gradient.movedim(self.reading.dim, -1) if self.reading.categorical else gradient).reshape(*shape, -1)

    def ever_used(self, reading: Reading, label: float | None = None) -> Tensor:
        """Return which rows count with some logits: with labels that are probable, and with improbable ones.

        What depends on logits (losses that are clamped, examples that are left out because they are easy or hard) does
        not leave out the same rows in both of two evaluations, between which every row's label changes sides.

        Args:
            reading: how the loss reads outputs and labels.
            label: for all rows; None: labels of our own, others in each evaluation.
        """
        used = None
        for turn in (0, 1):
            labels = self.own_labels(turn)
            labels = self.labels_that_count(labels if label is None else torch.full_like(labels, label))
            arranged, known = self._of_rows(labels, reading)
            generator = torch.Generator(self.logits.device).manual_seed(2)
            sides = torch.randint(0, 2, arranged.shape, generator=generator, device=self.logits.device) == turn
            logits = self._on_sides(arranged, known, sides, reading)
            targets = self.reading.targets(self.logits, self.targets, labels, of_rows=False)
            evaluation = self.evaluate(targets, labels, logits)
            gradient = self._arranged(evaluation.gradient(torch.ones_like(evaluation.losses)), arranged.shape)
            level = gradient.abs().amax(-1)
            counted = level > NONE * level.amax() if level.numel() else level > 0
            used = counted if used is None else used | counted
        assert used is not None
        return used

    def _on_sides(self, labels: Tensor, known: Tensor, sides: Tensor, reading: Reading) -> Tensor:
        """Make logits with which some rows' labels are probable and those of others are not."""
        if reading.likelihood == "gaussian":
            shift = torch.where(sides, 0.1, 10.0).to(self.base)
            return (torch.where(known, labels.to(self.base), 0) + shift).reshape(self.logits.shape)
        if reading.likelihood == "bernoulli":
            return (torch.where(labels > 0.5, 1, -1) * torch.where(sides, 2.0, -8.0).to(self.base)).reshape(
                self.logits.shape
            )
        index = labels.clamp_min(0).unsqueeze(-1)
        rows = self.base.expand(*labels.shape, len(self.base)).clone()
        others = self.base.logsumexp(0)
        rows.scatter_(-1, index, torch.where(sides, others + 2, others - 8).unsqueeze(-1).to(rows))
        rows = rows.log_softmax(-1) if self.normalised else rows
        moved = list(self.logits.shape)
        moved.append(moved.pop(reading.dim))
        return rows.reshape(moved).movedim(-1, reading.dim)


def _is_normalised(logits: Tensor, dim: int) -> bool:
    """Tell whether outputs are log-probabilities, in all rows that are finite."""
    rows = logits.movedim(dim, -1)
    told = rows.logsumexp(-1).isfinite()
    return bool(told.any()) and bool((are_normalised(rows) | ~told).all())
