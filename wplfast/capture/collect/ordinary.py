"""The parameters' ordinary gradients, call by call as a probing pass finds them: their projections alone are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call_site import TappedCall
from ..rules.projection import Directions, add
from .round import OutputGrads


class OrdinaryGrads:
    """What the ordinary gradients of some parameters are projected to, and what takes them from calls.

    Args:
        taps: the calls of the batch.
        directions: what gradients are projected on.
        found: takes the projections, by parameter.
        wanted: indices of the parameters; None: all.

    Attributes:
        dtypes: those of the outputs' gradients.
    """

    def __init__(
        self, taps: Sequence[TappedCall], directions: Directions, found: dict[int, Tensor], wanted: set[int] | None
    ) -> None:
        self._directions, self._found, self._wanted = directions, found, wanted
        self._n_steps = Counter(tapped.call.step_key for tapped in taps)
        self._steps: dict[Any, list[OutputGrads]] = {}
        self.dtypes: set[torch.dtype] = set()

    def add(self, index: int, gradient: Tensor) -> None:
        """Add a parameter's gradient."""
        if self._wanted is None or index in self._wanted:
            self._directions.add(self._found, index, gradient)

    def take(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Add those of a call's parameters; return the gradients of its other operands, which go down their graphs."""
        self.dtypes |= {g.dtype.to_real() for g in grads if g is not None}
        are_parameters = all(operand.is_parameter for operand in tapped.call.operands)
        if are_parameters and self._n_steps[tapped.call.step_key] > 1 and not tapped.in_backward:
            step = OutputGrads(tapped, inputs, grads, ())
            if step.is_row_of_a_loop:
                same = self._steps.setdefault(tapped.call.step_key, [])
                if not same or same[0].stacks_with(step):
                    same.append(step)
                    return tapped.nothing
        return self._compute(tapped, inputs, grads)

    def finish(self) -> None:
        """Add those of the steps of loops, of all steps at once."""
        steps, self._steps = list(self._steps.values()), {}
        for same in steps:
            inputs = [torch.cat(tensors) for tensors in zip(*(step.inputs for step in same), strict=True)]
            gradient = torch.cat([step.grads[0] for step in same if step.grads[0] is not None])
            self._compute(same[0].tapped, inputs, [gradient])

    def _compute(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Project the gradients of parameters, if they need not be computed for that; return those of the others."""
        call = tapped.call
        if all(operand.is_parameter for operand in call.operands):
            directions = [self._directions[operand.parameters[0]] for operand in call.operands]
            projections = tapped.rule.projected(call, inputs, grads, directions)
            if projections is not None:
                for operand, projection in zip(call.operands, projections, strict=True):
                    if self._wanted is None or operand.parameters[0] in self._wanted:
                        add(self._found, operand.parameters[0], projection)
                return tapped.nothing
        found = list(tapped.rule.ordinary(call, inputs, grads))
        for position, operand in enumerate(call.operands):
            gradient = found[position]
            if gradient is not None and operand.is_parameter:
                self.add(operand.parameters[0], gradient)
                found[position] = None
        return found
