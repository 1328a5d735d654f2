"""``F.linear`` over any leading dimensions: the weight as factors for the fused kernel, the bias as a sum over T."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..accumulators import Accumulators
from ..call import Call, Operand
from ..sample_layout import SampleLayout
from .base import OneOutputRule, dense, row_sums, summed
from .contraction import contraction
from .grad_sample import FactoredGradSample, GradSample, SummedGradSample
from .projection import Direction, projected_affine, rows_of
from .recipe import ProductRecipe, Recipe


class LinearRule(OneOutputRule):
    """y = x W^T + b: row r of y belongs to the sample that owns row r of x."""

    name = "linear"

    def matches(self, call: Call) -> bool:
        """Match F.linear with data as its input, and with the bias as its only operand beside a weight that is data."""
        if call.func is F.linear and call.is_input(1, "weight"):
            is_matrix = len(call.input_shapes[call.argument(1, "weight").index]) == 2
            return is_matrix and len(call.operands) == 1 and call.operand_at(2, "bias") is not None
        weight = call.tensor_at(1, "weight", call.constants) if call.func is F.linear else None
        return call.is_input(0, "input") and weight is not None and weight.dim() == 2

    def stackable(self, call: Call) -> bool:
        """A layer treats rows alike."""
        return call.operand_at(1, "weight") is not None and len(call.input_shapes) == 1 and not call.is_complex

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return (A, G) for the weight and G summed over T for the bias."""
        weight, bias = call.operand_at(1, "weight"), call.operand_at(2, "bias")
        found: list[GradSample] = []
        if weight is not None:
            if not layout.has_rows(gradient.dim()):
                return None
            x = dense(inputs[call.argument(0, "input").index], weight)
            if x is None:
                return None
            if call.is_complex:
                return self._complex(weight, bias, x, gradient, layout)
            rows = layout.rows(gradient)
            found.append(FactoredGradSample(weight, self.name, layout.rows(x.to(gradient.dtype)), rows))
            if bias is not None:
                found.append(SummedGradSample(bias, self.name, row_sums(rows)))
        elif bias is not None:
            found.append(summed(bias, self.name, layout, gradient))
        return found

    def _complex(
        self, weight: Operand, bias: Operand | None, x: Tensor, gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the real and the imaginary part of a complex layer's gradients, as those of a real product."""
        rows = "".join(chr(0x100 + dim) for dim in range(x.dim() - 1))
        use = contraction(weight, self.name, (rows + "i", "oi", rows + "o"), x.detach(), gradient, layout)
        if use is None:
            return None
        return [use] if bias is None else [use, summed(bias, self.name, layout, gradient)]

    def needs_inputs(self, call: Call) -> bool:
        """The bias alone does not need the input."""
        return call.operand_at(1, "weight") is not None

    def product(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """Return weight and bias."""
        if len(call.input_shapes) != 1 or call.is_input(1, "weight") or call.is_complex:
            return None
        weight = call.tensor_at(1, "weight", ())
        return None if weight is None else (weight, call.tensor_at(2, "bias", ()))

    def recipe(
        self,
        call: Call,
        layouts: Sequence[SampleLayout | None],
        shapes: Sequence[torch.Size],
        accumulators: Accumulators,
    ) -> Recipe | None:
        """Bind the fused kernel for the weight, and the squares of sums for the bias."""
        weight, bias, layout = call.operand_at(1, "weight"), call.operand_at(2, "bias"), layouts[0]
        parts = [operand for operand in (weight, bias) if operand is not None]
        if weight is None or layout is None or not layout.has_rows(len(shapes[0])):
            return None
        if call.is_complex or not call.has_plain_inputs or not all(operand.is_parameter for operand in parts):
            return None
        (index,), of_bias = weight.parameters, None if bias is None else bias.parameters[0]
        return ProductRecipe(self.name, accumulators, layout, shapes[0], index, of_bias)

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return G^T A and the sum of G over all rows: the call need not be run again."""
        gradient = grads[0]
        if gradient is None:
            return [None] * len(call.operands)
        rows = rows_of(gradient)
        weight = call.operand_at(1, "weight")
        found: list[Tensor | None] = []
        for operand in call.operands:
            if operand is weight:
                x = inputs[call.argument(0, "input").index].to(gradient.dtype)
                x = x.conj() if x.is_complex() else x
                plain = x.layout == torch.strided
                found.append(rows.t() @ rows_of(x) if plain else (x.t() @ rows).t())
            else:
                found.append(rows.sum(0))
        return found

    def projected(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        directions: Sequence[Direction],
    ) -> list[Tensor] | None:
        """Project the factors of the weight's gradient, and the sum of G for the bias."""
        gradient, weight = grads[0], call.operand_at(1, "weight")
        if gradient is None or weight is None or not call.has_plain_inputs or call.is_complex:
            return None
        rows, x = rows_of(gradient), rows_of(inputs[call.argument(0, "input").index].to(gradient.dtype))
        are_weights = [operand is weight for operand in call.operands]
        return projected_affine(directions, are_weights, rows, lambda direction: direction.of_products(rows, x))


LINEAR = LinearRule()
