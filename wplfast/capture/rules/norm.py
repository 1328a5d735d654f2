"""Normalisation with an affine part: ``y = normalised(x) * weight + bias``, whatever normalises x.

The normalised input is not kept: the backward pass computes it again, with the affine part left out. Batch statistics
never reach this rule, since :mod:`wplfast.fisher.checks` refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ..call import Call
from ..sample_layout import SampleLayout
from .base import OneOutputRule, by_batch, channel_rows, channels_of, row_sums, summed
from .grad_sample import GradSample, SummedGradSample
from .scale import scaled


class _Form(NamedTuple):
    """Where a function takes what."""

    weight: int
    bias: int | None
    by_channel: bool  # the affine part is per channel (dimension 1), else per trailing dimensions
    statistics: tuple[int, ...] = ()  # running statistics, unused and updated where the input's own are taken
    own_statistics: int | None = None  # the flag that says so


_FORMS: dict[Callable[..., Any], _Form] = {
    F.layer_norm: _Form(2, 3, False),
    torch.layer_norm: _Form(2, 3, False),
    F.rms_norm: _Form(2, None, False),
    torch.rms_norm: _Form(2, None, False),
    F.group_norm: _Form(2, 3, True),
    torch.group_norm: _Form(2, 3, True),
    F.batch_norm: _Form(3, 4, True),
    F.instance_norm: _Form(3, 4, True, (1, 2), 5),
}


class NormRule(OneOutputRule):
    """The gradients of weight and bias are sums of G times the normalised input, and of G."""

    name = "norm"

    def matches(self, call: Call) -> bool:
        """Match the functional forms of all normalisation layers, with data as their input."""
        return call.func in _FORMS and call.is_input(0, "input")

    def needs_inputs(self, call: Call) -> bool:
        """The bias alone does not need the input."""
        return call.operand_at(_FORMS[call.func].weight, "weight") is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the summed gradients of the affine part."""
        form = _FORMS[call.func]
        found: list[GradSample] = []
        weight = call.operand_at(form.weight, "weight")
        bias = None if form.bias is None else call.operand_at(form.bias, "bias")
        if form.by_channel:
            if not by_batch(layout):
                return None if bias is None or weight is not None else [channels_of(bias, self.name, layout, gradient)]
            if weight is not None:
                x = self._normalised(call, form, inputs).to(gradient.dtype)
                grads_of = ops.scale_grads(channel_rows(layout, x), channel_rows(layout, gradient))
                found.append(SummedGradSample(weight, self.name, grads_of))
            if bias is not None:
                found.append(SummedGradSample(bias, self.name, row_sums(channel_rows(layout, gradient))))
            return found
        if weight is not None:
            x = self._normalised(call, form, inputs).to(gradient.dtype)
            found.append(scaled(weight, self.name, layout, x, gradient))
        if bias is not None:
            found.append(summed(bias, self.name, layout, gradient))
        return found

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sum the gradient where the bias is all that is asked for, and the data were not kept."""
        gradient, form = grads[0], _FORMS[call.func]
        if self.needs_inputs(call) or gradient is None:
            return super().ordinary(call, inputs, grads)
        last = gradient.movedim(1, -1) if form.by_channel else gradient
        return [last.sum_to_size(operand.value.shape) for operand in call.operands]

    def _normalised(self, call: Call, form: _Form, inputs: Sequence[Tensor]) -> Tensor:
        """Run the call without its affine part."""
        left_out = {form.weight: "weight"}
        if form.bias is not None:
            left_out[form.bias] = "bias"
        if form.own_statistics is not None and call.argument(form.own_statistics, "use_input_stats") is not False:
            left_out |= dict(zip(form.statistics, ("running_mean", "running_var"), strict=True))
        (x,) = call.without(left_out).run([operand.value for operand in call.operands], inputs)
        return x


NORM = NormRule()
