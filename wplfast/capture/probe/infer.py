"""What was measured about who owns which output, over all batches of a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...errors import VerificationError
from ..sample_layout import AxisLayout, AxisTemplate, OneSample, SampleLayout, SegmentIds
from ..trace.tap import CallSite, CallSiteKey
from .weights import ProbeWeights, Projection, candidates, decode, is_mixed, matches, shows_samples

#: A site's key and the index of one of its outputs.
_Place: TypeAlias = tuple[CallSiteKey, int]

#: What to do about templates that are known already: trust them; measure again where they fail; fail.
Check: TypeAlias = Literal["no", "again", "raise"]

#: What a site's measurement may end in: layouts of its outputs (None: zero gradient), probe again, or mixed samples.
Measured: TypeAlias = list[SampleLayout | None] | Literal["unmeasured", "mixed", "nonfinite"]


@dataclass
class _Memo:
    """The layouts of a site's outputs in a batch of so many samples, by templates that were known."""

    n_samples: int
    shapes: list[torch.Size]
    layouts: list[SampleLayout | None]


class Measurement:
    """Templates of the sites seen so far, and the probing passes of the current batch."""

    def __init__(self) -> None:
        """Know nothing."""
        self.probe_weights = ProbeWeights(0, torch.Generator())
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[_Place, list[AxisTemplate] | Literal["routed"]] = {}
        self._check: Check = "no"
        self._thorough = self._unusual = False
        self._dormant: set[_Place] = set()  # outputs whose gradient was zero so far: not worth a probing pass
        self._signatures: dict[_Place, list[Projection]] = defaultdict(list)
        self._memo: dict[CallSiteKey, _Memo] = {}

    def is_unusual(self, sites: Sequence[CallSite], n_samples: int) -> bool:
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
        self.probe_weights, self._check, self._thorough = ProbeWeights(n_samples, self._generator), check, thorough
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

    def passes_needed(self, sites: Sequence[CallSite]) -> int:
        """Return how many probing passes the sites of a batch need: none in steady state."""
        n_samples = self.probe_weights.n_samples
        if n_samples == 1:
            return 0
        fewest = self.probe_weights.rounds if self._thorough else 1
        needed = fewest if self._check != "no" else 0
        for site in sites if self._unusual else ():  # in a usual batch all of them are remembered
            if self._remembered(site, n_samples) is not None:
                continue
            for index, shape in enumerate(site.shapes):
                place = (site.key, index)
                known = self._known.get(place)
                if known == "routed":
                    return self.probe_weights.rounds
                if self._template(known, shape) is None and place not in self._dormant:
                    needed = fewest
        return needed

    def is_new(self, sites: Sequence[CallSite]) -> bool:
        """Tell whether some site was never measured at its sizes, or is measured in every batch."""
        shapes = ((self._known.get((site.key, i)), shape) for site in sites for i, shape in enumerate(site.shapes))
        return any(self._template(known, shape) is None for known, shape in shapes)

    def probe(self, site: CallSite, grads: Sequence[Tensor | None]) -> None:
        """Keep the projections of a probing pass, where something is to be measured or checked."""
        for index, gradient in enumerate(grads):
            if gradient is None:
                continue
            gradient, place = at_least_1d(gradient), (site.key, index)
            if self._check != "no" or self._template(self._known.get(place), gradient.shape) is None:
                self._signatures[place].append(Projection.of(gradient, self.probe_weights.n_samples))

    def _template(self, known: list[AxisTemplate] | Literal["routed"] | None, shape: torch.Size) -> AxisLayout | None:
        """Return the layout of the known template that fits a shape; None if several fit, and differ."""
        if not isinstance(known, list):
            return None
        fitting = {
            axis.fit(shape, self.probe_weights.n_samples) for axis in known if not (axis.is_between and self._unusual)
        }
        fitting.discard(None)
        return fitting.pop() if len(fitting) == 1 else None

    def layouts(self, site: CallSite, grads: Sequence[Tensor | None]) -> Measured:
        """Return who owns each output, given its gradients of the collecting pass."""
        trusted = self._check == "no" and not self._signatures
        if trusted and all(gradient is not None for gradient in grads):
            remembered = self._remembered(site, self.probe_weights.n_samples)
            if remembered is not None:
                return remembered
        layouts: list[SampleLayout | None] = []
        for index, gradient in enumerate(grads):
            if gradient is None:
                layouts.append(None)
                continue
            place = (site.key, index)
            owner = self._owner(place, at_least_1d(gradient))
            if owner == "unmeasured":
                self._dormant.discard(place)
            if owner == "unmeasured" or owner == "mixed" or owner == "nonfinite":
                return owner
            layouts.append(None if owner == "zero" else owner)
        if trusted and all(isinstance(owner, AxisLayout) for owner in layouts):
            self._memo[site.key] = _Memo(self.probe_weights.n_samples, site.shapes, layouts)
        return layouts

    def _remembered(self, site: CallSite, n_samples: int) -> list[SampleLayout | None] | None:
        """Return what the last batch found for a site, if this one has its sizes."""
        memo = self._memo.get(site.key)
        if memo is None or memo.n_samples != n_samples:
            return None
        return memo.layouts if memo.shapes is site.shapes or memo.shapes == site.shapes else None

    def _owner(
        self, place: _Place, gradient: Tensor
    ) -> SampleLayout | Literal["zero", "unmeasured", "mixed", "nonfinite"]:
        """Return who owns one output, from what is known or from the probing passes."""
        n_samples = self.probe_weights.n_samples
        if n_samples == 1:
            return OneSample()
        known = self._known.get(place)
        layout = self._template(known, gradient.shape)
        probed = self._signatures.get(place)
        if layout is not None and (self._check == "no" or not probed):
            return layout
        plain = Projection.of(gradient, n_samples)
        if not plain.is_finite:
            return "nonfinite"
        if plain.is_zero:
            if known is None:
                self._dormant.add(place)
            return "zero"
        if not probed:
            return "unmeasured"
        if layout is not None:
            if self._matches(layout, gradient.shape, probed, plain):
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
            if self._thorough and len(probed) < self.probe_weights.rounds:
                return "unmeasured"
            passing = self._structures(gradient.shape, probed, plain)
            layouts = [layout for axis in passing if (layout := axis.fit(gradient.shape, n_samples)) is not None]
            if layouts:
                # Where most of the gradient is zero, other layouts would have shown the same: measured again.
                telling = len(layouts) == 1 and shows_samples(layouts[0], gradient.shape, plain)
                if not telling and len(probed) < self.probe_weights.rounds:
                    return "unmeasured"
                if telling:
                    templates = self._known.setdefault(place, [])
                    assert isinstance(templates, list)
                    if passing[0] not in templates:
                        templates.append(passing[0])
                return layouts[0]
        owner = None
        if len(probed) == self.probe_weights.rounds:
            owner = decode(probed, plain, self.probe_weights)
        elif not is_mixed(probed[0], plain):
            return "unmeasured"
        if owner is None:
            self._known.pop(place, None)
            self._memo.pop(place[0], None)
            return "mixed"
        self._known[place] = "routed"
        return SegmentIds(owner, n_samples)

    def _matches(self, layout: AxisLayout, shape: torch.Size, probed: list[Projection], plain: Projection) -> bool:
        """Compare a layout with all probing passes."""
        return all(matches(layout, shape, one, plain, self.probe_weights, digit) for digit, one in enumerate(probed))

    def _structures(self, shape: torch.Size, probed: list[Projection], plain: Projection) -> list[AxisTemplate]:
        """Return the first two templates that the measurement admits, or one that leaves no room for another."""
        found: list[AxisTemplate] = []
        dense = float((plain.rows != 0).double().mean()) > 0.5  # two templates by rows agree on few of them
        for axis in candidates(shape, self.probe_weights.n_samples):
            layout = axis.fit(shape, self.probe_weights.n_samples)
            if layout is not None and self._matches(layout, shape, probed, plain):
                found.append(axis)
                if len(found) == 2 or (dense and layout.has_rows(len(shape))):
                    break
        return found


def at_least_1d(gradient: Tensor) -> Tensor:
    """Give 0-d gradients a dimension."""
    return gradient.unsqueeze(0) if gradient.dim() == 0 else gradient
