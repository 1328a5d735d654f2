"""Find the tensors of a Fisher or an anchor that belong to given parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..fisher.result import Fisher
from ..params import check_names


@dataclass
class Found:
    """What was found for each parameter: its name there, the tensor, its least and its largest entry (0 if empty)."""

    keys: list[str]
    tensors: list[Tensor]
    low: list[float]
    high: list[float]


def look_up(
    mapping: Mapping[str, Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    what: str,
    prefix: str,
) -> Found:
    """Find every parameter's tensor, by the identity of the parameter, then by name.

    Args:
        mapping: tensors by name, on any device.
        names: of the parameters.
        parameters: they give shapes, and devices that the tensors are brought to.
        what: is looked up, for error messages.
        prefix: put before every name.

    Raises:
        NameMismatchError: if a name is missing.
        ValueError: if something found is no floating point tensor of the parameter's shape.
        NonFiniteError: if a tensor has NaN or inf.
    """
    by_identity = mapping.names_of(parameters) if isinstance(mapping, Fisher) and not prefix else {}
    keys = [by_identity.get(index, prefix + name) for index, name in enumerate(names)]
    taken = set(by_identity.values())  # what belongs to one parameter is not another one's, whatever its name is
    by_name = [key for index, key in enumerate(keys) if index not in by_identity]
    check_names([key for key in mapping if key not in taken], by_name, what)
    tensors = []
    for key, parameter in zip(keys, parameters, strict=True):
        tensor, shape = mapping[key], parameter.shape
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape != shape:
            got = f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{what}[{key!r}] must be floating point of shape {list(shape)}, got {got}")
        tensors.append(tensor.detach().to(parameter.device))
    return Found(keys, tensors, *check_finite(keys, tensors, what))


def check_finite(names: Sequence[str], tensors: Sequence[Tensor], what: str) -> tuple[list[float], list[float]]:
    """Return every tensor's least and largest entry.

    Raises:
        NonFiniteError: if one has NaN or inf.
    """
    low, high = _extremes(tensors)
    for name, least, largest in zip(names, low, high, strict=True):
        if not (float("-inf") < least and largest < float("inf")):  # NaN passes through aminmax
            raise NonFiniteError(f"{what}[{name!r}] has NaN or inf")
    return low, high


def _extremes(tensors: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Return every tensor's least and largest entry, with one synchronisation for each device."""
    low, high = [0.0] * len(tensors), [0.0] * len(tensors)
    devices: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            devices.setdefault(tensor.device, []).append(index)
    for indices in devices.values():
        pairs = [torch.stack(tensors[index].detach().aminmax()).double() for index in indices]
        for index, (least, largest) in zip(indices, torch.stack(pairs).tolist(), strict=True):
            low[index], high[index] = least, largest
    return low, high
