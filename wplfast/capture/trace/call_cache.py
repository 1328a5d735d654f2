"""The taps of the last forward pass, in order: most models make the same calls in every batch.

Taking a call apart and finding its rule costs several times what a small operation does. A call that is the one which
stood at the same place last time, with data of the same shapes, is tapped as it was then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..call import Call, Slot, autocast_state
from ..rules import Rule
from .operands import Operands
from .tap import CallSiteKey


@dataclass(eq=False)
class CachedCall:
    """A tapped call whose only tensors are plain arguments: watched parameters, and data with gradients."""

    call: Call
    rule: Rule
    key: CallSiteKey
    tensors: tuple[Tensor | None, ...]  # the watched parameter that stands at each argument
    inputs: list[int]  # positions of data, in the order of their slots
    values: list[tuple[int, Tensor]]  # positions of parameters, and their values without grad
    product: tuple[Tensor, Tensor | None] | None  # what to multiply with, if the call is run as a tapped product

    @classmethod
    def of(
        cls,
        call: Call,
        rule: Rule,
        key: CallSiteKey,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        product: tuple[Tensor, Tensor | None] | None,
    ) -> CachedCall | None:
        """Remember a call; None if it is of another kind."""
        simple = rule.fast and not call.in_place and not kwargs and not key.keys.in_backward and not call.constants
        if (
            not simple
            or any(operand.graph is not None or operand.copy is not None for operand in call.operands)
            or call.input_kinds
        ):
            return None
        tensors: list[Tensor | None] = []
        inputs: dict[int, int] = {}
        values = []
        for position, (slot, value) in enumerate(zip(call.args, args, strict=True)):
            tensors.append(None)
            if isinstance(value, Tensor):
                if slot.kind == "operand":
                    tensors[-1] = value
                    values.append((position, call.operands[slot.index].value))
                elif not value.requires_grad or value.is_leaf or inputs.setdefault(slot.index, position) != position:
                    return None
            elif value is not None and type(value) not in (bool, int, float, str):
                return None
        return cls(call, rule, key, tuple(tensors), [inputs[i] for i in range(len(inputs))], values, product)

    def fits(self, func: Callable[..., Any], args: tuple[Any, ...], operands: Operands) -> bool:
        """Tell whether a call is this one again, at the same addresses and shapes."""
        call = self.call
        if func is not call.func or len(args) != len(self.tensors) or not self.key.is_next:
            return False
        for value, tensor, before in zip(args, self.tensors, call.args, strict=True):
            if tensor is not None:
                if value is not tensor:
                    return False
            elif type(value) is Tensor:
                if type(before) is not Slot or before.kind != "input":
                    return False
                if not value.requires_grad or value.is_leaf or value.shape != call.input_shapes[before.index]:
                    return False
            elif value is not before and (type(value) is not type(before) or value != before):
                return False
        if any(operands.watched(operand.parameters[0]) is not operand for operand in call.operands):
            return False
        return autocast_state(call.operands[0].value.device.type) == call.autocast

    def run(self, args: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
        """Run the call with its parameters as constants; return its result and its data."""
        filled = list(args)
        for position, value in self.values:
            filled[position] = value
        return self.call.func(*filled), [args[position] for position in self.inputs]


class CallCache:
    """The taps of the last forward pass and the place that this one has reached."""

    def __init__(self) -> None:
        """Expect nothing."""
        self._taps: list[CachedCall | None] = []
        self._next = 0

    def start(self) -> None:
        """Begin a forward pass."""
        self._next = 0

    def expected(self) -> CachedCall | None:
        """Return what stood at this place last time."""
        return self._taps[self._next] if self._next < len(self._taps) else None

    def advance(self, planned: CachedCall | None) -> None:
        """Put a tap at this place and go on."""
        if self._next == len(self._taps):
            self._taps.append(planned)
        else:
            self._taps[self._next] = planned
        self._next += 1
