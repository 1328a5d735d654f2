"""Where the logits lie among a model's outputs, and the labels among a batch's targets."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capture.watched import map_tensors, tensors_in


@dataclass(frozen=True)
class Place:
    """Tensors of a tree, by their numbers among all of its tensors; two of one shape are stacked along dimension 1."""

    indices: tuple[int, ...]

    def get(self, tree: Any) -> Tensor:
        """Return the tensor, or the stack."""
        found = leaves_of(tree)
        parts = [found[index] for index in self.indices]
        return parts[0] if len(parts) == 1 else torch.stack(parts, 1)

    def put(self, tree: Any, value: Tensor) -> Any:
        """Return the tree with another tensor in this place."""
        parts = [value] if len(self.indices) == 1 else value.unbind(1)
        return replaced(tree, dict(zip(self.indices, parts, strict=True)))


def leaves_of(tree: Any) -> list[Tensor]:
    """List the tensors of nested tuples, lists and dicts, or of an object's attributes."""
    found = tree if _is_tree(tree) else getattr(tree, "__dict__", ())
    return list(tensors_in(found))


def replaced(tree: Any, values: Mapping[int, Tensor]) -> Any:
    """Return the tree with other tensors in the places of some; objects are copied."""
    number = iter(range(1 << 30))

    def change(tensor: Tensor) -> Tensor:
        return values.get(next(number), tensor)

    if _is_tree(tree) and not (isinstance(tree, dict) and type(tree) is not dict):
        return map_tensors(change, tree)
    changed = copy.copy(tree)
    if isinstance(tree, dict):  # a ModelOutput sets the attribute with the item
        for key, item in map_tensors(change, dict(tree)).items():
            changed[key] = item
    else:
        for key, item in map_tensors(change, vars(tree)).items():
            setattr(changed, key, item)
    return changed


def logits_places(outputs: Any) -> list[Place]:
    """List where logits (or means) may lie, likely places first."""
    found = leaves_of(outputs)
    named = dict(outputs) if isinstance(outputs, dict) else getattr(outputs, "__dict__", {})
    for names in (("logits",), ("start_logits", "end_logits")):
        if all(isinstance(named.get(name), Tensor) for name in names):
            return [Place(tuple(_number(found, named[name]) for name in names))]
    floats = [index for index, tensor in enumerate(found) if tensor.is_floating_point() and tensor.dim()]
    places = [Place((index,)) for index in floats[:4]]
    if len(floats) > 1 and found[floats[0]].shape == found[floats[1]].shape:
        places.append(Place((floats[0], floats[1])))
    return places


def label_places(targets: Any, stacked: bool, floating: bool) -> Iterator[Place]:
    """Yield where labels may lie; none where the targets hold nothing of that kind.

    Args:
        targets: a tensor, or a tree of them.
        stacked: the logits are a stack of two.
        floating: labels may be floating point (one for each output), in a tree that holds other tensors, too.
    """
    if isinstance(targets, Tensor):
        yield Place((0,))
        return
    found = leaves_of(targets) if _is_tree(targets) else []
    if isinstance(targets, dict) and isinstance(targets.get("labels"), Tensor):
        yield Place((_number(found, targets["labels"]),))
        return
    fit = [n for n, t in enumerate(found) if t.dtype != torch.bool and (floating or not t.is_floating_point())]
    if stacked and len(fit) > 1 and found[fit[0]].shape == found[fit[1]].shape:
        yield Place((fit[0], fit[1]))
    yield from (Place((index,)) for index in fit)


def _is_tree(tree: Any) -> bool:
    """Tell what ``tensors_in`` looks into."""
    return isinstance(tree, (Tensor, tuple, list, dict))


def _number(found: list[Tensor], tensor: Tensor) -> int:
    """Return the number of a tensor in a list, by identity."""
    return next(number for number, other in enumerate(found) if other is tensor)
