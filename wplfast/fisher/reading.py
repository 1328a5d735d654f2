"""How a loss reads outputs and targets: what a label is, where it lies, and which row of the outputs it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .alignment import IN_PLACE, Alignment, alignments
from .places import Place, label_places, leaves_of, logits_places


@dataclass(frozen=True)
class Reading:
    """One way to read outputs and targets.

    A *row* is what one label is drawn from: a vector of logits along ``dim``, or one logit or mean.

    Attributes:
        likelihood: "categorical", "bernoulli" or "gaussian".
        logits: where the logits (or means) lie in the outputs.
        dim: the dimension of the classes (categorical).
        labels: where the labels lie in the targets; None: labels are the targets, in the shape of the rows.
        one_hot: labels are vectors along ``dim``, as soft labels are.
        alignment: which label belongs to which row.
        ignored: a label within the range of labels that the loss does not count, such as padding.
        normalised: the logits are log-probabilities, of which the loss may be the negative.
        tried: [C]: classes that the loss was evaluated on, so that ``ignored`` cannot be another of these.
    """

    likelihood: str
    logits: Place
    dim: int
    labels: Place | None
    one_hot: bool = False
    alignment: Alignment = IN_PLACE
    ignored: float | None = None
    normalised: bool = False
    tried: Tensor | None = field(default=None, compare=False)

    @property
    def categorical(self) -> bool:
        """Whether a row is a vector of logits."""
        return self.likelihood == "categorical"

    def row_shape(self, logits: Tensor) -> tuple[int, ...]:
        """Return the shape that the rows of the logits have."""
        shape = list(logits.shape)
        if self.categorical:
            del shape[self.dim]
        return tuple(shape)

    def given(self, logits: Tensor, targets: Any) -> Tensor | None:
        """Return the given labels, int64 or in the logits' dtype (one-hot: a class, or -1 for a row that is none)."""
        if self.labels is None or max(self.labels.indices) >= len(leaves_of(targets)):
            return None
        given = self.labels.get(targets)
        if self.one_hot:
            return _classes(given, self.dim) if given.shape == logits.shape else None
        if not given.dim() or not self.alignment.fits(self.row_shape(logits), given.shape):
            return None
        return given.long() if self.categorical else given.to(logits.dtype)

    def fits(self, outputs: Any, targets: Any) -> bool:
        """Tell whether another batch can be read in this way."""
        if max(self.logits.indices) >= len(leaves_of(outputs)):
            return False
        return self.labels is None or self.given(self.logits.get(outputs), targets) is not None

    def counts(self, labels: Tensor, n_classes: int) -> Tensor:
        """Tell which labels can count: those of the likelihood's range that the loss does not ignore."""
        if self.categorical:
            known = (labels >= 0) & (labels < n_classes)
        elif self.likelihood == "bernoulli":
            known = (labels >= 0) & (labels <= 1)
        else:
            known = ~labels.isnan()
        return known if self.ignored is None else known & (labels != self.ignored)

    def targets(self, logits: Tensor, targets: Any, labels: Tensor, *, of_rows: bool) -> Any:
        """Return the targets with other labels where the given ones count.

        Args:
            logits: the logits.
            targets: the given targets.
            labels: for each row (``of_rows``), else in the given labels' shape.
            of_rows: see labels.
        """
        given = self.given(logits, targets)
        if given is None:
            blank = labels.new_zeros(labels.shape)
            return self._put(logits, targets, self.alignment.to_labels(labels, blank) if of_rows else labels, None)
        arranged = self.alignment.to_labels(labels, given) if of_rows else labels
        counts = self.counts(given, self.n_classes(logits))
        return self._put(logits, targets, torch.where(counts, arranged, given), counts)

    def n_classes(self, logits: Tensor) -> int:
        """Return the number of classes."""
        return logits.shape[self.dim] if self.categorical else 0

    def _put(self, logits: Tensor, targets: Any, labels: Tensor, counts: Tensor | None) -> Any:
        """Put labels into their place, in the form that the given ones have."""
        if self.labels is None:
            return labels
        given = self.labels.get(targets)
        if self.one_hot:
            vectors = torch.zeros_like(given).movedim(self.dim, -1)
            vectors.scatter_(-1, labels.clamp_min(0).unsqueeze(-1), 1)
            if counts is not None:
                vectors = torch.where(counts.unsqueeze(-1), vectors, given.movedim(self.dim, -1))
            return self.labels.put(targets, vectors.movedim(-1, self.dim))
        return self.labels.put(targets, labels)


def readings(likelihood: str, outputs: Any, targets: Any) -> list[Reading]:
    """List ways to read outputs and targets, likely ones first; alignments are for the loss to tell.

    Raises:
        TypeError: if the outputs hold no floating point tensor.
        ValueError: if their shape does not suit the likelihood.
    """
    places = logits_places(outputs)
    if not places:
        raise TypeError(f"outputs must be a tensor, hold tensors or have .logits, got {type(outputs).__name__}")
    found: list[tuple[bool, Reading]] = []  # whether labels lie as rows do
    for place in places:
        logits = place.get(outputs)
        shape = logits.shape
        dims = [-1]
        if likelihood == "categorical":
            dims = [dim for dim in (-1, 1)[: len(shape) - 1] if shape[dim] > 1]
        if not dims and place is places[-1]:
            raise ValueError(
                f"likelihood='categorical' needs logits [N, ..., C] of two classes or more, got {list(shape)}: use "
                "likelihood='bernoulli' for one logit, 'gaussian' for a mean"
            )
        for dim in dims:
            whole, are_labels = Reading(likelihood, place, dim, None), False
            rows = whole.row_shape(logits)
            for labels in label_places(targets, len(place.indices) > 1, not whole.categorical):
                given = labels.get(targets)
                if whole.categorical and given.is_floating_point() and given.shape == shape:
                    found.append((True, replace(whole, labels=labels, one_hot=True)))
                elif first := next(alignments(rows, given.shape), None):
                    found.append((first == IN_PLACE, replace(whole, labels=labels, alignment=first)))
                else:
                    continue
                are_labels = are_labels or isinstance(targets, Tensor)
            if not are_labels:  # drawn targets have the form of the given ones wherever that can be read
                found.append((False, whole))
    return [reading for _, reading in sorted(found, key=lambda pair: not pair[0])]


def _classes(vectors: Tensor, dim: int) -> Tensor:
    """Return the largest class of each row of soft labels, -1 for rows that are no distribution."""
    return torch.where((vectors.sum(dim) - 1).abs() < 0.1, vectors.argmax(dim), -1)
