"""Rows that hold several documents: told by what their attention is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

ADVICE = (
    "if a document is a sample, pass samples='losses' and one loss for each document, as losses.cross_entropy(outputs, "
    "labels, shift=True, sample_ids=ids) gives with ids = losses.sample_ids(position_ids); if the row is, pass "
    "samples='losses' and one loss for each row"
)


def packed(inputs: Any) -> str | None:
    """Say what shows that a row of inputs holds several documents; None if nothing does.

    Padding shows nothing, nor do positions in an image. Names of arguments tell what is what, so a tensor that is
    passed by position tells nothing.

    Args:
        inputs: the model's: a dict, or a tuple with dicts.
    """
    if type(inputs) is Tensor:
        return None
    if isinstance(inputs, (tuple, list)):
        return next(filter(None, map(packed, (part for part in inputs if isinstance(part, Mapping)))), None)
    if not isinstance(inputs, Mapping):
        return None
    for name, value in inputs.items():
        kind = _kind(name)
        if kind is None or not _is_integers(value):
            continue
        found = torch.as_tensor(value)
        if found.dim() and found.numel() and not found.is_floating_point() and kind(found, inputs):
            return f"{name} {list(found.shape)}"
    return None


def _is_integers(value: Any) -> bool:
    """Tell whether a value may be a tensor of integers, or a list of them."""
    return isinstance(value, (Tensor, np.ndarray)) or (isinstance(value, list) and {*map(type, value)} == {int})


@lru_cache(maxsize=1024)
def _kind(name: Any) -> Any:
    """Return what tells whether an input of this name shows several documents in a row; None if none does."""
    if name in ("position_ids", "input_pos"):
        return _restarts
    if name == "seq_idx":  # the number of a token's document
        return _changes
    return _has_several if isinstance(name, str) and name.startswith(("cu_seq_len", "cu_seqlen")) else None


def _restarts(positions: Tensor, inputs: Mapping[Any, Any]) -> bool:
    """Tell whether positions [N, T], [1, T] or [T] begin at 0 after others that rose."""
    if positions.dim() == 3 and len(positions) in (3, 4):  # of text or time first, then of height and width
        positions = positions[0]
    patches = "input_ids" not in inputs and any(str(key).startswith(("pixel", "image", "patch")) for key in inputs)
    if positions.dim() > 2 or patches:
        return False
    positions, together, is_known = _with_padding(positions, inputs)
    rises = together & (positions.diff() == 1) & (positions[..., :-1] >= 0)
    before = rises.cumsum(-1) - rises.long() > 0  # an earlier token of the row rose
    again = rises & (positions[..., :-1] == 0) & before
    if is_known:  # a document of one token looks like padding with zeros otherwise
        again |= together & (positions[..., 1:] == 0) & (positions[..., :-1] > 0)
    return bool(again.any())


def _changes(numbers: Tensor, inputs: Mapping[Any, Any]) -> bool:
    """Tell whether the numbers [N, T] of documents change within a row, negative ones being padding."""
    if numbers.dim() > 2:
        return False
    numbers, together, _ = _with_padding(numbers, inputs)
    return bool((together & (numbers.diff() != 0) & (numbers[..., 1:] >= 0) & (numbers[..., :-1] >= 0)).any())


def _has_several(bounds: Tensor, inputs: Mapping[Any, Any]) -> bool:
    """Tell whether bounds [M + 1] are of more documents that are neither empty nor padding than there are rows."""
    begin = bounds[..., :-1][bounds.diff() > 0].long()
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and begin.numel() and int(begin.max()) < mask.numel():
        begin = begin[mask.reshape(-1)[begin.to(mask.device)].to(begin.device) != 0]
    return len(begin) > max((t.shape[0] for t in _rows(inputs)), default=1)


def _rows(inputs: Mapping[Any, Any]) -> Iterator[Tensor]:
    """Yield the inputs that have rows."""
    for name in ("input_ids", "inputs_embeds") if {"input_ids", "inputs_embeds"} & set(inputs) else inputs:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() > (2 if name == "inputs_embeds" else 1):
            yield value


def _with_padding(found: Tensor, inputs: Mapping[Any, Any]) -> tuple[Tensor, Tensor, bool]:
    """Bring [.., T] to the shape of the attention mask; return it, which neighbours are both no padding, if known."""
    mask = inputs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == found.shape[-1]) or (
        found.dim() == 2 and len(found) not in (1, len(mask))
    ):
        return found, torch.ones_like(found[..., 1:], dtype=torch.bool), False
    real = (mask == 0 if mask.is_floating_point() and bool((mask <= 0).all()) else mask != 0).to(found.device)
    return found.expand(mask.shape), real[..., 1:] & real[..., :-1], True
