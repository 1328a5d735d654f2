"""What the autograd graph of a batch tells: how rows may move, and which leaves will be given gradients."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

#: Backward nodes of operations that put rows where the data say: their order may differ from batch to batch.
_REORDERING = (
    "CheckpointFunctionBackward",  # reentrant: what happens inside cannot be seen from here
    "Gather",
    "Index",  # also IndexSelect, IndexAdd, IndexPut, IndexCopy, IndexReduce
    "MaskedScatter",
    "MaskedSelect",
    "PackPaddedSequence",
    "RepeatInterleave",
    "Scatter",  # also ScatterAdd, ScatterReduce
    "Sort",
    "Take",
    "Topk",
)


def reorders_rows(losses: Tensor) -> bool:
    """Tell whether an operation between the parameters and the losses may order rows by data."""
    n_samples = len(losses)
    return any(
        (name := node.name()).startswith(_REORDERING) or _joins(node, name, n_samples) for node in _nodes(losses)
    )


def _joins(node: Node, name: str, n_samples: int) -> bool:
    """Tell whether a node joins one tensor per sample, or moves rows in a circle, along dimension 0."""
    if name.startswith(("CatBackward", "StackBackward")):
        return len(node.next_functions) == n_samples > 1 and getattr(node, "_saved_dim", 0) == 0
    if name.startswith("RollBackward"):
        dims = getattr(node, "_saved_dims", ())
        return not dims or 0 in dims
    return False


def leaves(losses: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a backward pass would give gradients."""
    return [node.variable for node in _nodes(losses) if hasattr(node, "variable")]  # AccumulateGrad has one


def _nodes(losses: Tensor) -> Iterator[Node]:
    """Yield every node of the graph once."""
    seen: set[Node] = set()
    queue = [losses.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            queue.extend(following for following, _ in node.next_functions)
