"""Find the tensors of a Fisher or an anchor that belong to given parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import NonFiniteError
from .fisher import Fisher
from .parameters import check_names


def look_up(
    mapping: Mapping[str, Tensor],
    names: Sequence[str],
    theta: Sequence[Tensor],
    index: Mapping[str, int],
    what: str,
    prefix: str,
) -> dict[str, Tensor]:
    """Find every name's tensor, by the identity of its parameter, then by name; check shapes and values."""
    by_identity = mapping.names_of(theta) if isinstance(mapping, Fisher) and not prefix else {}
    keys = {name: by_identity.get(index[name], prefix + name) for name in names}
    check_names(mapping, keys.values(), what)
    found = {}
    for name, key in keys.items():
        tensor, shape = mapping[key], theta[index[name]].shape
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape != shape:
            got = f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{what}[{key!r}] must be floating point of shape {list(shape)}, got {got}")
        if tensor.numel():
            low, high = tensor.detach().aminmax()
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NonFiniteError(f"{what}[{key!r}] has NaN or inf")
            if what == "fisher" and bool(low < 0):
                raise ValueError(f"fisher[{key!r}] must not be negative, got a least entry of {low.item():g}")
        found[name] = tensor.detach()
    return found
