"""The targets of ``fisher_type="mc"`` and ``"exact"``: drawn, or one after the other, as the loss reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .likelihood import fit
from .reading import Reading, readings
from .sampler_check import check_sampler
from .sampling import Likelihood, draw


class Swapped(NamedTuple):
    """Targets for logits of which two classes change places in some rows: the loss ignores the one drawn."""

    targets: Any
    rows: Tensor  # bool


class DrawnTargets:
    """Makes the targets of every batch of a pass, and finds in the first one how the loss reads them.

    Args:
        loss_fn: the per-sample loss.
        likelihood: a likelihood's name, or a sampler.
        exact: all targets, with their probabilities; otherwise ``mc_samples`` draws.
        mc_samples: draws per sample.
        generator: source of randomness.
        parameters: the watched parameters.

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
        self._checked = False  # a sampler

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the losses of targets of this class's making."""
        if isinstance(targets, Swapped):
            assert self._reading is not None
            return self.loss_fn(_swapped(self._reading, outputs, targets.rows), targets.targets)
        losses = self.loss_fn(outputs, targets)
        return losses if self._factor == 1 else losses * self._factor

    def terms(self, outputs: Any, targets: Any) -> Iterator[tuple[Any, Tensor | float]]:
        """Yield targets, and what their losses' squared gradients count: a number, or one for each sample."""
        if callable(self.likelihood):
            if not self._checked:
                check_sampler(self.likelihood, self.loss_fn, outputs, self.generator.device, self.parameters)
                self._checked = True
            for _ in range(self.mc_samples):
                with torch.no_grad():  # targets are data, whatever they were computed from
                    drawn = self.likelihood(outputs, self.generator)
                yield drawn, 1 / self.mc_samples
            return
        reading = self._read(self.likelihood, outputs, targets)
        logits = reading.logits.get(outputs).detach()
        if not self.exact:
            for rows in draw(logits, self.likelihood, self.generator, reading.dim, self.mc_samples):
                yield self._targets(reading, logits, targets, rows), 1 / self.mc_samples
        elif logits.dim() > 2 or len(reading.logits.indices) > 1:
            raise ValueError(
                f"fisher_type='exact' needs outputs [N, C], got {list(logits.shape)}; use fisher_type='mc'"
            )
        elif reading.categorical:
            probabilities = logits.double().softmax(1).nan_to_num(nan=0.0)  # the losses are NaN there too
            for c, share in enumerate(probabilities.unbind(1)):
                # Classes that cannot be may be masked by -inf: their loss is, too, and counts nothing.
                rows = torch.where(share > 0, c, logits.argmax(1))
                yield self._targets(reading, logits, targets, rows), share
        else:
            yield from self._bernoulli(reading, logits, targets)

    def _bernoulli(self, reading: Reading, logits: Tensor, targets: Any) -> Iterator[tuple[Any, Tensor | float]]:
        """Yield 0 and 1 for one label after the other, the others at their mean, where their gradient is zero."""
        means = logits.sigmoid()
        n_labels = logits[:1].numel()
        self._factor = n_labels**0.5
        for k in range(n_labels):
            share = means.reshape(len(means), -1)[:, k].double().nan_to_num(nan=0.0)
            for value in (0.0, 1.0):
                rows = means.clone()
                rows.view(len(means), -1)[:, k] = value
                yield self._targets(reading, logits, targets, rows), (share if value else 1 - share) / n_labels

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
