"""``torch.einsum`` of one parameter and data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call, Slot
from ..sample_layout import SampleLayout
from .base import OneOutputRule
from .contraction import contraction, fitted
from .grad_sample import GradSample


class EinsumRule(OneOutputRule):
    """Several data tensors are multiplied first, over the letters that neither the operand nor the output has."""

    name = "einsum"

    def matches(self, call: Call) -> bool:
        """Match equations with an output over one operand and other tensors."""
        return call.func is torch.einsum and _parse(call, [t.dim() for t in call.constants]) is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the factors of the operand."""
        parsed = _parse(call, [t.dim() for t in call.constants])
        assert parsed is not None
        terms, output, position = parsed
        letters = terms.pop(position)
        slots = [slot for slot in _tensors(call) if slot.kind != "operand"]
        data = [(inputs if slot.kind == "input" else call.constants)[slot.index] for slot in slots]
        data = [tensor.detach().to(gradient.dtype) for tensor in data]
        if len(data) > 1:
            kept = "".join(dict.fromkeys(a for term in terms for a in term if a in letters or a in output))
            x, term = _product(data, terms, kept), kept
        else:
            (x,), (term,) = data, terms
        found = contraction(call.operands[0], self.name, (term, letters, output), x, gradient, layout)
        return None if found is None else [found]


def _product(data: Sequence[Tensor], terms: Sequence[str], kept: str) -> Tensor:
    """Multiply tensors and sum over the letters that are not kept."""
    names = {a: chr(ord("a") + i) for i, a in enumerate(dict.fromkeys("".join(terms)))}
    equation = ",".join("".join(names[a] for a in term) for term in terms)
    product: Tensor = torch.einsum(f"{equation}->{''.join(names[a] for a in kept)}", *data)
    return product


def _tensors(call: Call) -> list[Slot]:
    """Return what stands for the tensors, given one by one or as a list."""
    rest = call.args[1:]
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else list(rest)


def _parse(call: Call, constants: Sequence[int]) -> tuple[list[str], str, int] | None:
    """Return the terms' letters, the output's, and which term is the operand's; None unless there is exactly one."""
    if not call.args or not isinstance(call.args[0], str) or call.kwargs:
        return None
    slots = _tensors(call)
    if len(slots) < 2 or not all(isinstance(slot, Slot) for slot in slots):
        return None
    positions = [i for i, slot in enumerate(slots) if slot.kind == "operand"]
    left, arrow, output = call.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(positions) != 1 or len(terms) != len(slots):
        return None
    if not arrow:  # letters that stand once, in alphabetical order
        plain = left.replace("...", "").replace(",", "")
        output = "..." * ("..." in left) + "".join(sorted(a for a in plain if plain.count(a) == 1))
    kinds = {
        "operand": [operand.value.dim() for operand in call.operands],
        "input": [len(shape) for shape in call.input_shapes],
        "constant": constants,
    }
    found = fitted(terms, output, [kinds[slot.kind][slot.index] for slot in slots])
    return None if found is None else (*found, positions[0])


EINSUM = EinsumRule()
