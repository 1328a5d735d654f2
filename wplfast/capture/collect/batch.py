"""What one batch brings to a pass, and what is learnt about it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from ..call_site import TappedCall
from ..probe.graph import Fingerprint


@dataclass
class SingleSample:
    """A sample's gradients in a batch of its own, by plain autograd: by parameter, projected."""

    sample: int
    gradients: Mapping[int, Tensor]


#: Finds out whether the samples of a batch are independent.
Independence: TypeAlias = Callable[[], bool | None]


@dataclass
class Batch:
    """One batch: what the caller gave, and what is compared in the end.

    Attributes:
        losses: one for each sample, [N], with a graph.
        verify: compare captured with ordinary gradients.
        retain_graph: the caller needs the graph again.
        independent: whether a sample's loss is the same in a batch of its own; None: unknown. A function finds out:
            that it was so in an earlier batch does not tell of one with another graph.
        single_sample: the gradients of one sample in such a batch.
        ordinary: gradients of the losses times the first probe weights c, by plain autograd: by parameter, projected.
        captured: ``sum_n c_n g_n`` from grad samples, likewise.
        of_single_sample: g_n of that one sample from grad samples, likewise.
        mixed: calls whose outputs' gradients mix samples.
        one_by_one: parameters that are left to one backward pass for each sample.
        graph: the fingerprint of the losses' graph.
        keep: the graph is needed again.
    """

    losses: Tensor
    verify: bool
    retain_graph: bool
    independent: bool | Independence | None
    single_sample: SingleSample | None
    ordinary: dict[int, Tensor] = field(default_factory=dict)
    captured: dict[int, Tensor] = field(default_factory=dict)
    of_single_sample: dict[int, Tensor] = field(default_factory=dict)
    mixed: set[TappedCall] = field(default_factory=set)
    one_by_one: set[int] = field(default_factory=set)
    graph: Fingerprint | None = None
    keep: bool = True
