"""What no Fisher can be: checked without looking at values where one is made, wholly where one is saved or loaded."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.expect import FLOATING
from ..params import part_of, some


def check_form(
    tensors: Mapping[str, Tensor], mean_grad: Mapping[str, Tensor] | None, n_samples: int, total_weight: float
) -> None:
    """Check what costs nothing: counts, and that a mean gradient is one of the same parameters.

    Raises:
        TypeError: if an entry is no tensor, or n_samples no integer.
        ValueError: if a count is negative or not finite, or names or shapes of the mean gradient are others.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fisher[{name!r}] must be a tensor, got {type(tensor).__name__}")
    if operator.index(n_samples) < 0:
        raise ValueError(f"n_samples must not be negative, got {n_samples}")
    if not 0 <= total_weight < math.inf:
        raise ValueError(f"total_weight must be finite and not negative, got {total_weight}")
    if mean_grad is None:
        return
    if mean_grad.keys() != tensors.keys():
        lacking, more = sorted(tensors.keys() - mean_grad.keys()), sorted(mean_grad.keys() - tensors.keys())
        raise ValueError(f"mean_grad must have the names of the Fisher; it lacks {some(lacking)}, and has {some(more)}")
    for name, tensor in tensors.items():
        if mean_grad[name].shape != tensor.shape:
            expected, got = list(tensor.shape), list(mean_grad[name].shape)
            raise ValueError(f"mean_grad[{name!r}] must have shape {expected} as the Fisher, got {got}")


def check_values(tensors: Mapping[str, Tensor], mean_grad: Mapping[str, Tensor] | None, where: str) -> None:
    """Check every number, in one pass and without temporary memory; of shards (DTensor) those of this rank.

    Raises:
        ValueError: if one is NaN or infinite, or an F negative, or a tensor is of no floating point type.
    """
    for kind, part, least in (("fisher", tensors, 0.0), ("mean_grad", mean_grad or {}, -math.inf)):
        for name, given in part.items():
            tensor = part_of(given.detach(), given)
            if kind == "mean_grad" and tensor.is_complex():
                tensor = torch.view_as_real(tensor.detach().resolve_conj())
            if tensor.dtype not in FLOATING:
                raise ValueError(f"{where}: {kind}[{name!r}] must be of a floating point type, got {tensor.dtype}")
            if not tensor.numel():
                continue
            low, high = (float(extreme) for extreme in tensor.detach().aminmax())  # NaN where one entry is
            if not (least <= low and -math.inf < low and high < math.inf):
                negative = " and not negative" if kind == "fisher" else ""
                raise ValueError(f"{where}: {kind}[{name!r}] must be finite{negative}, got {low:g} to {high:g}")


def pop_counts(metadata: dict[str, str], where: str) -> tuple[list[str], int, float]:
    """Take names, n_samples and total_weight out of a file's metadata.

    Raises:
        ValueError: if one is missing, or is not what a Fisher writes.
    """

    def pop(key: str) -> str:
        if key not in metadata:
            raise ValueError(f"{where}: the metadata lacks {key!r}; it has {some(sorted(metadata))}")
        return metadata.pop(key)

    def bad(key: str, expected: str, got: str) -> ValueError:
        return ValueError(f"{where}: {key} must be {expected}, got {got[:80]!r}")

    text, count, weight = pop("names"), pop("n_samples"), pop("total_weight")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise bad("names", "a JSON list of different strings", text)
    if not (count.isascii() and count.isdigit() and len(count) < 20):
        raise bad("n_samples", "an integer, not negative", count)
    try:
        total = float(weight)
    except ValueError:
        raise bad("total_weight", "a number", weight) from None
    if not 0 <= total < math.inf:
        raise bad("total_weight", "finite and not negative", weight)
    return names, int(count), total
