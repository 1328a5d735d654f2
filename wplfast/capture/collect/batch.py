"""What one batch brings to a pass, and what is learnt about it on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..probe.graph import Fingerprint


@dataclass
class SingleSample:
    """A sample's gradients in a batch of its own, by plain autograd."""

    sample: int
    gradients: Sequence[Tensor | None]


@dataclass
class Batch:
    """One batch: what the caller gave, and what is compared in the end.

    Attributes:
        losses: one for each sample, [N], with a graph.
        verify: compare captured with ordinary gradients.
        retain_graph: the caller needs the graph again.
        independent: whether a sample's loss is the same in a batch of its own; None: unknown.
        single_sample: the gradients of one sample in such a batch.
        ordinary: of the losses times the first probe weights c, by plain autograd.
        captured: ``sum_n c_n g_n`` from grad samples, by parameter.
        of_single_sample: g_n of that one sample from grad samples, by parameter.
        one_by_one: parameters that are left to one backward pass for each sample.
        graph: the fingerprint of the losses' graph.
        keep: the graph is needed again.
    """

    losses: Tensor
    verify: bool
    retain_graph: bool
    independent: bool | None
    single_sample: SingleSample | None
    ordinary: list[Tensor | None] = field(default_factory=list)
    captured: dict[int, Tensor] = field(default_factory=dict)
    of_single_sample: dict[int, Tensor] = field(default_factory=dict)
    one_by_one: set[int] = field(default_factory=set)
    graph: Fingerprint | None = None
    keep: bool = True
