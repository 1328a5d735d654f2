"""What was measured about who owns which output, over all batches of a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .ownership import Axis, Codes, Ownership, Routed, Signature, Single, candidates, decode, matches
from .tap import Site

#: A site's key and the index of one of its outputs.
_Place: TypeAlias = tuple[tuple[Any, ...], int]

#: What a site's measurement may end in: owners of its outputs (None: zero gradient), probe again, or mixed samples.
Measured: TypeAlias = list[Ownership | None] | Literal["unmeasured", "mixed"]


class Measurement:
    """Templates of the sites seen so far, and the probing passes of the current batch."""

    def __init__(self) -> None:
        """Know nothing."""
        self.codes = Codes(0, torch.Generator())
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[_Place, Axis | Literal["routed"]] = {}
        self._dormant: set[_Place] = set()  # outputs whose gradient was zero so far: not worth a probing pass
        self._signatures: dict[_Place, list[Signature]] = defaultdict(list)

    def start_batch(self, n_samples: int) -> None:
        """Draw the codes of a batch."""
        self.codes = Codes(n_samples, self._generator)
        self.start_probing()

    def start_probing(self) -> None:
        """Forget the probing passes."""
        self._signatures = defaultdict(list)

    @property
    def has_dormant(self) -> bool:
        """Tell whether some output may need probing as soon as its gradient is not zero."""
        return bool(self._dormant)

    def passes_needed(self, sites: Sequence[Site]) -> int:
        """Return how many probing passes the sites of a batch need: none in steady state."""
        n_samples, needed = self.codes.n_samples, 0
        if n_samples == 1:
            return 0
        for site in sites:
            for index, shape in enumerate(site.shapes):
                place = (site.key, index)
                known = self._known.get(place)
                if known == "routed":
                    return self.codes.rounds
                if isinstance(known, Axis) and known.fit(shape, n_samples) is None:
                    del self._known[place]
                    known = None
                if known is None and place not in self._dormant:
                    needed = 1
        return needed

    def probe(self, site: Site, grads: Sequence[Tensor | None]) -> None:
        """Keep the projections of a probing pass, where something is to be measured."""
        for index, gradient in enumerate(grads):
            place = (site.key, index)
            if gradient is not None and not isinstance(self._known.get(place), Axis):
                self._signatures[place].append(Signature.of(at_least_1d(gradient), self.codes.n_samples))

    def owners(self, site: Site, grads: Sequence[Tensor | None]) -> Measured:
        """Return who owns each output, given its gradients of the collecting pass."""
        owners: list[Ownership | None] = []
        for index, gradient in enumerate(grads):
            if gradient is None:
                owners.append(None)
                continue
            place = (site.key, index)
            owner = self._owner(place, at_least_1d(gradient))
            if owner == "unmeasured":
                self._dormant.discard(place)
            if owner == "unmeasured" or owner == "mixed":
                return owner
            owners.append(None if owner == "zero" else owner)
        return owners

    def _owner(self, place: _Place, gradient: Tensor) -> Ownership | Literal["zero", "unmeasured", "mixed"]:
        """Return who owns one output, from what is known or from the probing passes."""
        n_samples = self.codes.n_samples
        if n_samples == 1:
            return Single()
        known = self._known.get(place)
        if isinstance(known, Axis):
            layout = known.fit(gradient.shape, n_samples)
            if layout is not None:
                return layout
            del self._known[place]
            known = None
        plain = Signature.of(gradient, n_samples)
        if plain.is_zero:
            if known is None:
                self._dormant.add(place)
            return "zero"
        coded = self._signatures.get(place)
        if not coded:
            return "unmeasured"
        if known is None:
            passing = self._structures(gradient.shape, coded[0], plain)
            if passing:
                if len(passing) == 1:  # several: too little of the gradient is nonzero to tell; measured again
                    self._known[place] = passing[0]
                layout = passing[0].fit(gradient.shape, n_samples)
                assert layout is not None
                return layout
            if len(coded) < self.codes.rounds:
                self._known[place] = "routed"
                return "unmeasured"
        owner = decode(coded, plain, self.codes) if len(coded) == self.codes.rounds else None
        if owner is None:
            self._known.pop(place, None)
            return "mixed"
        self._known[place] = "routed"
        return Routed(owner, n_samples)

    def _structures(self, shape: torch.Size, coded: Signature, plain: Signature) -> list[Axis]:
        """Return the first two templates that the measurement admits."""
        found: list[Axis] = []
        weights = self.codes.weights(0)
        for axis in candidates(shape, self.codes.n_samples):
            layout = axis.fit(shape, self.codes.n_samples)
            if layout is not None and matches(layout, shape, coded, plain, weights):
                found.append(axis)
                if len(found) == 2:
                    break
        return found


def at_least_1d(gradient: Tensor) -> Tensor:
    """Give 0-d gradients a dimension."""
    return gradient.unsqueeze(0) if gradient.dim() == 0 else gradient
