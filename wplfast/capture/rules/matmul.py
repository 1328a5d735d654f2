"""A parameter as one side of a matrix product: ``x @ w``, ``w @ x``, ``torch.mm``, ``torch.addmm`` (HF's Conv1D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..accumulators import Accumulators
from ..call import Call
from ..sample_layout import AxisLayout, OneSample, SampleLayout
from .base import OneOutputRule, dense, summed
from .grad_sample import FactoredGradSample, GradSample
from .projection import Direction, projected_affine, rows_of
from .recipe import ProductRecipe, Recipe

_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "mm", "spmm", "_sparse_mm"})
_SUMS = frozenset({"addmm", "_sparse_addmm"})  # with a product


class MatmulRule(OneOutputRule):
    """y = x W with W [D_in, D_out]: the per-sample gradient is A^T G, that of a linear layer transposed."""

    name = "matmul"

    def matches(self, call: Call) -> bool:
        """Match products of a matrix among the operands with data of two or more dimensions."""
        if call.name in _PRODUCTS:
            found = call.pair
            if found is None or call.kwargs:
                return False
            operand, _, index = found
            return operand.value.dim() == 2 and len(call.input_shapes[index]) > 1
        if call.name not in _SUMS or call.argument(3, "beta") not in (None, 1) or "out" in call.kwargs:
            return False
        if call.argument(4, "alpha") not in (None, 1) or not call.is_input(1, "mat1"):
            return False
        return not call.is_input(2, "mat2") or len(call.operands) == 1  # what is added, alone

    def stackable(self, call: Call) -> bool:
        """A product from the right treats rows alike: steps of a loop are one product over [N, T, D]."""
        return call.pair is not None and _affine(call) is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return (G, A) for the matrix, and G summed for what addmm adds."""
        if call.name not in _SUMS:
            return self._product(call, inputs, gradient, layout)
        if not layout.has_rows(gradient.dim()):
            return None
        found: list[GradSample] = []
        bias, matrix = call.operand_at(0, "input"), call.operand_at(2, "mat2")
        x = call.tensor_at(1, "mat1", inputs)
        if x is not None and matrix is not None:
            x = dense(x, matrix)
            if x is None:
                return None
        if matrix is not None and x is not None:
            found.append(
                FactoredGradSample(matrix, self.name, layout.rows(gradient), layout.rows(x.to(gradient.dtype)))
            )
        if bias is not None:
            found.append(summed(bias, self.name, layout, gradient))
        return found

    def product(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """Return the matrix transposed, and what addmm adds if it is a vector."""
        found = _affine(call)
        return None if found is None else (found[0].t(), found[1])

    def recipe(
        self,
        call: Call,
        layouts: Sequence[SampleLayout | None],
        shapes: Sequence[torch.Size],
        accumulators: Accumulators,
    ) -> Recipe | None:
        """Bind the fused kernel for a matrix on the right, and the squares of sums for what addmm adds."""
        layout, plain = layouts[0], call.has_plain_inputs and not call.is_complex and _affine(call) is not None
        if layout is None or not plain or not layout.has_rows(len(shapes[0])):
            return None
        if not all(operand.is_parameter for operand in call.operands):
            return None
        bias = call.operand_at(0, "input") if call.name in _SUMS else None
        matrix = next((operand for operand in call.operands if operand is not bias), None)
        if matrix is None:
            return None
        of_bias = None if bias is None else bias.parameters[0]
        index = matrix.parameters[0]
        return ProductRecipe(self.name, accumulators, layout, shapes[0], index, of_bias, transposed=True)

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return A^T G, and for what addmm adds the sum of G over all rows, without running the call again."""
        gradient = grads[0]
        if gradient is None or not _is_plain(call):
            return super().ordinary(call, inputs, grads)
        rows = rows_of(gradient)
        x = inputs[0].to(gradient.dtype)
        bias = call.operand_at(0, "input") if call.name in _SUMS else None
        return [rows.sum(0) if operand is bias else rows_of(x).t() @ rows for operand in call.operands]

    def projected(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        directions: Sequence[Direction],
    ) -> list[Tensor] | None:
        """Project the factors of the matrix's gradient, and the sum of G for what addmm adds."""
        gradient = grads[0]
        if gradient is None or not _is_plain(call):
            return None
        bias = call.operand_at(0, "input") if call.name in _SUMS else None
        rows, x = rows_of(gradient), rows_of(inputs[0].to(gradient.dtype))
        are_weights = [operand is not bias for operand in call.operands]
        return projected_affine(directions, are_weights, rows, lambda direction: direction.of_products(x, rows))

    def _product(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Serve x @ w, and w @ x as its transpose."""
        found = call.pair
        assert found is not None
        operand, position, index = found
        plain = dense(inputs[index], operand)
        if plain is None:
            return None
        x = plain.to(gradient.dtype)
        if not _is_left(call, position):
            if not layout.has_rows(gradient.dim()):
                return None
            return [FactoredGradSample(operand, self.name, layout.rows(gradient), layout.rows(x))]
        turned = _transposed(layout, gradient.dim())
        if turned is None:
            return None
        rows, x_rows = turned.rows(gradient.transpose(-1, -2)), turned.rows(x.transpose(-1, -2))
        return [FactoredGradSample(operand, self.name, x_rows, rows)]


def _affine(call: Call) -> tuple[Tensor, Tensor | None] | None:
    """Return the matrix on the right of the only data, and the vector that addmm adds; None if it is another product.

    No view is made: a sharded model may have freed the matrix's memory by now.
    """
    if len(call.input_shapes) != 1 or call.is_input(2, "mat2"):
        return None
    if call.name in _SUMS:
        matrix, bias = call.tensor_at(2, "mat2", ()), call.tensor_at(0, "input", ())
        return None if matrix is None or bias is None or bias.shape != matrix.shape[1:] else (matrix, bias)
    found = call.pair
    return None if found is None or _is_left(call, found[1]) else (found[0].value, None)


def _is_plain(call: Call) -> bool:
    """Tell whether the call is a product of real dense data with a matrix on their right."""
    return call.has_plain_inputs and not (call.is_complex or call.in_place) and _affine(call) is not None


def _is_left(call: Call, position: int) -> bool:
    """Tell whether the operand that was given at a position stands on the left of the product."""
    return (position == 0) != (call.name == "__rmatmul__")


def _transposed(layout: SampleLayout, ndim: int) -> AxisLayout | OneSample | None:
    """Return who owns a tensor's elements after its last two dimensions were exchanged, if by rows."""
    if isinstance(layout, AxisLayout):
        dim = {ndim - 1: ndim - 2, ndim - 2: ndim - 1}.get(layout.dim, layout.dim)
        layout = replace(layout, dim=dim)
    if not isinstance(layout, (AxisLayout, OneSample)) or not layout.has_rows(ndim):
        return None
    return layout


MATMUL = MatmulRule()
