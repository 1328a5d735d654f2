"""Sample layouts: inferred from probing passes, remembered at call sites, looked up in later batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import TypeAlias

import torch
from torch import Tensor

from ..call_site import CallSite, KnownOutput, TappedCall
from ..sample_layout import AxisLayout, AxisTemplate, OneSample, SampleLayout, SegmentIds
from .weights import (
    RADIX,
    WIDE_RADIX,
    ProbeWeights,
    Projection,
    candidates,
    decode,
    is_mixed,
    matches,
    shows_samples,
    smallest,
)

#: A call site and the index of one of its outputs.
_Place: TypeAlias = tuple[CallSite, int]


class Check(Enum):
    """What to do about layouts that are known already."""

    TRUST = auto()
    REMEASURE = auto()  # in this batch; where one no longer holds, forget it
    VERIFY = auto()  # in this batch; where one no longer holds, that is an error


class Verdict(Enum):
    """Why an output has no sample layout."""

    ZERO = auto()  # its gradient is zero
    UNMEASURED = auto()  # more probing passes are needed
    MIXED = auto()  # some row belongs to no single sample
    MOVED = auto()  # rows belong to other samples than in earlier batches
    FOREIGN = auto()  # the gradient does not come from the losses
    NONFINITE = auto()


class LayoutInference:
    """The probing passes of one batch, and what they and earlier batches say about the taps of it."""

    def __init__(self) -> None:
        """Know nothing."""
        self.probe_weights = ProbeWeights(0, torch.Generator())
        self._generator = torch.Generator().manual_seed(0)
        self._check = Check.TRUST
        self._thorough, self._structure = False, 0
        self._projections: dict[_Place, list[Projection]] = defaultdict(list)
        self._n_dormant = 0
        self.asleep: set[int] = set()  # indices of tapped calls of this batch whose gradients count for nothing
        self.in_pairs = False  # from now on, samples are told by what changes in which of two passes
        self.has_half = False  # a gradient was of float16, which has no room for powers of two

    def start_batch(self, n_samples: int, structure: int, check: Check, thorough: bool, verifies: bool) -> None:
        """Draw the probe weights of a batch, and say how far to trust what is known.

        Args:
            n_samples: size of the batch.
            structure: number of the structure of its graph: what was measured under another one does not count.
            check: what to do about known layouts.
            thorough: tell any two samples apart before a template is believed. Otherwise one probing pass is enough:
                two samples share a weight with probability 1/32, but a template is wrong for nearly all rows at once.
            verifies: ordinary gradients of a probing pass are compared.
        """
        radix = WIDE_RADIX if thorough and not verifies and n_samples > RADIX else RADIX
        self.probe_weights = ProbeWeights(n_samples, self._generator, self.in_pairs, radix)
        self._check = check
        self._thorough, self._structure = thorough or self.in_pairs, structure
        self.asleep = set()
        self.start_probing()

    def start_probing(self) -> None:
        """Forget the probing passes."""
        self._projections = defaultdict(list)

    def probe_in_pairs(self) -> int:
        """Tell samples in another way from now on; return how many probing passes that takes."""
        self.in_pairs = self._thorough = True
        self.probe_weights = ProbeWeights(self.probe_weights.n_samples, self._generator, True)
        self.start_probing()
        return self.probe_weights.rounds

    @property
    def has_dormant(self) -> bool:
        """Whether some output may need probing as soon as its gradient is not zero."""
        return self._n_dormant > 0

    def passes_needed(self, taps: Sequence[TappedCall]) -> int:
        """Return how many probing passes the taps of a batch need: none where all is known and trusted."""
        if self.probe_weights.n_samples == 1:
            return 0
        fewest = self.probe_weights.rounds if self._thorough else 1
        needed = 0 if self._check is Check.TRUST else fewest
        for tapped in taps:
            for index, shape in enumerate(tapped.shapes):
                known = tapped.site.output(self._structure, index)
                if known.is_routed:
                    return self.probe_weights.rounds
                if self._known_layout(known, shape) is None and not known.is_dormant:
                    needed = fewest
        return needed

    def is_new(self, taps: Iterable[TappedCall]) -> bool:
        """Tell whether some tap was never measured at its sizes, or is measured in every batch."""
        return any(
            self._known_layout(tapped.site.output(self._structure, index), shape) is None
            for tapped in taps
            for index, shape in enumerate(tapped.shapes)
        )

    def probe(self, tapped: TappedCall, grads: Sequence[Tensor | None]) -> None:
        """Keep the projections of a probing pass, where something is to be measured or checked."""
        for index, gradient in enumerate(grads):
            if gradient is None:
                continue
            gradient = measurable(gradient)
            self.has_half |= gradient.dtype == torch.float16
            known = tapped.site.output(self._structure, index)
            unknown = tapped.in_backward or self._known_layout(known, gradient.shape) is None
            if unknown or self._check is not Check.TRUST:
                projection = Projection.of(gradient, self.probe_weights.n_samples)
                self._projections[tapped.site, index].append(projection)

    def leave_out(self, taps: Iterable[TappedCall]) -> None:
        """Note calls that no gradient reached: no batch of this graph is measured for their sake."""
        for tapped in taps:
            for index, shape in enumerate(tapped.shapes):
                known = tapped.site.output(self._structure, index)
                if self._known_layout(known, shape) is None and not known.is_routed:
                    self._set_dormant(known, True)

    def layouts(
        self, tapped: TappedCall, grads: Sequence[Tensor | None], by_finite: bool = False
    ) -> list[SampleLayout | None] | Verdict:
        """Return the sample layout of each output, given its gradients of the collecting pass.

        Args:
            tapped: the call.
            grads: the gradients.
            by_finite: entries of probing passes that are not finite count for nothing, as they do in ``grads``.

        Returns:
            A layout for each output, None where its gradient is zero; or the reason why one has none.
        """
        found: list[SampleLayout | None] = []
        for index, gradient in enumerate(grads):
            if gradient is None:
                found.append(None)
                continue
            layout = self._layout(tapped, index, measurable(gradient), by_finite)
            if layout is not Verdict.ZERO and isinstance(layout, Verdict):
                return layout
            if layout is Verdict.ZERO or self._is_negligible(tapped, index, gradient):
                self.asleep.add(tapped.index)
            found.append(None if isinstance(layout, Verdict) else layout)
        return found

    def _is_negligible(self, tapped: TappedCall, index: int, gradient: Tensor) -> bool:
        """Tell whether an output's gradient is so small that its layout could not be told, and does not matter."""
        if self.probe_weights.n_samples == 1 or not gradient.numel():
            return False
        known = self._known_layout(tapped.site.output(self._structure, index), at_least_1d(gradient).shape)
        return known is None and bool(gradient.abs().amax() <= smallest(gradient.dtype))

    def _layout(self, tapped: TappedCall, index: int, gradient: Tensor, by_finite: bool) -> SampleLayout | Verdict:
        """Return one output's layout, from what is known or from the probing passes."""
        if self.probe_weights.n_samples == 1 and not tapped.in_backward:
            return OneSample() if bool(gradient.isfinite().all()) else Verdict.NONFINITE
        known = tapped.site.output(self._structure, index)
        layout = self._known_layout(known, gradient.shape)
        probed = self._projections.get((tapped.site, index))
        if layout is not None and (not probed or (self._check is Check.TRUST and not tapped.in_backward)):
            return layout
        plain = Projection.of(gradient, self.probe_weights.n_samples)
        if by_finite and probed:
            left_out = ~torch.stack([one.rows for one in probed]).isfinite().all(0)
            plain, *probed = (one.without(left_out) for one in (plain, *probed))
        if not plain.is_finite:
            return Verdict.NONFINITE
        if plain.is_zero:
            self._set_dormant(known, known.is_empty)
            return Verdict.ZERO
        if not probed:
            self._set_dormant(known, False)
            return Verdict.UNMEASURED
        if tapped.in_backward and all(one.is_scaled(plain, 1.0) for one in probed):
            return Verdict.FOREIGN if len(probed) == self.probe_weights.rounds else Verdict.UNMEASURED
        if self.probe_weights.n_samples == 1:
            return OneSample()
        if layout is not None:
            if self._matches(layout, gradient.shape, probed, plain):
                return layout
            if self._check is Check.VERIFY:
                return Verdict.MOVED
            known.templates.clear()
        measured = self._measure(known, gradient.shape, probed, plain)
        if measured is Verdict.UNMEASURED:
            self._set_dormant(known, False)
        return measured

    def _measure(
        self, known: KnownOutput, shape: torch.Size, probed: list[Projection], plain: Projection
    ) -> SampleLayout | Verdict:
        """Return the layout that the probing passes show, and remember it."""
        all_passes = len(probed) == self.probe_weights.rounds
        if not known.is_routed:
            if self._thorough and not all_passes:
                return Verdict.UNMEASURED
            found = self._by_axis(known, shape, probed, plain, all_passes)
            if found is not None:
                return found
        if all_passes:
            ids = decode(probed, plain, self.probe_weights)
            if ids is not None:
                known.is_routed = True
                known.templates.clear()
                return SegmentIds(ids, self.probe_weights.n_samples)
        elif self.in_pairs or not is_mixed(probed[0], plain, self.probe_weights.radix):
            return Verdict.UNMEASURED
        known.is_routed = False
        known.templates.clear()
        return Verdict.MIXED

    def _by_axis(
        self, known: KnownOutput, shape: torch.Size, probed: list[Projection], plain: Projection, all_passes: bool
    ) -> AxisLayout | Verdict | None:
        """Return the layout in which samples lie along an axis; None if they do not."""
        passing = self._structures(shape, probed, plain)
        if not passing:
            return None
        layout = passing[0].fit(shape, self.probe_weights.n_samples)
        assert layout is not None
        # Where most of the gradient is zero, another layout would have shown the same: measured again.
        telling = len(passing) == 1 and shows_samples(layout, shape, plain)
        if not telling and not all_passes:
            return Verdict.UNMEASURED
        # A template with other axes on both sides of the samples fits another split of as many rows too.
        if telling and not passing[0].is_between and passing[0] not in known.templates:
            known.templates.append(passing[0])
            self._set_dormant(known, False)
        return layout

    def _known_layout(self, known: KnownOutput, shape: torch.Size) -> AxisLayout | None:
        """Return the layout of the known template that fits a shape; None if several fit, and differ."""
        n_samples = self.probe_weights.n_samples
        fitting = {template.fit(shape, n_samples) for template in known.templates} - {None}
        return fitting.pop() if len(fitting) == 1 else None

    def _set_dormant(self, known: KnownOutput, dormant: bool) -> None:
        """Note whether an output waits for a gradient that is not zero."""
        self._n_dormant += dormant - known.is_dormant
        known.is_dormant = dormant

    def _matches(self, layout: AxisLayout, shape: torch.Size, probed: list[Projection], plain: Projection) -> bool:
        """Compare a layout with all probing passes."""
        return all(matches(layout, shape, one, plain, self.probe_weights, i) for i, one in enumerate(probed))

    def _structures(self, shape: torch.Size, probed: list[Projection], plain: Projection) -> list[AxisTemplate]:
        """Return the first two templates that the measurement admits, or one that leaves no room for another."""
        found: list[AxisTemplate] = []
        # Two templates by rows agree on few of them.
        dense = plain.is_zero_nowhere or 2 * int(plain.rows.count_nonzero()) > plain.rows.numel()
        for template in candidates(shape, self.probe_weights.n_samples):
            layout = template.fit(shape, self.probe_weights.n_samples)
            if layout is not None and self._matches(layout, shape, probed, plain):
                found.append(template)
                if len(found) == 2 or (dense and layout.has_rows(len(shape))):
                    break
        return found


def at_least_1d(gradient: Tensor) -> Tensor:
    """Give 0-d gradients a dimension."""
    return gradient.unsqueeze(0) if gradient.dim() == 0 else gradient


def measurable(gradient: Tensor) -> Tensor:
    """Return a real tensor of a gradient's shape that is scaled as the gradient is, with a dimension at least."""
    if gradient.is_complex():
        gradient = gradient.real + 0.6180339887 * gradient.imag
    return at_least_1d(gradient)
