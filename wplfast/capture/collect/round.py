"""One collecting pass: grad samples of a parameter wait until all of its uses are in, then they are squared.

The gradient of a sample is a sum over all uses of a parameter, and the sum comes before the square. Parameters below
one derived tensor (``W + B A``, a concatenation) are squared together: its gradients are sent down to all of them at
once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import WplfastError
from ..accumulators import SLOW_RULES, Accumulators
from ..call_site import TappedCall
from ..probe.infer import at_least_1d
from ..rules import GENERIC
from ..rules.grad_sample import GradSample
from ..sample_layout import SampleLayout, is_row_a_sample
from .squares import Uses, accumulate, apart


@dataclass
class OutputGrads:
    """A tapped call in a collecting pass: its inputs, its outputs' gradients and their sample layouts."""

    tapped: TappedCall
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    layouts: Sequence[SampleLayout | None]

    def grad_samples(self) -> list[GradSample]:
        """Return one grad sample for each operand of the call; none if no gradient arrived."""
        pairs = zip(self.grads, self.layouts, strict=True)
        grads = [None if g is None or layout is None else at_least_1d(g) for g, layout in pairs]
        if all(gradient is None for gradient in grads):
            return []
        rule, call = self.tapped.rule, self.tapped.call
        found = rule.grad_samples(call, self.inputs, grads, self.layouts)
        return GENERIC.grad_samples(call, self.inputs, grads, self.layouts) if found is None else found

    @property
    def is_row_of_a_loop(self) -> bool:
        """Whether this is a call on [N, D] that treats rows alike: a step of a recurrent cell, say."""
        call, gradient = self.tapped.call, self.grads[0]
        if call.is_stackable is None:
            call.is_stackable = self.tapped.rule.stackable(call)
        return call.is_stackable and len(self.grads) == 1 and gradient is not None and gradient.dim() == 2

    @property
    def is_step(self) -> bool:
        """Whether this may be a step of a recurrent cell: a row a sample, of a call that treats rows alike."""
        return self.is_row_of_a_loop and is_row_a_sample(self.layouts[0])

    def stacks_with(self, other: OutputGrads) -> bool:
        """Tell whether two steps are of one call on [N, T, D]."""
        call, another = self.tapped.call, other.tapped.call
        gradient, follows = self.grads[0], other.grads[0]
        return (
            (call is another or (call.args == another.args and call.kwargs == another.kwargs))
            and self.layouts == other.layouts
            and gradient is not None
            and follows is not None
            and gradient.shape == follows.shape
            and gradient.dtype == follows.dtype
            and all(a.shape == b.shape for a, b in zip(self.inputs, other.inputs, strict=True))
        )

    @staticmethod
    def stacked(steps: Sequence[OutputGrads]) -> list[OutputGrads]:
        """Make one of several steps, if they are alike."""
        first = steps[0]
        if len(steps) == 1 or not all(first.stacks_with(other) for other in steps):
            return list(steps)
        inputs = [torch.stack(tensors, 1) for tensors in zip(*(step.inputs for step in steps), strict=True)]
        gradient = torch.stack([step.grads[0] for step in steps if step.grads[0] is not None], 1)
        return [OutputGrads(first.tapped, inputs, [gradient], first.layouts)]


class Round:
    """The grad samples of one collecting pass.

    Args:
        taps: the calls that are expected to report.
        accumulators: what squares are added to.
        names: of the parameters, for messages.
        wanted: the parameters that this pass is about; None: all.
        watch: called with grad samples by parameter before they are squared.

    Attributes:
        excluded: parameters that are not to be squared in this pass.
        last: parameters whose squares wait for the end of the pass.
        squared: parameters that were squared.
    """

    def __init__(
        self,
        taps: Iterable[TappedCall],
        accumulators: Accumulators,
        names: Sequence[str],
        wanted: set[int] | None = None,
        watch: Callable[[Uses], None] | None = None,
    ) -> None:
        self._accumulators, self._names, self._wanted, self._watch = accumulators, names, wanted, watch
        self._samples: dict[int, list[GradSample]] = defaultdict(list)
        self._steps: dict[Any, list[OutputGrads]] = {}  # by function and operands
        self._steps_of: dict[int, set[Any]] = defaultdict(set)
        self._groups: dict[int, frozenset[int]] = {}  # parameters that are squared with others
        self._waiting: dict[frozenset[int], int] = defaultdict(int)  # calls that have not reported
        self.excluded: set[int] = set()
        self.last: set[int] = set()
        self.squared: set[int] = set()
        taps = list(taps)
        for tapped in taps:
            self._join(tapped)
        found = {parameters: self._groups_of(parameters) for parameters in {tapped.parameters for tapped in taps}}
        for tapped in taps:
            for group in found[tapped.parameters]:
                self._waiting[group] += 1
        self._found = found

    def _join(self, tapped: TappedCall) -> None:
        """Put the parameters below one derived operand into one group."""
        for operand in tapped.call.operands:
            if len(operand.parameters) > 1:
                group = frozenset(operand.parameters).union(
                    *(self._groups[i] for i in operand.parameters if i in self._groups)
                )
                if self._groups.get(operand.parameters[0]) != group:
                    self._groups |= dict.fromkeys(group, group)

    def _groups_of(self, parameters: frozenset[int]) -> set[frozenset[int]]:
        """Return the groups of a call's parameters."""
        return {self._groups.get(index) or frozenset((index,)) for index in parameters}

    def take(self, found: OutputGrads) -> None:
        """Take the gradients of a call."""
        if not found.is_step:
            self._sample(found)
            return
        key = found.tapped.call.step_key
        self._steps.setdefault(key, []).append(found)
        for index in found.tapped.parameters:
            self._steps_of[index].add(key)

    def reported(self, tapped: TappedCall) -> None:
        """Note that a call has reported; square the parameters whose last call it was."""
        for group in self._found.get(tapped.parameters) or self._groups_of(tapped.parameters):
            self._waiting[group] -= 1
            if not self._waiting[group] and not group & self.last:
                self._square(group)

    def finish(self) -> None:
        """Square all that is left: calls that no gradient reached did not report."""
        left = {*self._samples, *self._steps_of}
        for group in {self._groups.get(index) or frozenset((index,)) for index in left}:
            self._square(group)

    def _sample(self, found: OutputGrads) -> None:
        """Turn the gradients of a call into grad samples."""
        started = time.perf_counter()
        samples = found.grad_samples()
        for sample in samples:
            for index in sample.operand.parameters:
                if self._wanted is not None and index not in self._wanted:
                    continue
                if index in self.squared:
                    raise WplfastError(
                        f"{self._names[index]!r} was used again ({found.tapped.call.name}) after its gradient was "
                        "squared: inside a checkpoint its uses must be the same ones in every batch, and results "
                        "computed from parameters alone must not be kept from one batch to the next"
                    )
                self._samples[index].append(sample)
        if samples:
            self._accumulators.seconds[samples[0].rule] += time.perf_counter() - started

    @torch.no_grad()  # reentrant checkpoints are squared at the end of the pass, where grad mode is on
    def _square(self, group: frozenset[int]) -> None:
        """Square and accumulate what is known of some parameters."""
        for key in {key for index in group for key in self._steps_of.pop(index, ())}:
            for found in OutputGrads.stacked(self._steps.pop(key, ())) if key in self._steps else ():
                self._sample(found)
        found_samples = {index: self._samples.pop(index, []) for index in sorted(group)}
        uses: Uses = {i: samples for i, samples in found_samples.items() if samples and i not in self.excluded}
        if not uses:
            return
        started = time.perf_counter()
        self.squared |= uses.keys()
        uses = apart(uses)
        if self._watch is not None:
            self._watch(uses)
        accumulate(uses, self._accumulators)
        taken = time.perf_counter() - started
        served: list[str] = []
        for index, samples in uses.items():
            names = [name for sample in samples for name in sample.served_by]
            self._accumulators.rules[index].update(names)
            served += names
        self._accumulators.seconds[next((name for name in served if name in SLOW_RULES), served[0])] += taken
