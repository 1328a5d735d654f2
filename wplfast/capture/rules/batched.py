"""Products with a parameter of any dimensions: ``bmm``, ``x @ w`` with a batch of matrices, ``tensordot``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call, Slot
from ..sample_layout import SampleLayout
from .base import OneOutputRule, summed
from .blocks import BlockGradSample, Rows
from .contraction import contraction, fitted
from .grad_sample import GradSample

_MATMULS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mv"})
_GROUPED = frozenset({"_grouped_mm", "grouped_mm"})


class BatchedRule(OneOutputRule):
    """y_e = x_e W_e: the per-sample gradient of each matrix is a product of the rows that it was multiplied with."""

    name = "batched matmul"

    def matches(self, call: Call) -> bool:
        """Match products of one operand and one data tensor, whatever their dimensions."""
        if call.name in _GROUPED:
            weight = call.operand_at(1, "mat2")
            return weight is not None and weight.value.dim() == 3 and call.is_input(0, "self")
        if call.name == "baddbmm":
            return (
                call.argument(3, "beta") in (None, 1)
                and call.argument(4, "alpha") in (None, 1)
                and _pair(call) is not None
            )
        return ((call.name in _MATMULS and not call.kwargs) or call.name == "tensordot") and _pair(call) is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the factors of the operand, and the sums for what baddbmm adds."""
        if call.name in _GROUPED:
            return self._grouped(call, inputs, gradient, layout)
        found: list[GradSample] = []
        bias, pair = call.operand_at(0, "input") if call.name == "baddbmm" else None, _pair(call)
        assert pair is not None
        left, right = pair
        operand = next(slot for slot in pair if slot.kind == "operand")
        data = left if operand is right else right
        x = (inputs if data.kind == "input" else call.constants)[data.index]
        if x.layout != torch.strided:
            return None
        weight = call.operands[operand.index]
        terms = _terms(call, x.dim(), weight.value.dim(), operand is left)
        if terms is None:
            return None
        use = contraction(weight, self.name, terms, x.detach().to(gradient.dtype), gradient, layout)
        if use is None:
            return None
        found.append(use)
        if bias is not None:
            found.append(summed(bias, self.name, layout, gradient))
        return found

    def _grouped(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the rows of each group; groups lie one after the other and end where ``offs`` says."""
        x, weight = call.tensor_at(0, "self", inputs), call.operand_at(1, "mat2")
        offsets = call.tensor_at(2, "offs", inputs)
        if x is None or weight is None or offsets is None or x.dim() != 2 or len(call.operands) > 1:
            return None
        if not layout.has_rows(2):
            return None
        samples, ends = layout.segment_ids(gradient.shape, gradient.device), offsets.tolist()
        blocks = [
            Rows(gradient[first:end], x[first:end].to(gradient.dtype), samples[first:end])
            for first, end in zip([0, *ends], ends, strict=False)
        ]
        return [BlockGradSample(weight, self.name, layout.n_samples, blocks, (0, 1, 2))]


def _pair(call: Call) -> tuple[Slot, Slot] | None:
    """Return the two factors, in order: one is an operand, the other is none."""
    if call.name == "baddbmm":
        factors = call.argument(1, "batch1"), call.argument(2, "batch2")
    elif call.name == "tensordot":
        factors = call.argument(0, "a"), call.argument(1, "b")
    else:
        factors = call.args if len(call.args) == 2 else (None, None)
        factors = factors[::-1] if call.name == "__rmatmul__" else factors
    left, right = factors
    if not isinstance(left, Slot) or not isinstance(right, Slot):
        return None
    return (left, right) if (left.kind == "operand") != (right.kind == "operand") else None


def _terms(call: Call, n_data: int, n_operand: int, operand_is_left: bool) -> tuple[str, str, str] | None:
    """Return the letters of data, operand and output of a product of tensors of so many dimensions."""
    dims = (n_operand, n_data) if operand_is_left else (n_data, n_operand)
    if call.name == "tensordot":
        along = call.argument(2, "dims")
        if isinstance(along, int):
            along = (list(range(dims[0] - along, dims[0])), list(range(along)))
        if (
            not isinstance(along, (tuple, list))
            or len(along) != 2
            or not all(isinstance(d, (tuple, list)) for d in along)
        ):
            return None
        right = [chr(0x200 + i) for i in range(dims[1])]
        left = [chr(0x100 + i) for i in range(dims[0])]
        for i, j in zip(*along, strict=True):
            right[j] = left[i]
        output = [a for a in (*left, *right) if (a in left) != (a in right)]
        terms, joined = ["".join(left), "".join(right)], "".join(output)
    else:
        shapes = ["d" if dims[0] == 1 else "...rd", "d" if dims[1] == 1 else "...dk"]
        found = fitted(shapes, "..." + "r" * (dims[0] > 1) + "k" * (dims[1] > 1), dims)
        if found is None:
            return None
        terms, joined = found
    return (terms[1], terms[0], joined) if operand_is_left else (terms[0], terms[1], joined)


BATCHED = BatchedRule()
