"""What the data of a call descend from: a call on what an MLP made of positions is about positions too.

The gradient of such a call's output mixes samples, though they are not coupled. That shows in the graph behind the
losses: all that the call's data were computed from are calls on positions, and no data with a batch axis came in on
the way. What cannot be seen there are statistics of the batch that take no gradient themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..call_site import TappedCall
from ..probe.graph import tapped_at
from ..trace.tap import TAP_NODE
from ..watched import Derived
from .batch import Batch
from .mixed import is_about_positions

#: Backward nodes of operations that only show their data in another way, or cast them.
_VIEWS = (
    *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "TBackward"),
    *("ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
)
#: Of such that take all their data from the graph, so that these may have other sizes and no others came in.
_JOINS = ("Cat", "ReshapeAlias", "UnsafeView", "View")
#: Of a reentrant checkpoint: what happens inside cannot be seen.
_HIDDEN = "CheckpointFunctionBackward"


class Origins:
    """Walks the graph behind losses once.

    Args:
        n_samples: size of the batch axis; None: no size tells of one.
        is_root: tells of a call without differentiable data whether these are positions.
        is_link: tells of a call with such data whether its own rows belong to no single sample.
        parameters: the watched ones, by id: what a Function makes of them is none of the batch's data.

    Attributes:
        roots: the calls on positions.
        explained: the calls whose differentiable data descend from these alone.
    """

    def __init__(
        self,
        losses: Tensor,
        n_samples: int | None,
        is_root: Callable[[TappedCall], bool],
        is_link: Callable[[TappedCall], bool],
        parameters: Container[int],
    ) -> None:
        self._n_samples, self._is_root, self._is_link, self._parameters = n_samples, is_root, is_link, parameters
        self.roots: list[TappedCall] = []
        self.explained: set[TappedCall] = set()
        self._axes: dict[Node, int | None] = {}  # how many a batch may lie along; None where other things are behind
        self._made: set[Node] = set()  # of parameters, by Functions that cannot be seen
        self._own: set[Node] = set()  # tapped calls' operations, to whose results parameters may add axes
        stack = [] if losses.grad_fn is None else [losses.grad_fn]
        while stack:
            node = stack[-1]
            if node in self._axes:
                stack.pop()
                continue
            below = self._below(node)
            missing = [other for other in below if other not in self._axes]
            if missing:
                stack += missing
            else:
                self._axes[stack.pop()] = self._judge(node, below)

    def _below(self, node: Node) -> list[Node]:
        """Return the nodes that a node's data come from."""
        edges = node.next_functions
        tapped = tapped_at(node)
        if tapped is not None:
            edges = edges[: len(edges) - len(tapped.call.operands)]
        below = [other for other, _ in edges if other is not None]
        if type(node) is TAP_NODE:
            for own in below:
                self._own.add(own)
                while own.name().startswith(_VIEWS) and own.next_functions and own.next_functions[0][0] is not None:
                    own = own.next_functions[0][0]
                    self._own.add(own)
        return below

    def _judge(self, node: Node, below: list[Node]) -> int | None:
        """Count the axes of a node's results that a batch may lie along; None if others than positions are behind."""
        found = [self._axes[other] for other in below]
        counts = [axes for axes in found if axes is not None]
        if hasattr(node, "variable"):
            leaf = node.variable
            if id(leaf) not in self._parameters and not isinstance(leaf, Derived):
                return None
            self._made.add(node)
            return 0
        if len(counts) < len(found) or node.name().startswith(_HIDDEN):
            return None
        tapped = tapped_at(node)
        if tapped is not None:
            return self._judge_call(tapped)
        if not self._made.isdisjoint(below):
            self._made.add(node)
            is_joined = len(below) < len(node.next_functions) and node not in self._own
            if self._n_samples is not None and is_joined:
                return None  # something else came in, perhaps statistics of the batch
        try:
            axes = max((self._fitting(about.shape) for about in node._input_metadata), default=0)
        except RuntimeError:  # of a nested tensor
            return None
        is_whole = node.name().startswith(_JOINS) and len(counts) == len(node.next_functions)
        return axes if axes <= sum(counts) or is_whole or node in self._own else None

    def _judge_call(self, tapped: TappedCall) -> int | None:
        """Judge a tapped call whose differentiable data, if any, are explained."""
        if not tapped.call.differentiable_inputs:
            if not self._is_root(tapped):
                return None
            self.roots.append(tapped)
        elif self._is_link(tapped) and not any(map(self._fitting, tapped.call.data_shapes)):
            self.explained.add(tapped)
        else:
            return None
        return max(map(self._fitting, tapped.shapes), default=0)

    def _fitting(self, shape: torch.Size) -> int:
        """Count the axes that a batch may lie along."""
        return 0 if self._n_samples is None else sum(not size % self._n_samples for size in shape)


def origins_of(
    batch: Batch,
    n_samples: int | None,
    asleep: Container[int],
    moves_rows: bool,
    is_sure: bool,
    parameters: Container[int],
) -> Origins:
    """Look for what the calls of a batch descend from.

    Args:
        batch: the batch, whose calls that mix samples are known.
        n_samples: size of the batch axis; None if samples may have any sizes.
        asleep: indices of calls that no gradient came to, as behind a layer of zeros.
        moves_rows: rows are gathered or scattered somewhere, and a sample may own any number of them.
        is_sure: sizes are to tell that positions are none of the batch's data; else the caller's word does.
        parameters: the watched ones, by id.
    """

    def is_link(tapped: TappedCall) -> bool:
        return tapped in batch.mixed or (len(tapped.shapes) == 1 and tapped.index in asleep)

    def is_root(tapped: TappedCall) -> bool:
        is_shared = tapped in batch.mixed if moves_rows else is_link(tapped)
        return is_shared and (not is_sure or is_about_positions(tapped, n_samples))

    return Origins(batch.losses, (n_samples or 1) if is_sure else None, is_root, is_link, parameters)
