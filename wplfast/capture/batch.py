"""The state of one batch of a Fisher pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .tap import Site
from .uses import Use


@dataclass
class Alone:
    """A sample's gradients in a batch of its own, by plain autograd."""

    sample: int
    gradients: Sequence[Tensor | None]


@dataclass
class Batch:
    """The state of one batch."""

    losses: Tensor
    weights: Tensor | None
    independent: bool | None
    alone: Alone | None
    verify: bool
    keep: bool  # the graph is needed again
    only: set[int] | None = None  # parameters that this round is about; None: all
    dry: bool = False  # measure only
    with_ordinary: bool = False  # this probing pass computes ordinary gradients
    blocked: set[int] = field(default_factory=set)  # left to one backward pass per sample
    ordinary: list[Tensor | None] = field(default_factory=list)
    coded: dict[int, Tensor] = field(default_factory=dict)  # sum_n c_n g_n from captured rows
    single: dict[int, Tensor] = field(default_factory=dict)  # g_n of the sample that was run alone
    # of one collecting pass:
    uses: dict[int, list[Use]] = field(default_factory=lambda: defaultdict(list))
    pending: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    flushed: set[int] = field(default_factory=set)
    retry: set[int] = field(default_factory=set)
    mixed: list[Site] = field(default_factory=list)

    def start_round(self, sites: Sequence[Site], dry: bool) -> None:
        """Begin a collecting pass."""
        self.dry = dry
        self.uses, self.pending = defaultdict(list), defaultdict(int)
        self.flushed, self.retry, self.mixed = set(), set(), []
        for site in sites:
            for index in site.parameters if not site.late else ():
                self.pending[index] += 1
