"""Calls whose outputs' gradients mix samples: samples are coupled there, or the call has no sample axis."""

from __future__ import annotations

from ..call_site import TappedCall

UNKNOWN = (
    ". If the data of this call do not depend on the samples at all, that is no coupling, but one batch cannot tell: "
    "use fisher_diagonal with samples='batch', which runs a sample alone, or pass independent=True"
)

ACROSS_LOSSES = (
    ". Where a loss belongs to a packed document: do documents attend to each other? Models of Hugging Face keep them "
    "apart by position_ids, without an attention mask and with use_cache=False alone"
)


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
