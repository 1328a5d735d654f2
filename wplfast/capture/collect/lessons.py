"""What a pass learns from calls whose outputs' gradients mix samples: that they have no sample axis, or an error."""

from __future__ import annotations

from torch import Tensor

from ...errors import CoupledSamplesError
from ..call_site import TappedCall
from ..probe.infer import LayoutInference
from ..trace.intercept import Interception
from .batch import Batch
from .linearity import Linearity
from .mixed import ACROSS_LOSSES, advice, describe, is_about_positions, is_of_indices
from .origins import Origins, origins_of


class Lessons:
    """Decides about calls that mix samples.

    Args:
        names: of the parameters.
        parameters: these.
        interception: is told which calls count as derived from parameters.
        inference: tells whose gradients count for nothing.
        linearity: tells where gradients do not scale with the losses.
        by_losses: a sample is what a loss belongs to, wherever it lies.

    Attributes:
        has_guessed: data were taken for positions by their sizes alone.
    """

    def __init__(
        self,
        names: list[str],
        parameters: list[Tensor],
        interception: Interception,
        inference: LayoutInference,
        linearity: Linearity,
        by_losses: bool,
    ) -> None:
        self._names, self._interception, self._inference = names, interception, inference
        self._linearity, self._by_losses = linearity, by_losses
        self._parameters = {id(tensor) for tensor in (*parameters, *interception.leaves)}
        self.has_guessed = False

    def learn(self, mixed: list[TappedCall], batch: Batch, may_replay: bool, replays_now: bool, reorders: bool) -> bool:
        """Learn from calls that mix samples; tell whether the batch can go on without another forward pass.

        A call without differentiable inputs may simply have no sample axis (a position embedding): from now on its
        result counts as derived from parameters. With such inputs the samples are coupled, unless the inputs themselves
        came from such calls.

        Args:
            mixed: the calls.
            batch: their batch.
            may_replay: the batch can be run again.
            replays_now: it can be, and nothing was accumulated that would be lost.
            reorders: rows may lie in another order in every batch.

        Raises:
            CoupledSamplesError: if samples are coupled, or nothing tells that they are not.
        """
        batch.mixed.update(mixed)
        if callable(batch.independent):
            batch.independent = batch.independent()
        bare = [tapped for tapped in mixed if not tapped.call.differentiable_inputs]
        coupled = [tapped for tapped in mixed if tapped.call.differentiable_inputs]
        n_samples = None if self._by_losses else len(batch.losses)
        positions = [tapped for tapped in bare if is_about_positions(tapped, n_samples)]
        if self._linearity.is_bent and not positions:
            raise CoupledSamplesError(describe(mixed[0], self._names) + self._linearity.names(batch))
        known = batch.independent
        if known is None:
            known = not self._interception.has_asked and positions == bare
        left, roots = coupled, []
        if bare and (replays_now or batch.independent):
            left = []
        elif coupled:
            origins = self._origins(batch, reorders, is_sure=not batch.independent)
            left, roots = [tapped for tapped in coupled if tapped not in origins.explained], origins.roots
        if left or not known:
            unsure = not coupled or self._origins(batch, reorders, is_sure=False).explained.issuperset(coupled)
            hint = self._advice(batch, unsure, may_replay, reorders)
            named = (left or coupled or bare)[0]
            raise CoupledSamplesError(describe(named, self._names) + hint + self._linearity.names(batch))
        goes_on = not replays_now or not (roots or bare)  # what Functions make of parameters stays unseen
        self._interception.mark_parameter_only([*roots, *(positions if replays_now and positions else bare)])
        if goes_on:
            is_certain = batch.independent is not None or (not coupled and all(map(is_of_indices, bare)))
            self.has_guessed = self.has_guessed or not is_certain
        return goes_on

    def _origins(self, batch: Batch, reorders: bool, is_sure: bool) -> Origins:
        """Look for what the calls of a batch descend from; sizes tell of positions, or else the caller's word."""
        n_samples = None if self._by_losses else len(batch.losses)
        return origins_of(batch, n_samples, self._inference.asleep, reorders, is_sure, self._parameters)

    def _advice(self, batch: Batch, may_be_positions: bool, may_replay: bool, reorders: bool) -> str:
        """Say what to do about calls that mix samples; nothing where a sample was run alone."""
        if batch.independent is None:
            return advice(may_be_positions, self._by_losses, may_replay, reorders)
        return ACROSS_LOSSES if self._by_losses else ""
