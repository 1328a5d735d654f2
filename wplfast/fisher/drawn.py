"""The targets of ``fisher_type="mc"`` and ``"exact"``: drawn, or one after the other, as the loss reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .likelihood import fit
from .loss_check import LossCheck
from .places import leaves_of, replaced
from .reading import Reading, readings
from .sampler_check import check_sampler
from .sampling import Likelihood, draw

logger = logging.getLogger(__name__)


class Swapped(NamedTuple):
    """Targets for logits of which two classes change places in some rows: the loss ignores the one drawn."""

    targets: Any
    rows: Tensor  # bool


class Term(NamedTuple):
    """One draw for a batch, or one of all possible targets.

    Attributes:
        targets: what the loss is given.
        share: what its squared gradients count: a number, or one for each sample.
        labels: of each row; None: those in the targets.
    """

    targets: Any
    share: Tensor | float = 1.0
    labels: Tensor | None = None


class DrawnTargets:
    """Makes the targets of every batch of a pass, and finds in the first one how the loss reads them.

    Args:
        loss_fn: the per-sample loss.
        likelihood: a likelihood's name, or a sampler.
        exact: all targets, with their probabilities; otherwise ``mc_samples`` draws.
        mc_samples: draws per sample.
        generator: source of randomness.
        parameters: the watched parameters.
        note: called with what could not be checked.

    Raises:
        ValueError: if the likelihood is unknown, or has no finite set of targets where ``exact`` asks for it.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        likelihood: Likelihood,
        exact: bool,
        mc_samples: int,
        generator: torch.Generator,
        parameters: Sequence[Tensor],
        note: Callable[[str], None],
    ) -> None:
        """See the class."""
        if not callable(likelihood) and likelihood not in ("categorical", "bernoulli", "gaussian"):
            raise ValueError(
                f"likelihood must be 'categorical', 'bernoulli', 'gaussian' or a sampler, got {likelihood!r}"
            )
        if exact and likelihood not in ("categorical", "bernoulli"):
            raise ValueError(
                "fisher_type='exact' sums over all targets of likelihood 'categorical' or 'bernoulli', got "
                f"{likelihood if isinstance(likelihood, str) else 'a sampler'}; use fisher_type='mc'"
            )
        self.loss_fn, self.likelihood, self.generator, self.parameters = loss_fn, likelihood, generator, parameters
        self.mc_samples, self.exact = mc_samples, exact
        self._reading: Reading | None = None
        self._all_tried = False  # the loss was evaluated on labels of all classes
        self._factor = 1.0  # of the losses: shares sum to 1, but the Fishers of several labels add up
        self._note = note
        self._n_batches = 0
        self._check: LossCheck | None = None  # of the batch at hand

    def apart(self, outputs: Any) -> Any:
        """Return the outputs as tensors of their own, whose gradient is asked for without a call of the model's hooks.

        FSDP2 gathers parameters in such hooks, and takes their end for that of the backward pass.
        """
        taken = {n: t.view_as(t) for n, t in enumerate(leaves_of(outputs)) if t.requires_grad and not t.is_nested}
        return replaced(outputs, taken) if taken else outputs

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the losses of targets of this class's making."""
        losses = self._likelihood_loss(outputs, targets)
        return losses if self._factor == 1 else losses * self._factor

    def _likelihood_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the losses that should be -log p."""
        if isinstance(targets, Swapped):
            assert self._reading is not None
            return self.loss_fn(_swapped(self._reading, outputs, targets.rows), targets.targets)
        return self.loss_fn(outputs, targets)

    def _checking(self, reading: Reading, outputs: Any, targets: Any) -> LossCheck:
        """Return what compares the losses of a batch with -log p."""
        return LossCheck(reading, self._likelihood_loss, self.parameters, outputs, targets, self._n_batches)

    def checked(self, outputs: Any, targets: Any, term: Term, losses: Tensor) -> tuple[Term, Tensor]:
        """Compare a term's losses with -log p of its labels, on the outputs that there are.

        Args:
            outputs: the model's outputs.
            targets: the given targets.
            term: the term.
            losses: its losses.

        Returns:
            The term and its losses, or others where the loss turns out to ignore a class.

        Raises:
            ValueError: if the losses are not -log p, where this library draws the labels.
        """
        if callable(self.likelihood):
            self._check_draw(outputs, term, losses)
            return term, losses
        assert self._check is not None
        plain = losses if self._factor == 1 else losses / self._factor
        ignored = self._check.ignored(plain, term.targets, term.labels)
        if ignored is None or term.labels is None:
            return term, losses
        reading = replace(self._check.reading, ignored=ignored)
        self._reading, self._check = reading, self._checking(reading, outputs, targets)
        return self._again(outputs, targets, term)

    def follow(self, outputs: Any) -> None:
        """Take the outputs of a batch that was run again."""
        if self._check is not None:
            self._check.follow(outputs)

    def terms(self, outputs: Any, targets: Any) -> Iterator[Term]:
        """Yield the terms of a batch."""
        self._n_batches += 1
        if callable(self.likelihood):
            if self._n_batches == 1:
                self._reading, why = check_sampler(
                    self.likelihood, self.loss_fn, outputs, self.generator.device, self.parameters
                )
                if why:
                    self._note(f"the sampler: {why}")
            for _ in range(self.mc_samples):
                with torch.no_grad():  # targets are data, whatever they were computed from
                    drawn = self.likelihood(outputs, self.generator)
                yield Term(drawn, 1 / self.mc_samples)
            return
        reading = self._read(self.likelihood, outputs, targets)
        self._check = self._checking(reading, outputs, targets)
        logits = self._check.logits
        if not self.exact:
            for rows in draw(logits, self.likelihood, self.generator, reading.dim, self.mc_samples):
                yield Term(self._targets(reading, logits, targets, rows), 1 / self.mc_samples, rows)
        elif logits.dim() > 2 or len(reading.logits.indices) > 1:
            raise ValueError(
                f"fisher_type='exact' needs outputs [N, C], got {list(logits.shape)}; use fisher_type='mc'"
            )
        elif reading.categorical:
            probabilities = logits.double().softmax(1).nan_to_num(nan=0.0)  # the losses are NaN there too
            for c, share in enumerate(probabilities.unbind(1)):
                # Classes that cannot be may be masked by -inf: their loss is, too, and counts nothing.
                rows = torch.where(share > 0, c, logits.argmax(1))
                yield Term(self._targets(reading, logits, targets, rows), share, rows)
        else:
            yield from self._bernoulli(reading, logits, targets)

    def _bernoulli(self, reading: Reading, logits: Tensor, targets: Any) -> Iterator[Term]:
        """Yield 0 and 1 for one label after the other, the others at their mean, where their gradient is zero."""
        means = logits.sigmoid()
        n_labels = logits[:1].numel()
        self._factor = n_labels**0.5
        for k in range(n_labels):
            share = means.reshape(len(means), -1)[:, k].double().nan_to_num(nan=0.0)
            for value in (0.0, 1.0):
                rows = means.clone()
                rows.view(len(means), -1)[:, k] = value
                of_value = share if value else 1 - share
                yield Term(self._targets(reading, logits, targets, rows), of_value / n_labels, rows)

    def _again(self, outputs: Any, targets: Any, term: Term) -> tuple[Term, Tensor]:
        """Make a term's targets again, with the reading of now, and check their losses."""
        assert self._check is not None
        assert term.labels is not None
        made = self._targets(self._check.reading, self._check.logits, targets, term.labels)
        term = term._replace(targets=made)
        losses = self.loss(outputs, made)
        return self.checked(outputs, targets, term, losses)

    def _check_draw(self, outputs: Any, term: Term, losses: Tensor) -> None:
        """Compare the losses of a sampler's draw, if they were -log p of a known likelihood in all batches so far."""
        reading = self._reading
        if reading is None:
            return
        try:
            if reading.fits(outputs, term.targets):
                self._checking(reading, outputs, term.targets).ignored(losses, term.targets, None)
                return
        except ValueError as error:
            logger.debug("the loss of a sampler's draw: %s", error)
        self._reading = None
        self._note(
            "the sampler: its loss is -log p of a known likelihood on numbers of this library's, but not on all outputs"
        )

    def _read(self, likelihood: str, outputs: Any, targets: Any) -> Reading:
        """Return how the loss reads this batch."""
        known = self._reading
        if known is not None and known.fits(outputs, targets) and not self._may_be_padding(known, outputs, targets):
            return known
        soft = self.exact and likelihood == "bernoulli"
        try:
            found = fit(likelihood, self.loss_fn, outputs, targets, self.parameters, soft)
        except ValueError:
            if not soft:
                raise
            found = self._hard(outputs, targets)
        if found is None:  # no label of this batch counts: the next one is asked
            return known or readings(likelihood, outputs, targets)[0]
        if known is not None and found.tried is not None and known.tried is not None:
            ignored = known.ignored if found.ignored is None else found.ignored
            found = replace(found, ignored=ignored, tried=found.tried | known.tried)
        self._all_tried = found.tried is None or bool(found.tried.all())
        self._reading = found
        return found

    def _may_be_padding(self, reading: Reading, outputs: Any, targets: Any) -> bool:
        """Tell whether a sequence starts or ends with a class, twice, that the loss was never tried on."""
        if reading.tried is None or self._all_tried:
            return False
        given = reading.given(reading.logits.get(outputs), targets)
        if given is None or given.dim() < 2 or given.shape[-1] < 2:
            return False
        pairs = torch.stack([given[..., :2], given[..., -2:]]).flatten(0, -2)
        counts = reading.counts(pairs[:, 0], len(reading.tried)) & (pairs[:, 0] == pairs[:, 1])
        return bool((counts & ~reading.tried[pairs[:, 0].clamp(0, len(reading.tried) - 1)]).any())

    def _hard(self, outputs: Any, targets: Any) -> Reading | None:
        """Return how the loss reads labels 0 and 1 alone, if there is one logit for each sample.

        Raises:
            ValueError: if there are several.
        """
        found = fit("bernoulli", self.loss_fn, outputs, targets, self.parameters)
        if found is not None and found.logits.get(outputs)[:1].numel() > 1:
            raise ValueError(
                "fisher_type='exact' with several logits for each sample needs a loss that takes labels between 0 and "
                "1, as binary_cross_entropy_with_logits does; use fisher_type='mc'"
            )
        return found

    def _targets(self, reading: Reading, logits: Tensor, targets: Any, rows: Tensor) -> Any:
        """Return targets with a label for each row."""
        if reading.ignored is None or not reading.categorical:
            return reading.targets(logits, targets, rows, of_rows=True)
        ignored = rows == reading.ignored
        shown = torch.where(ignored, _substitute(reading), rows)
        return Swapped(reading.targets(logits, targets, shown, of_rows=True), ignored)


def _substitute(reading: Reading) -> int:
    """Return a class that the loss does not ignore."""
    return 0 if reading.ignored else 1


def _swapped(reading: Reading, outputs: Any, rows: Tensor) -> Any:
    """Let the ignored class and another one change places in some rows: -log p of the one is that of the other then."""
    assert reading.ignored is not None
    logits = reading.logits.get(outputs)
    pair = [int(reading.ignored), _substitute(reading)]
    first, second = (logits.select(reading.dim, c) for c in pair)
    changed = torch.stack([torch.where(rows, second, first), torch.where(rows, first, second)], reading.dim)
    index = torch.tensor(pair, device=logits.device)
    return reading.logits.put(outputs, logits.index_copy(reading.dim, index, changed))
