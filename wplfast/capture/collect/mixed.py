"""Calls whose outputs' gradients mix samples: samples are coupled there, or the call has no sample axis."""

from __future__ import annotations

from ..call_site import TappedCall

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


def is_about_positions(tapped: TappedCall, n_samples: int | None) -> bool:
    """Tell whether the data of a call are not samples: a range of indices, or of sizes that no batch axis fits in.

    Args:
        tapped: the call.
        n_samples: size of the batch axis; None if samples may have any sizes.
    """
    return all(
        is_range or (n_samples is not None and all(size % n_samples for size in shape))
        for shape, _, is_range in tapped.call.input_kinds
    )


def describe(tapped: TappedCall, names: list[str]) -> str:
    """Name the module, the operation and the parameter where samples are coupled."""
    name = names[min(tapped.parameters)]
    module = name.rpartition(".")[0] or "the model"
    return (
        f"samples are coupled at {tapped.call.name} in {module} (parameter {name!r}): its output's gradient mixes "
        "samples, so that of one sample's loss alone cannot be had (batch statistics? in-batch negatives?)"
    )
