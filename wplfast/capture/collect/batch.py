"""The state of one batch of a Fisher pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..rules.grad_sample import GradSample
from ..sample_layout import AxisLayout, SampleLayout
from ..trace.tap import CallSite, CallSiteKeys


@dataclass
class SingleSample:
    """A sample's gradients in a batch of its own, by plain autograd."""

    sample: int
    gradients: Sequence[Tensor | None]


@dataclass
class OutputGrads:
    """A site in the collecting pass: its data, its outputs' gradients and who owns them."""

    site: CallSite
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    layouts: Sequence[SampleLayout | None]

    def stacks_with(self, other: OutputGrads) -> bool:
        """Tell whether both are rows [N, D] of the same samples, so that they are steps of one call on [N, T, D]."""
        owner, (gradient,) = self.layouts[0], self.grads
        call, another = self.site.call, other.site.call
        return (
            call.args == another.args
            and call.kwargs == another.kwargs
            and all(a.leaf is b.leaf for a, b in zip(call.operands, another.operands, strict=True))
            and isinstance(owner, AxisLayout)
            and owner is other.layouts[0]
            and owner.dim == 0
            and owner.outer == owner.inner == 1
            and gradient is not None
            and gradient.dim() == 2
            and other.grads[0] is not None
            and gradient.shape == other.grads[0].shape
            and [t.shape for t in self.inputs] == [t.shape for t in other.inputs]
        )

    @staticmethod
    def stack(moments: Sequence[OutputGrads]) -> list[OutputGrads]:
        """Make one moment of those of a recurrent cell, if they are alike."""
        first = moments[0]
        if len(moments) == 1 or not all(first.stacks_with(other) for other in moments):
            return list(moments)
        inputs = [torch.stack(tensors, 1) for tensors in zip(*(moment.inputs for moment in moments), strict=True)]
        gradient = torch.stack([moment.grads[0] for moment in moments if moment.grads[0] is not None], 1)
        return [OutputGrads(first.site, inputs, [gradient], first.layouts)]


@dataclass
class BatchState:
    """The state of one batch."""

    losses: Tensor
    weights: Tensor | None
    independent: bool | None
    single_sample: SingleSample | None
    verify: bool
    keep: bool  # the graph is needed again
    only: set[int] | None = None  # parameters that this round is about; None: all
    dry: bool = False  # measure only
    with_ordinary: bool = False  # this probing pass computes ordinary gradients
    blocked: set[int] = field(default_factory=set)  # left to one backward pass per sample
    ordinary: list[Tensor | None] = field(default_factory=list)
    probed: dict[int, Tensor] = field(default_factory=dict)  # sum_n c_n g_n from captured rows
    of_single_sample: dict[int, Tensor] = field(default_factory=dict)  # g_n of the sample that was run alone
    # of one collecting pass:
    uses: dict[int, list[GradSample]] = field(default_factory=lambda: defaultdict(list))
    pending: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    flushed: set[int] = field(default_factory=set)
    groups: dict[CallSiteKeys, list[OutputGrads]] = field(
        default_factory=dict
    )  # of calls of one function on the same operands
    grouped: dict[int, set[CallSiteKeys]] = field(default_factory=lambda: defaultdict(set))
    retry: set[int] = field(default_factory=set)
    mixed: list[CallSite] = field(default_factory=list)

    def start_round(self, sites: Sequence[CallSite], dry: bool) -> None:
        """Begin a collecting pass."""
        self.dry = dry
        self.uses, self.pending = defaultdict(list), defaultdict(int)
        self.flushed, self.retry, self.mixed = set(), set(), []
        self.groups, self.grouped = {}, defaultdict(set)
        for site in sites:
            for index in site.parameters if not site.in_backward else ():
                self.pending[index] += 1

    def defer(self, moment: OutputGrads) -> None:
        """Keep what a site saw until all of its kind are in."""
        keys = moment.site.key.keys
        self.groups.setdefault(keys, []).append(moment)
        for index in moment.site.parameters:
            self.grouped[index].add(keys)

    def deferred(self, index: int) -> list[OutputGrads]:
        """Take back what was deferred of the sites of one parameter, stacked where that can be."""
        groups = [self.groups.pop(keys, None) for keys in self.grouped.pop(index, ())]
        return [moment for group in groups if group for moment in OutputGrads.stack(group)]
