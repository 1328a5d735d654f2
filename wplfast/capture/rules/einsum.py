"""``torch.einsum`` of data and one parameter, where it is a matrix product in other letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call, Slot
from ..sample_layout import AxisLayout, OneSample, SampleLayout
from .base import OneOutputRule
from .grad_sample import FactoredGradSample, GradSample


@dataclass(frozen=True)
class _Letters:
    """The roles of the letters of ``data, operand -> output``."""

    inputs: str
    operand: str
    output: str
    index: int  # of the data tensor
    source_index: int

    @property
    def rows(self) -> str:
        """Letters of data and output alone: samples and positions."""
        return "".join(a for a in self.output if a not in self.operand)

    @property
    def d_in(self) -> str:
        """Letters that are contracted, in the operand's order."""
        return "".join(a for a in self.operand if a in self.inputs)

    @property
    def d_out(self) -> str:
        """Letters of operand and output alone, in the operand's order."""
        return "".join(a for a in self.operand if a in self.output)


class EinsumRule(OneOutputRule):
    """The operand's letters are contracted with the data (D_in) or go to the output (D_out); the others are rows."""

    name = "einsum"

    def matches(self, call: Call) -> bool:
        """Match equations that are a matrix product over an operand with all of D_in before or after all of D_out."""
        return call.func is torch.einsum and _parse(call) is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the factors of the operand as a matrix."""
        letters = _parse(call)
        assert letters is not None
        if isinstance(layout, AxisLayout):
            letter = letters.output[layout.dim]
            if letter not in letters.rows:
                return None
            layout = AxisLayout(letters.rows.index(letter), layout.outer, layout.n_samples, layout.inner)
        elif not isinstance(layout, OneSample):
            return None
        g = _matrix(gradient, letters.output, letters.rows, letters.d_out)
        a = _matrix(inputs[letters.index].to(gradient.dtype), letters.inputs, letters.rows, letters.d_in)
        g, a = layout.rows(g), layout.rows(a)
        if not letters.operand.startswith(letters.d_out):
            a, g = g, a
        return [FactoredGradSample(call.operands[letters.source_index], self.name, a, g)]


def _matrix(tensor: Tensor, order: str, rows: str, columns: str) -> Tensor:
    """Permute dimensions to [*rows, columns], the columns flattened."""
    permuted = tensor.permute([order.index(letter) for letter in rows + columns])
    return permuted.reshape(*permuted.shape[: len(rows)], -1)


def _parse(call: Call) -> _Letters | None:
    """Read the equation; None unless it is such a product."""
    if len(call.args) != 3 or not isinstance(call.args[0], str) or call.kwargs:
        return None
    pair = call.args[1:]
    if not all(isinstance(slot, Slot) for slot in pair):
        return None
    if sorted(slot.kind for slot in pair) != ["input", "operand"]:
        return None
    terms, arrow, output = call.args[0].replace(" ", "").partition("->")
    if not arrow or terms.count(",") != 1:
        return None
    names = dict(zip((slot.kind for slot in pair), terms.split(","), strict=True))
    index = {slot.kind: slot.index for slot in pair}
    inputs, operand = names["input"], names["operand"]
    if "..." in operand or (("..." in inputs) != ("..." in output)):
        return None
    if "..." in inputs:
        missing = len(call.input_shapes[index["input"]]) - len(inputs.replace("...", ""))
        fill = "".join(chr(ord("\u0100") + i) for i in range(missing))
        inputs, output = inputs.replace("...", fill), output.replace("...", fill)
    sizes = dict(zip(inputs, call.input_shapes[index["input"]], strict=False))
    shape = call.operands[index["operand"]].value.shape
    if any(sizes.get(letter, size) != size for letter, size in zip(operand, shape, strict=False)):
        return None  # a size of 1 is broadcast
    letters = _Letters(inputs, operand, output, index["input"], index["operand"])
    if any(len(set(term)) != len(term) for term in (inputs, operand, output)):
        return None
    if set(letters.d_in) & set(letters.d_out) or set(inputs) - set(operand) != set(letters.rows):
        return None
    if operand not in (letters.d_out + letters.d_in, letters.d_in + letters.d_out) or not letters.d_out:
        return None
    return letters if letters.rows and letters.d_in else None


EINSUM = EinsumRule()
