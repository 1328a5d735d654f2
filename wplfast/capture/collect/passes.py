"""What listens during the backward passes of a batch: probing, collecting, ordinary gradients, and nobody."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import NonFiniteError, WplfastError
from ...ops.layout import as_real
from ..call_site import TappedCall
from ..probe.infer import LayoutInference, Verdict, measurable
from ..probe.weights import Projection
from ..sample_layout import SampleLayout
from ..trace.nested import SECOND_DERIVATIVE
from .ordinary import OrdinaryGrads
from .round import OutputGrads, Round
from .squares import pushed


class Idle:
    """Between our own backward passes: the user's, which must not hope for gradients of the parameters."""

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Let gradients pass; refuse to be a part of a second derivative."""
        if torch.is_grad_enabled():
            raise WplfastError(SECOND_DERIVATIVE)
        return tapped.nothing


class ProbePass:
    """A backward pass with probe weights: projections of all gradients are kept.

    Args:
        inference: what keeps them.
        in_backward: takes the parameters with uses in calls that the pass itself makes (checkpoints).
        ordinary: takes the ordinary gradients of the parameters; None: they are not wanted.
    """

    def __init__(self, inference: LayoutInference, in_backward: set[int], ordinary: OrdinaryGrads | None) -> None:
        self._inference, self._in_backward, self._ordinary = inference, in_backward, ordinary

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Keep projections."""
        if tapped.in_backward:
            self._in_backward |= tapped.parameters
        self._inference.probe(tapped, grads)
        return tapped.nothing if self._ordinary is None else self._ordinary.take(tapped, inputs, grads)


class ProjectionPass:
    """A backward pass that keeps the projections of all gradients, in order.

    Args:
        n_samples: size of the batch.
    """

    def __init__(self, n_samples: int) -> None:
        self._n_samples = n_samples
        self.found: list[Projection] = []

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Keep projections."""
        self.found += [Projection.of(measurable(g), self._n_samples) for g in grads if g is not None and g.numel()]
        return tapped.nothing


class OrdinaryPass:
    """A backward pass that computes ordinary gradients of some parameters.

    Args:
        wanted: indices of these.
    """

    def __init__(self, wanted: set[int]) -> None:
        self._wanted = wanted

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of a call's operands."""
        if not self._wanted & tapped.parameters:
            return tapped.nothing
        return tapped.rule.ordinary(tapped.call, inputs, grads)


class CollectPass:
    """A backward pass with weights 1: gradients become grad samples.

    Args:
        inference: tells who owns which row.
        round_: takes the gradients; None for a dry pass, which only finds out what cannot be collected.
        names: of the parameters.
        in_backward: takes the parameters with uses in calls that the pass itself makes (checkpoints).
        wanted: the parameters that the pass is about; None: all.

    Attributes:
        retry: parameters with a use that needs more probing passes.
        mixed: calls whose outputs' rows belong to no single sample.
        moved: calls whose outputs' rows belong to other samples than in earlier batches.
        foreign: calls whose outputs' gradients stayed as they were when the losses got weights.
        layouts: by the index of a tapped call, what its outputs' layouts were.
        reported: the calls that a gradient reached.
        is_dry: nothing is accumulated.
    """

    def __init__(
        self,
        inference: LayoutInference,
        round_: Round | None,
        names: Sequence[str],
        in_backward: set[int],
        wanted: set[int] | None = None,
    ) -> None:
        self._inference, self._round, self._names = inference, round_, names
        self.is_dry = round_ is None
        self._in_backward, self._wanted = in_backward, wanted
        self.retry: set[int] = set()
        self.mixed: list[TappedCall] = []
        self.moved: list[TappedCall] = []
        self.foreign: list[TappedCall] = []
        self.layouts: dict[int, Sequence[SampleLayout | None]] = {}
        self.reported: set[TappedCall] = set()

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Collect from one call."""
        parameters = tapped.parameters
        self.reported.add(tapped)
        if tapped.in_backward:
            self._in_backward |= parameters
            if self._round is not None:
                self._round.last |= parameters
        if self._wanted is None or parameters & self._wanted:
            layouts = self._inference.layouts(tapped, grads)
            if layouts is Verdict.NONFINITE:
                if not _is_finite(tapped, inputs, grads):
                    raise NonFiniteError(f"a gradient of {self._names[min(parameters)]!r} is NaN or infinite")
                # What is not finite does not reach the parameters (padding that a look-up leaves out).
                grads = [None if g is None else g.nan_to_num(0.0, 0.0, 0.0) for g in grads]
                layouts = self._inference.layouts(tapped, grads, by_finite=True)
            if layouts is Verdict.FOREIGN and self._inference.in_pairs:
                raise WplfastError(
                    f"{self._names[min(parameters)]!r} gets a gradient ({tapped.call.name}) from a backward() that a "
                    "hook or a Function runs inside the backward pass, and that does not come from the losses: PyTorch "
                    "adds it to .grad, though it is no part of theirs. Use torch.autograd.grad there, or no such hook"
                )
            if isinstance(layouts, Verdict):
                self.retry |= parameters
                if layouts is Verdict.MIXED:
                    self.mixed.append(tapped)
                elif layouts is Verdict.MOVED:
                    self.moved.append(tapped)
                elif layouts is Verdict.FOREIGN:
                    self.foreign.append(tapped)
                if self._round is not None:
                    self._round.excluded |= parameters
            else:
                if not tapped.in_backward:
                    self.layouts[tapped.index] = layouts
                if self._round is not None:
                    self._round.take(OutputGrads(tapped, inputs, grads, layouts))
        if self._round is not None and not tapped.in_backward:
            self._round.reported(tapped)
        return tapped.nothing


def _is_finite(tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
    """Tell whether the gradients that a call's parameters get of it are free of NaN and inf."""
    ordinary = tapped.rule.ordinary(tapped.call, inputs, grads)
    for operand, gradient in zip(tapped.call.operands, ordinary, strict=True):
        if gradient is None or bool(gradient.to_dense().isfinite().all()):
            continue
        # What was computed from parameters may drop on the way down what is not.
        if operand.graph is None or not all(
            bool(g.isfinite().all()) for g in pushed(operand, as_real(gradient.to_dense()).unsqueeze(0)).values()
        ):
            return False
    return True
