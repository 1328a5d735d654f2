"""Fishers as files: which tensors and metadata a file holds, and what is checked when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import storage
from ..ops.layout import as_real
from ..params import check_names, is_sharded, some
from .faults import check_values, pop_counts

if TYPE_CHECKING:
    from .result import Fisher

#: What the files are stamped with.
KIND = "fisher"

#: Metadata of files of Fishers that were reduced.
REDUCED = "wplfast.all_reduced"

#: Key of the names whose mean gradients are complex: files hold their real and imaginary parts, [*shape, 2].
COMPLEX = "wplfast.complex"

#: The parts of a file: its tensors are named PART.NAME.
PARTS = ("fisher", "mean_grad", "theta_hat")


def save(fisher: Fisher, path: storage.FilePath, theta_hat: nn.Module | Mapping[str, Tensor] | None) -> None:
    """Write a Fisher; see :meth:`wplfast.Fisher.save`."""
    with _together(fisher, "saving a Fisher"):
        check_values(fisher, fisher.mean_grad, "a Fisher to be saved")
    tensors = {f"fisher.{name}": tensor for name, tensor in fisher.items()}
    gradients = fisher.mean_grad or {}
    tensors |= {f"mean_grad.{name}": as_real(tensor) for name, tensor in gradients.items()}
    values = fisher.theta_hat if theta_hat is None else _values(fisher, theta_hat)
    tensors |= {f"theta_hat.{name}": tensor for name, tensor in (values or {}).items()}
    pairs = [name for name, tensor in gradients.items() if tensor.is_complex()]
    stamped = stamps(list(fisher), fisher.n_samples, fisher.total_weight, fisher.reduced, pairs)
    storage.save(path, tensors, KIND, {**fisher.metadata, **stamped})


def load(path: storage.FilePath, device: str | torch.device) -> dict[str, Any]:
    """Read a Fisher; return the arguments that make it, see :meth:`wplfast.Fisher.load`."""
    where = os.fsdecode(path)
    tensors, metadata = storage.load(path, KIND)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, rest = divided(name, where)
        parts[part][rest] = tensor
    try:
        for name in json.loads(metadata.get(COMPLEX, "[]")):
            parts["mean_grad"][name] = torch.view_as_complex(parts["mean_grad"][name])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{where}: its mean gradients are not those of its metadata: {error}") from error
    names, n_samples, total_weight = pop_counts(metadata, where)
    check_held(names, list(parts["fisher"]), where)
    check_values(parts["fisher"], parts["mean_grad"], where)
    moved = {part: {name: tensor.to(device) for name, tensor in held.items()} for part, held in parts.items()}
    return {
        "tensors": {name: moved["fisher"][name] for name in names},
        "n_samples": n_samples,
        "total_weight": total_weight,
        "mean_grad": moved["mean_grad"] or None,
        "theta_hat": moved["theta_hat"] or None,
        "metadata": {key: value for key, value in metadata.items() if not key.startswith("wplfast.")},
        "reduced": metadata.get(REDUCED) == "true",
    }


def stamps(
    names: list[str], n_samples: int, total_weight: float, reduced: bool = False, pairs: list[str] | None = None
) -> dict[str, str]:
    """Return the metadata that every file of a Fisher has."""
    found = {"names": json.dumps(names), "n_samples": str(n_samples), "total_weight": repr(total_weight)}
    found |= {REDUCED: "true"} if reduced else {}
    return found | ({COMPLEX: json.dumps(pairs)} if pairs else {})


def divided(name: str, where: str) -> tuple[str, str]:
    """Return the part of a file that a tensor belongs to, and the parameter's name.

    Raises:
        ValueError: if it belongs to none.
    """
    part, _, rest = name.partition(".")
    if part not in PARTS:
        raise ValueError(f"{where}: tensors must be named {' or '.join(f'{p}.NAME' for p in PARTS)}, got {name!r}")
    return part, rest


def check_held(names: list[str], held: list[str], where: str) -> None:
    """Require that a file holds the diagonals that its metadata name.

    Raises:
        ValueError: if it holds others.
    """
    if set(names) != set(held):
        raise ValueError(f"{where}: it must hold the names {some(names)} of its metadata, got {some(held)}")


def _together(fisher: Fisher, what: str) -> AbstractContextManager[None]:
    """Let all ranks succeed in something, or none, where F lies as shards on them."""
    if not any(map(is_sharded, fisher.values())):
        return nullcontext()
    from ..distributed.shards import together  # not with the package

    return together(list(fisher.values()), what)


def _values(fisher: Fisher, theta_hat: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters' values under a Fisher's names, found by identity, then by name.

    Raises:
        NameMismatchError: if one is missing.
        ValueError: if a shape differs.
    """
    given = dict(theta_hat.named_parameters() if isinstance(theta_hat, nn.Module) else theta_hat)
    names = list(given)
    found = {own: given[names[i]] for i, own in fisher.names_of(list(given.values())).items()}
    check_names(given, [name for name in fisher if name not in found], "theta_hat")
    values = {name: found[name] if name in found else given[name] for name in fisher}
    for name, value in values.items():
        if value.shape != fisher[name].shape:
            expected, got = list(fisher[name].shape), list(value.shape)
            raise ValueError(f"theta_hat[{name!r}] must have shape {expected} as its Fisher, got {got}")
    return values
