"""What was measured about who owns which output, over all batches of a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...errors import VerificationError
from ..sample_layout import Axis, Layout, Ownership, Routed, Single
from ..trace.tap import Key, Site
from .weights import Codes, Signature, candidates, decode, is_mixed, matches, shows_samples

#: A site's key and the index of one of its outputs.
_Place: TypeAlias = tuple[Key, int]

#: What to do about templates that are known already: trust them; measure again where they fail; fail.
Check: TypeAlias = Literal["no", "again", "raise"]

#: What a site's measurement may end in: owners of its outputs (None: zero gradient), probe again, or mixed samples.
Measured: TypeAlias = list[Ownership | None] | Literal["unmeasured", "mixed", "nonfinite"]


@dataclass
class _Memo:
    """The owners of a site's outputs in a batch of so many samples, by templates that were known."""

    n_samples: int
    shapes: list[torch.Size]
    owners: list[Ownership | None]


class Measurement:
    """Templates of the sites seen so far, and the probing passes of the current batch."""

    def __init__(self) -> None:
        """Know nothing."""
        self.codes = Codes(0, torch.Generator())
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[_Place, list[Axis] | Literal["routed"]] = {}
        self._check: Check = "no"
        self._thorough = self._unusual = False
        self._dormant: set[_Place] = set()  # outputs whose gradient was zero so far: not worth a probing pass
        self._signatures: dict[_Place, list[Signature]] = defaultdict(list)
        self._memo: dict[Key, _Memo] = {}

    def is_unusual(self, sites: Sequence[Site], n_samples: int) -> bool:
        """Tell whether a batch has sites or sizes that the last ones did not have."""
        return any(self._remembered(site, n_samples) is None for site in sites)

    def start_batch(self, n_samples: int, check: Check, thorough: bool, unusual: bool) -> None:
        """Draw the codes of a batch, and say how far to trust what is known.

        Args:
            n_samples: size of the batch.
            check: what to do about known templates.
            thorough: tell any two samples apart before a template is believed. Otherwise one probing pass is enough:
                two samples share a code with probability 1/32, but a template is wrong for nearly all rows at once.
            unusual: measure templates again that another shape with the same number of rows would fit too.
        """
        self.codes, self._check, self._thorough = Codes(n_samples, self._generator), check, thorough
        self._unusual = unusual
        self.start_probing()

    def start_probing(self) -> None:
        """Forget the probing passes."""
        self._signatures = defaultdict(list)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing is known yet."""
        return not self._known

    @property
    def has_dormant(self) -> bool:
        """Tell whether some output may need probing as soon as its gradient is not zero."""
        return bool(self._dormant)

    def passes_needed(self, sites: Sequence[Site]) -> int:
        """Return how many probing passes the sites of a batch need: none in steady state."""
        n_samples = self.codes.n_samples
        if n_samples == 1:
            return 0
        fewest = self.codes.rounds if self._thorough else 1
        needed = fewest if self._check != "no" else 0
        for site in sites if self._unusual else ():  # in a usual batch all of them are remembered
            if self._remembered(site, n_samples) is not None:
                continue
            for index, shape in enumerate(site.shapes):
                place = (site.key, index)
                known = self._known.get(place)
                if known == "routed":
                    return self.codes.rounds
                if self._template(known, shape) is None and place not in self._dormant:
                    needed = fewest
        return needed

    def is_new(self, sites: Sequence[Site]) -> bool:
        """Tell whether some site was never measured at its sizes, or is measured in every batch."""
        shapes = ((self._known.get((site.key, i)), shape) for site in sites for i, shape in enumerate(site.shapes))
        return any(self._template(known, shape) is None for known, shape in shapes)

    def probe(self, site: Site, grads: Sequence[Tensor | None]) -> None:
        """Keep the projections of a probing pass, where something is to be measured or checked."""
        for index, gradient in enumerate(grads):
            if gradient is None:
                continue
            gradient, place = at_least_1d(gradient), (site.key, index)
            if self._check != "no" or self._template(self._known.get(place), gradient.shape) is None:
                self._signatures[place].append(Signature.of(gradient, self.codes.n_samples))

    def _template(self, known: list[Axis] | Literal["routed"] | None, shape: torch.Size) -> Layout | None:
        """Return the layout of the known template that fits a shape; None if several fit, and differ."""
        if not isinstance(known, list):
            return None
        fitting = {axis.fit(shape, self.codes.n_samples) for axis in known if not (axis.is_between and self._unusual)}
        fitting.discard(None)
        return fitting.pop() if len(fitting) == 1 else None

    def owners(self, site: Site, grads: Sequence[Tensor | None]) -> Measured:
        """Return who owns each output, given its gradients of the collecting pass."""
        trusted = self._check == "no" and not self._signatures
        if trusted and all(gradient is not None for gradient in grads):
            remembered = self._remembered(site, self.codes.n_samples)
            if remembered is not None:
                return remembered
        owners: list[Ownership | None] = []
        for index, gradient in enumerate(grads):
            if gradient is None:
                owners.append(None)
                continue
            place = (site.key, index)
            owner = self._owner(place, at_least_1d(gradient))
            if owner == "unmeasured":
                self._dormant.discard(place)
            if owner == "unmeasured" or owner == "mixed" or owner == "nonfinite":
                return owner
            owners.append(None if owner == "zero" else owner)
        if trusted and all(isinstance(owner, Layout) for owner in owners):
            self._memo[site.key] = _Memo(self.codes.n_samples, site.shapes, owners)
        return owners

    def _remembered(self, site: Site, n_samples: int) -> list[Ownership | None] | None:
        """Return what the last batch found for a site, if this one has its sizes."""
        memo = self._memo.get(site.key)
        if memo is None or memo.n_samples != n_samples:
            return None
        return memo.owners if memo.shapes is site.shapes or memo.shapes == site.shapes else None

    def _owner(
        self, place: _Place, gradient: Tensor
    ) -> Ownership | Literal["zero", "unmeasured", "mixed", "nonfinite"]:
        """Return who owns one output, from what is known or from the probing passes."""
        n_samples = self.codes.n_samples
        if n_samples == 1:
            return Single()
        known = self._known.get(place)
        layout = self._template(known, gradient.shape)
        coded = self._signatures.get(place)
        if layout is not None and (self._check == "no" or not coded):
            return layout
        plain = Signature.of(gradient, n_samples)
        if not plain.is_finite:
            return "nonfinite"
        if plain.is_zero:
            if known is None:
                self._dormant.add(place)
            return "zero"
        if not coded:
            return "unmeasured"
        if layout is not None:
            if self._matches(layout, gradient.shape, coded, plain):
                return layout
            if self._check == "raise":
                raise VerificationError(
                    f"the rows of {place[0].name} belong to other samples than in earlier batches (does the model "
                    "order them by the data?); pass verify='always' to measure every batch"
                )
            self._known.pop(place)
            self._memo.pop(place[0], None)
            known = None
        if known != "routed":
            if self._thorough and len(coded) < self.codes.rounds:
                return "unmeasured"
            passing = self._structures(gradient.shape, coded, plain)
            layouts = [layout for axis in passing if (layout := axis.fit(gradient.shape, n_samples)) is not None]
            if layouts:
                # Where most of the gradient is zero, other owners would have shown the same: measured again.
                telling = len(layouts) == 1 and shows_samples(layouts[0], gradient.shape, plain)
                if not telling and len(coded) < self.codes.rounds:
                    return "unmeasured"
                if telling:
                    templates = self._known.setdefault(place, [])
                    assert isinstance(templates, list)
                    if passing[0] not in templates:
                        templates.append(passing[0])
                return layouts[0]
        owner = None
        if len(coded) == self.codes.rounds:
            owner = decode(coded, plain, self.codes)
        elif not is_mixed(coded[0], plain):
            return "unmeasured"
        if owner is None:
            self._known.pop(place, None)
            self._memo.pop(place[0], None)
            return "mixed"
        self._known[place] = "routed"
        return Routed(owner, n_samples)

    def _matches(self, layout: Layout, shape: torch.Size, coded: list[Signature], plain: Signature) -> bool:
        """Compare a layout with all probing passes."""
        return all(matches(layout, shape, one, plain, self.codes, digit) for digit, one in enumerate(coded))

    def _structures(self, shape: torch.Size, coded: list[Signature], plain: Signature) -> list[Axis]:
        """Return the first two templates that the measurement admits, or one that leaves no room for another."""
        found: list[Axis] = []
        dense = float((plain.rows != 0).double().mean()) > 0.5  # two templates by rows agree on few of them
        for axis in candidates(shape, self.codes.n_samples):
            layout = axis.fit(shape, self.codes.n_samples)
            if layout is not None and self._matches(layout, shape, coded, plain):
                found.append(axis)
                if len(found) == 2 or (dense and layout.has_rows(len(shape))):
                    break
        return found


def at_least_1d(gradient: Tensor) -> Tensor:
    """Give 0-d gradients a dimension."""
    return gradient.unsqueeze(0) if gradient.dim() == 0 else gradient
