"""What the autograd graph of a batch tells: its fingerprint, whether rows may move, and which leaves it has."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

if TYPE_CHECKING:
    from ..call_site import TappedCall

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


#: What nodes keep about the dimensions that an operation is along, and how far it turns them.
_DIMENSIONS = frozenset(
    """
    _saved_dim _saved_dim0 _saved_dim1 _saved_dim2 _saved_dimension _saved_dims _saved_shifts _saved_step
    """.split()  # noqa: SIM905
)
#: Nodes of tapped calls -> what they keep: the call, or a tuple that begins with it.
_TAPS = {"_TapBackward": "tapped", "_TappedSumBackward": "tapped", "_TappedProductBackward": "known"}
#: What they keep about sizes and places, as far as it is no tensor.
_SIZES = frozenset(
    """
    _saved_end _saved_index _saved_offset _saved_repeats _saved_self_sym_sizes _saved_size
    _saved_split_size _saved_split_sizes _saved_start _saved_storage_offset _saved_stride
    """.split()  # noqa: SIM905
)

#: Backward nodes of functions of one tensor, whose results have its shape.
_ELEMENTWISE = frozenset({"GeluBackward0", "ReluBackward0", "SigmoidBackward0", "SiluBackward0", "TanhBackward0"})
#: Those of our products and sums, whose results have as many dimensions as their data (the first that follows).
_ELEMENTWISE |= {"_TappedProductBackward", "_TappedSumBackward"}

_LEAF = type(torch.zeros((), device="cpu", requires_grad=True).expand(1).grad_fn.next_functions[0][0])  # type: ignore[union-attr]


_Attributes: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], bool, str | None]


class Fingerprint(NamedTuple):
    """The graph behind losses, as far as two batches that went through the same operations agree."""

    structure: tuple[Any, ...]  # types of nodes, how they are connected, dimensions that they are about
    sizes: tuple[Any, ...]


def fingerprint(losses: Tensor, tapped: list[TappedCall] | None = None) -> Fingerprint:
    """Describe the graph behind losses; add the tapped calls in it to a list, the last ones first.

    Which call a node belongs to is part of the structure: two whose results have one shape may exchange their roles.
    """
    structure: list[Any] = []
    sizes: list[Any] = []
    numbers: dict[Node, int] = {}
    attributes: dict[type, _Attributes] = {}
    stack = [] if losses.grad_fn is None else [losses.grad_fn]
    while stack:
        node = stack.pop()
        number = numbers.get(node)
        if number is not None:
            structure.append(number)
            continue
        numbers[node] = len(numbers)
        kind, following_nodes = type(node), node.next_functions
        structure.append(kind)
        known = attributes.get(kind)
        if known is None:
            known = attributes[kind] = _attributes_of(kind)
        along, of_sizes, is_elementwise, holder = known
        if holder is not None:
            call = _held(node, holder)
            structure.append(call.index)
            if tapped is not None:
                tapped.append(call)
        for name in along:
            structure.append(getattr(node, name))
        for name in of_sizes:
            value = getattr(node, name)
            sizes.append(value)
            if name == "_saved_stride":  # only of as_strided, which exchanges dimensions by them
                structure.append(tuple(sorted(range(len(value)), key=value.__getitem__)))
        first = following_nodes[0][0] if is_elementwise else None  # whose result has as many dimensions
        if first is None or type(first) is _LEAF:
            try:
                structure.append(len(node._input_metadata[0].shape))  # broadcasting leaves no node
            except RuntimeError:  # of a nested tensor, which has none
                structure.append("nested")
        for following, output in following_nodes:
            if following is None or type(following) is _LEAF:
                structure.append(None)  # tells which factor of a product is data
            else:
                stack.append(following)
                structure.append(-1 - output)
    return Fingerprint(tuple(structure), tuple(sizes))


@lru_cache(maxsize=1024)
def _attributes_of(kind: type) -> _Attributes:
    """Return what a kind of node keeps about dimensions, about sizes, if it is elementwise, and what keeps a call.

    Tensors are left alone: to look at one that a checkpoint holds back would run the checkpoint's forward pass again.
    """
    names = set(dir(kind))
    plain = sorted(n for n in names if f"_raw{n}" not in names)
    about = tuple(n for n in plain if n in _DIMENSIONS), tuple(n for n in plain if n in _SIZES)
    return *about, kind.__name__ in _ELEMENTWISE, _TAPS.get(kind.__name__)


def tapped_at(node: Node) -> TappedCall | None:
    """Return the call whose tap a node is."""
    holder = _attributes_of(type(node))[-1]
    return None if holder is None else _held(node, holder)


def _held(node: Node, holder: str) -> TappedCall:
    """Return the call that a node keeps, or that a tuple which it keeps begins with."""
    held = getattr(node, holder)
    call: TappedCall = held[0] if type(held) is tuple else held
    return call


def structure_behind(tensors: Sequence[Tensor], ends: Container[type]) -> tuple[Any, ...]:
    """Describe the graph behind tensors, no further than to nodes of some types."""
    found: list[Any] = []
    seen: set[Node] = set()
    stack = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            found.append(None)
            continue
        seen.add(node)
        kind = type(node)
        found.append(kind)
        for name in _attributes_of(kind)[0]:
            found.append(getattr(node, name))
        if kind not in ends:
            stack.extend(following for following, _ in node.next_functions)
    return tuple(found)


def may_reorder(kind: type) -> bool:
    """Tell whether a type of node is that of an operation that may order rows by data."""
    return kind.__name__.startswith(_REORDERING)


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
    queue: list[Node | None] = [losses.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            queue.extend(following for following, _ in node.next_functions)
