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

#: Largest difference from a gradient of -log p, relative to it, for float32 and for types that only run in half.
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2


class MismatchError(ValueError):
    """The loss is not the likelihood's -log p of its labels."""


@dataclass
class Evaluation:
    """The loss on given labels, with logits of ours.

    Attributes:
        losses: [N].
        labels: in their own shape; those that do not count are out of the likelihood's range.
        gradient: ``gradient(weights)`` is that of the weighted sum of losses by the logits.
        tolerance: what rounding may make of the gradient.
    """

    losses: Tensor
    labels: Tensor
    gradient: Callable[[Tensor], Tensor]
    tolerance: float


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

    def own(self, first: int) -> Evaluation:
        """Evaluate the loss on labels of our own where the given ones count."""
        return self.own_evaluation(self.own_labels(first))

    def own_evaluation(self, labels: Tensor) -> Evaluation:
        """Evaluate the loss on labels, but for those that do not count."""
        targets = self.reading.targets(self.logits, self.targets, labels, of_rows=False)
        if self.given is not None:
            labels = torch.where(
                self.reading.counts(self.given, self.reading.n_classes(self.logits)), labels, self.given
            )
        return self.evaluate(targets, labels)

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

    def evaluate(self, targets: Any, labels: Tensor) -> Evaluation:
        """Evaluate the loss.

        Raises:
            MismatchError: if it depends on parameters or on outputs other than the logits.
        """
        half = self.logits.dtype in (torch.bfloat16, torch.float16)
        try:
            return self._evaluate(targets, labels, torch.float32 if half else self.logits.dtype, TOLERANCE)
        except Exception:
            if not half:
                raise
        return self._evaluate(targets, labels, self.logits.dtype, HALF_TOLERANCE)

    def _evaluate(self, targets: Any, labels: Tensor, dtype: torch.dtype, tolerance: float) -> Evaluation:
        """Evaluate the loss with logits of a type."""
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            shape = [1] * self.logits.dim()
            if self.reading.categorical:
                shape[self.reading.dim] = -1
                shown = self.base.to(dtype).view(shape).expand(self.logits.shape)
            else:
                shown = self.base.to(dtype)
            leaf = shown.detach().requires_grad_()
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
                check_losses(losses)

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
        return Evaluation(losses, labels, gradient, tolerance)

    # ---- the likelihood's gradient ---------------------------------------------------------------------------------

    def arranged(self, gradient: Tensor, shape: Sequence[int]) -> Tensor:
        """Bring a gradient to the rows' shape (with classes last, for categorical)."""
        if not self.reading.categorical:
            return gradient.reshape(shape)
        return gradient.movedim(self.reading.dim, -1).reshape(*shape, -1)

    def scales(self, evaluation: Evaluation, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Return how often -log p of each row's label is in the loss (0: not at all), labels, and which may count.

        Raises:
            MismatchError: if the gradient is not that of -log p, summed over rows or averaged.
        """
        shape = reading.alignment.row_shape(self.rows, evaluation.labels.shape)
        labels = reading.alignment.to_rows(evaluation.labels, self.rows, -1 if reading.categorical else float("nan"))
        known = reading.counts(labels, reading.n_classes(self.logits))
        found = self.arranged(evaluation.gradient(torch.ones_like(evaluation.losses)), shape)
        if reading.categorical:
            scales, rest = self._categorical(found, labels.clamp(0, found.shape[-1] - 1), known)
            noise = torch.ones_like(scales)
        else:
            mean = self.base.reshape(shape).to(found)
            expected = (mean.sigmoid() if reading.likelihood == "bernoulli" else mean) - labels.to(found)
            scales = torch.where(known, found / expected, 0)
            rest = torch.where(known, 0, found)
            noise = (1e-3 * (labels.to(found).abs() + 1) / expected.abs()).clamp_min(1)
        floor = 1e-3 * found.abs().max() if found.numel() else 0.0
        if not bool((rest.abs() <= evaluation.tolerance * scales.abs().clamp_min(floor)).all()):
            raise MismatchError("")
        scales = torch.where(scales.abs() <= evaluation.tolerance * floor, 0, scales)
        self._check_scales(evaluation, scales, shape, noise)
        return scales, labels, known

    def _categorical(self, found: Tensor, labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Divide a gradient by p - e_y, or by -e_y where outputs are log p; return also each row's rest."""
        index = labels.unsqueeze(-1)
        at_label = torch.where(known, found.gather(-1, index).squeeze(-1), 0)
        p = self.base.softmax(0).to(found)
        best: tuple[Tensor, Tensor] | None = None
        for weight in (1.0, 0.0) if self.normalised else (1.0,):
            scales = -at_label / (1 - weight * p[labels])
            rest = torch.addcmul(found, scales.unsqueeze(-1), p, value=-weight)
            rest = torch.linalg.vector_norm(rest.scatter_add_(-1, index, scales.unsqueeze(-1)), 1, -1)
            if best is None or bool(rest.max() < best[1].max()):
                best = scales, rest
        assert best is not None
        return best

    def _check_scales(self, evaluation: Evaluation, scales: Tensor, shape: Sequence[int], noise: Tensor) -> None:
        """Check that rows count once, or one over the number of a sample's tokens."""
        counted = scales != 0
        values = scales[counted]
        tolerance = 10 * evaluation.tolerance * noise[counted]

        def equal(expected: Tensor | float) -> bool:
            return bool(((values / expected - 1).abs() <= tolerance).all())

        if equal(1.0):
            return
        n_samples = len(evaluation.losses)
        weights = torch.arange(1, n_samples + 1, device=values.device, dtype=torch.float64)
        weighted = self.arranged(evaluation.gradient(weights), shape)
        plain = self.arranged(evaluation.gradient(torch.ones_like(weights)), shape)
        if self.reading.categorical:
            plain, place = plain.abs().max(-1)
            weighted = weighted.gather(-1, place.unsqueeze(-1)).squeeze(-1).abs()
        samples = (weighted[counted] / plain[counted]).abs().round().long().sub(1).clamp(0, n_samples - 1)
        per_sample = torch.bincount(samples, minlength=n_samples)[samples]
        wide = len(self.logits.shape) > 2
        features = {1} if self.reading.categorical else {self.logits.shape[1], self.logits.shape[-1]} if wide else set()
        totals = {scales.numel(), evaluation.labels.numel()}
        totals |= {scales.numel() - scales.numel() // size for size in scales.shape[1:]}
        for width in features:
            if equal(width / per_sample) or any(equal(width * n_samples / total) for total in totals if total):
                return
        if equal(values[0]):
            raise MismatchError(f"the loss is {float(values[0]):.4g} times -log p")
        raise MismatchError("the loss is -log p times a factor that differs from label to label")


def _is_normalised(logits: Tensor, dim: int) -> bool:
    """Tell whether outputs are log-probabilities."""
    totals = logits.float().logsumexp(dim)
    return bool((totals[totals.isfinite()].abs() < 1e-2).all()) and bool(totals.isfinite().any())
