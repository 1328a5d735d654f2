"""Call sites: the same call from batch to batch, with what was learnt about it; and one call of one forward pass.

A call is the same in two batches if it is described alike (function, arguments, which parameters stand where,
dimensions, order of strides, and what computed its inputs) and was reached through the same calls before it. What was
measured about it holds for batches whose losses have a graph of the same structure behind them; on another way, or
under another graph, it is measured anew, whatever its shape is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .call import Call
from .sample_layout import AxisTemplate

if TYPE_CHECKING:
    from .rules import Rule


@dataclass
class KnownOutput:
    """What was measured about one output of a call site.

    Attributes:
        templates: where its samples lie; several where several were seen.
        is_routed: rows lie in another order in every batch, and are measured each time.
        is_dormant: its gradient was zero so far, so that there was nothing to measure.
    """

    templates: list[AxisTemplate] = field(default_factory=list)
    is_routed: bool = False
    is_dormant: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.templates or self.is_routed)


class CallSite:
    """A place in a model's forward pass, and the places that calls were seen at after it.

    Attributes:
        name: of the function that is called here; "" for the place where a pass begins.
        is_parameter_only: the call was measured to have no sample axis, or looks up positions: its result counts as
            derived from parameters.
        in_backward: where calls begin that backward passes make (checkpoints), if this is a pass's last place.
    """

    __slots__ = ("_after", "_again", "_in_backward", "_outputs", "is_parameter_only", "name")

    def __init__(self, name: str = "") -> None:
        """Know nothing."""
        self.name = name
        self._outputs: dict[tuple[int, int], KnownOutput] = {}
        self.is_parameter_only = False
        self._after: dict[Any, CallSite] = {}
        self._in_backward: CallSite | None = None
        self._again: CallSite | None = None

    def after(self, signature: Any, name: str) -> tuple[CallSite, bool]:
        """Return the site of a call of this signature that comes next, and whether there was none yet."""
        site = self._after.get(signature)
        if site is not None:
            return site, False
        site = self._after[signature] = CallSite(name)
        return site, True

    @property
    def again(self) -> CallSite:
        """The site of a call that came here too, in the graph of one forward pass."""
        if self._again is None:
            self._again = CallSite(self.name)
        return self._again

    @property
    def in_backward(self) -> CallSite:
        """The place where the calls of this pass's backward passes begin."""
        if self._in_backward is None:
            self._in_backward = CallSite()
        return self._in_backward

    def output(self, structure: int, index: int) -> KnownOutput:
        """Return what is known of an output in batches whose graph has a structure."""
        known = self._outputs.get((structure, index))
        if known is None:
            known = self._outputs[structure, index] = KnownOutput()
        return known


class Listener(Protocol):
    """What the gradients of tapped calls are handed to in one backward pass."""

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Take the gradients of a call's outputs.

        Args:
            tapped: the call.
            inputs: its inputs, if its rule needs them.
            grads: a gradient for each floating point output; None where none arrived.

        Returns:
            The ordinary gradients of the call's operands, or Nones.
        """


class Relay:
    """Where both halves of a pass meet: all tapped calls report here, to the listener of the backward pass that runs.

    Attributes:
        idle: what listens while no backward pass of ours runs.
        listener: what listens now.
        task: the number that autograd gave to the backward pass that runs; -1 where none does.
        site: where the last call stood that this backward pass made itself (checkpoints); None before the first.
        is_over: the last batch was collected: the next call begins another one.
    """

    __slots__ = ("idle", "is_over", "listener", "site", "task")

    def __init__(self, idle: Listener) -> None:
        """Begin with nothing but who listens meanwhile."""
        self.idle = self.listener = idle
        self.task = -1
        self.site: CallSite | None = None
        self.is_over = False


class TappedCall:
    """One call of one forward pass whose outputs' gradients are seen.

    Attributes:
        call: what was called.
        site: where.
        rule: how its per-sample gradients are computed.
        relay: where gradients are reported.
        index: how many calls were tapped before it; -1 for calls made inside of a backward pass, or reached by one
            that runs inside of another.
        shapes: of its floating point outputs.
        nothing: what a listener returns that computes no ordinary gradients.
    """

    __slots__ = ("__weakref__", "call", "index", "nothing", "relay", "rule", "shapes", "site")

    def __init__(self, call: Call, site: CallSite, rule: Rule, relay: Relay, index: int) -> None:
        """Describe a call."""
        self.call, self.site, self.rule, self.relay, self.index = call, site, rule, relay, index
        self.shapes: Sequence[torch.Size] = ()
        self.nothing = call.no_gradients

    @property
    def in_backward(self) -> bool:
        """Whether the call belongs to a backward pass inside of another, of a checkpoint that recomputes."""
        return self.index < 0

    @property
    def parameters(self) -> frozenset[int]:
        """The indices of the watched parameters that the call uses."""
        return self.call.parameters
