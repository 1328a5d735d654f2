"""``torch.einsum`` of data and one parameter, where it is a matrix product in other letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call, Slot
from ..sample_layout import Layout, Ownership, Single
from .base import OneOutputRule
from .grad_sample import FactoredUse, Use


@dataclass(frozen=True)
class _Letters:
    """The roles of the letters of ``data, source -> output``."""

    data: str
    source: str
    output: str
    index: int  # of the data tensor
    source_index: int

    @property
    def rows(self) -> str:
        """Letters of data and output alone: samples and positions."""
        return "".join(a for a in self.output if a not in self.source)

    @property
    def d_in(self) -> str:
        """Letters that are contracted, in the source's order."""
        return "".join(a for a in self.source if a in self.data)

    @property
    def d_out(self) -> str:
        """Letters of source and output alone, in the source's order."""
        return "".join(a for a in self.source if a in self.output)


class EinsumRule(OneOutputRule):
    """The source's letters are contracted with the data (D_in) or go to the output (D_out); the others are rows."""

    name = "einsum"

    def matches(self, call: Call) -> bool:
        """Match equations that are a matrix product over a source with all of D_in before or after all of D_out."""
        return call.func is torch.einsum and _parse(call) is not None

    def serve(self, call: Call, data: Sequence[Tensor], gradient: Tensor, owner: Ownership) -> list[Use] | None:
        """Return the factors of the source as a matrix."""
        letters = _parse(call)
        assert letters is not None
        if isinstance(owner, Layout):
            letter = letters.output[owner.dim]
            if letter not in letters.rows:
                return None
            owner = Layout(letters.rows.index(letter), owner.outer, owner.n_samples, owner.inner)
        elif not isinstance(owner, Single):
            return None
        g = _matrix(gradient, letters.output, letters.rows, letters.d_out)
        a = _matrix(data[letters.index].to(gradient.dtype), letters.data, letters.rows, letters.d_in)
        g, a = owner.rows(g), owner.rows(a)
        if not letters.source.startswith(letters.d_out):
            a, g = g, a
        return [FactoredUse(call.sources[letters.source_index], self.name, a, g)]


def _matrix(tensor: Tensor, order: str, rows: str, columns: str) -> Tensor:
    """Permute dimensions to [*rows, columns], the columns flattened."""
    permuted = tensor.permute([order.index(letter) for letter in rows + columns])
    return permuted.reshape(*permuted.shape[: len(rows)], -1)


def _parse(call: Call) -> _Letters | None:
    """Read the equation; None unless it is such a product."""
    if len(call.args) != 3 or not isinstance(call.args[0], str) or call.kwargs:
        return None
    operands = call.args[1:]
    if not all(isinstance(slot, Slot) for slot in operands):
        return None
    if sorted(slot.kind for slot in operands) != ["data", "source"]:
        return None
    terms, arrow, output = call.args[0].replace(" ", "").partition("->")
    if not arrow or terms.count(",") != 1:
        return None
    names = dict(zip((slot.kind for slot in operands), terms.split(","), strict=True))
    index = {slot.kind: slot.index for slot in operands}
    data, source = names["data"], names["source"]
    if "..." in source or (("..." in data) != ("..." in output)):
        return None
    if "..." in data:
        missing = len(call.data_shapes[index["data"]]) - len(data.replace("...", ""))
        fill = "".join(chr(ord("\u0100") + i) for i in range(missing))
        data, output = data.replace("...", fill), output.replace("...", fill)
    sizes = dict(zip(data, call.data_shapes[index["data"]], strict=False))
    shape = call.sources[index["source"]].value.shape
    if any(sizes.get(letter, size) != size for letter, size in zip(source, shape, strict=False)):
        return None  # a size of 1 is broadcast
    letters = _Letters(data, source, output, index["data"], index["source"])
    if any(len(set(term)) != len(term) for term in (data, source, output)):
        return None
    if set(letters.d_in) & set(letters.d_out) or set(data) - set(source) != set(letters.rows):
        return None
    if source not in (letters.d_out + letters.d_in, letters.d_in + letters.d_out) or not letters.d_out:
        return None
    return letters if letters.rows and letters.d_in else None


EINSUM = EinsumRule()
