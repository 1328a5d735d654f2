"""Calls whose outputs' gradients mix samples: samples are coupled there, or the call has no sample axis."""

from __future__ import annotations

import torch

from ..call import Call, Operand
from ..call_site import TappedCall

#: Why a pass went on that could not look further.
TAKEN_FOR_POSITIONS = (
    "data without a batch axis (positions, masks?) were taken to be the same for all samples, and not for statistics "
    "of the batch: an accumulator cannot run a sample alone. independent=True is your word for it"
)

ACROSS_LOSSES = (
    ". Where a loss belongs to a packed document: do documents attend to each other? Models of Hugging Face keep them "
    "apart by position_ids, without an attention mask and with use_cache=False alone. Where it belongs to a node: its "
    "neighbours take part in its loss, so a graph is a sample, with one loss for each"
)
ACROSS_ROWS = (
    ". If a loss belongs to something that owns several rows (a graph with its nodes and edges, a packed document), "
    "give one loss for each such sample and pass samples='losses'"
)


def advice(may_be_positions: bool, by_losses: bool, may_replay: bool, moves_rows: bool) -> str:
    """Say what to do where it is not known whether samples are independent.

    Args:
        may_be_positions: no call that mixes samples has differentiable inputs, so that its data may be no samples.
        by_losses: a sample is what a loss belongs to.
        may_replay: ``fisher_diagonal`` runs the model, which has tried to run a sample alone.
        moves_rows: rows are gathered or scattered somewhere.
    """
    found = ""
    if may_be_positions:
        found = ". If the data of this call do not depend on the samples at all, that is no coupling, but one batch "
        found += "cannot tell: pass independent=True"
        if by_losses:
            found += ", or samples='batch' if each sample is one of the batch's rows, which runs one alone"
        elif not may_replay:
            found += ", or use fisher_diagonal, which runs a sample alone"
    return found + (ACROSS_LOSSES if by_losses else ACROSS_ROWS if moves_rows else "")


#: Functions that combine tensors entry by entry, or normalise and then do so.
_ENTRY_BY_ENTRY = frozenset(
    """
    __add__ __iadd__ __imul__ __isub__ __itruediv__ __mul__ __pow__ __radd__ __rmul__ __rpow__ __rsub__ __rtruediv__
    __sub__ __truediv__ add addcdiv addcmul copysign div divide fmax fmin layer_norm lerp masked_fill maximum minimum
    mul multiply pow rms_norm rsub sub subtract true_divide where
    """.split()  # noqa: SIM905
)


def is_about_positions(tapped: TappedCall, n_samples: int | None) -> bool:
    """Tell whether the data of a call are not samples: a range of indices, or of sizes that no batch axis fits in.

    Axes that have the size of a parameter's whatever the batch is (those of a mask of a weight) are none of the batch.

    Args:
        tapped: the call.
        n_samples: size of the batch axis; None if samples may have any sizes.
    """
    own = _sizes_of_parameters(tapped.call)

    def is_free(place: int, size: int) -> bool:
        return size == own.get(place) or (n_samples is not None and size % n_samples != 0)

    return all(
        _is_of_indices(kind) or all(is_free(place, size) for place, size in _axes(kind[0]))
        for kind in tapped.call.input_kinds
    )


def is_of_indices(tapped: TappedCall) -> bool:
    """Tell whether the data of a call are ranges of indices, which cannot have been computed from samples."""
    return all(map(_is_of_indices, tapped.call.input_kinds))


def _is_of_indices(kind: tuple[torch.Size, torch.dtype, bool]) -> bool:
    """Tell whether data of a kind are a range of integers: numbers that count up may be samples."""
    _, dtype, is_range = kind
    return is_range and not dtype.is_floating_point


def _axes(shape: torch.Size) -> list[tuple[int, int]]:
    """Return the sizes of a tensor's axes, each after its place from the right."""
    return list(enumerate(reversed(shape)))


def _sizes_of_parameters(call: Call) -> dict[int, int]:
    """Return the sizes that a call's data must have to meet those of parameters, by places from the right.

    A tensor that was computed from parameters counts if it has as many entries as one of them: others may have been
    expanded to the size of the batch.
    """
    found: dict[int, int] = {}
    weight = call.operand_at(1, "weight") if call.name == "linear" else None
    if weight is not None and _is_whole(weight):
        return {0: weight.value.shape[-1]}
    if call.name in _ENTRY_BY_ENTRY:
        for operand in filter(_is_whole, call.operands):
            found |= {place: size for place, size in _axes(operand.value.shape) if size > 1}
    return found


def _is_whole(operand: Operand) -> bool:
    """Tell whether an operand has as many entries as a parameter below it."""
    return operand.graph is None or any(operand.value.numel() == leaf.numel() for leaf in operand.leaves)


def describe(tapped: TappedCall, names: list[str]) -> str:
    """Name the module, the operation and the parameter where samples are coupled."""
    name = names[min(tapped.parameters)]
    module = name.rpartition(".")[0] or "the model"
    return (
        f"samples are coupled at {tapped.call.name} in {module} (parameter {name!r}): its output's gradient mixes "
        "samples, so that of one sample's loss alone cannot be had (batch statistics? in-batch negatives?)"
    )
