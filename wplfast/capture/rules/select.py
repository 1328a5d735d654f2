"""Parameters chosen elementwise: ``torch.where(condition, p, x)`` and ``p.masked_fill(mask, value)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call
from ..sample_layout import SampleLayout
from .base import OneOutputRule, summed
from .grad_sample import GradSample


class SelectRule(OneOutputRule):
    """The gradient of what was chosen is G where it was chosen, and zero elsewhere."""

    name = "select"

    def matches(self, call: Call) -> bool:
        """Match both functions with a tensor as their condition and no other arguments."""
        if call.kwargs:
            return False
        if call.name == "where":
            return len(call.args) == 3 and call.operand_at(0, "condition") is None
        return call.name == "masked_fill" and len(call.args) == 3 and call.operand_at(0, "self") is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Mask the gradient."""
        if call.name == "masked_fill":
            mask = call.tensor_at(1, "mask", inputs)
            if mask is None or call.operand_at(2, "value") is not None:
                return None
            return [summed(call.operands[0], self.name, layout, gradient.masked_fill(mask, 0))]
        condition = call.tensor_at(0, "condition", inputs)
        if condition is None:
            return None
        found: list[GradSample] = []
        for position, chosen in ((1, condition), (2, ~condition)):
            operand = call.operand_at(position, "")
            if operand is not None:
                part = torch.where(chosen, gradient, gradient.new_zeros(()))
                found.append(summed(operand, self.name, layout, part))
        return found


SELECT = SelectRule()
