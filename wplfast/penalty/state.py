"""Anchors as named tensors: what a state_dict or a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.expect import describe
from ..ops.layout import flat_dtype
from .anchors import Anchors, kept_as

#: Version of the keys that ``to_state`` writes.
STATE_VERSION = 1


def to_state(names: Sequence[str], anchors: Anchors | None) -> dict[str, Tensor]:
    """Return anchors as named tensors, views of their buffers."""
    state = {"version": _number(STATE_VERSION), "n_anchors": _number(anchors.n_anchors if anchors else 0)}
    if anchors is None or anchors.n_anchors == 0:
        return state
    for i, name in enumerate(names):
        state[f"fisher.{name}"] = anchors.fisher[i]
        state[f"theta_hat.{name}"] = anchors.theta_hat[i]
        if anchors.offset is not None:
            state[f"offset.{name}"] = anchors.offset[i]
        state[f"constant.{name}"] = anchors.constant[i]
    return state


def _number(value: int) -> Tensor:
    """Return a 0-d tensor on the CPU, whatever the default device is."""
    return torch.tensor(value, device="cpu")


@dataclass
class Faults:
    """What is wrong with a state."""

    missing: list[str]
    unexpected: list[str]
    errors: list[str]


def faults(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], fisher_dtype: torch.dtype | None) -> Faults:
    """Compare a state with what ``to_state`` writes for some parameters.

    Args:
        state: the named tensors.
        parameters: by name.
        fisher_dtype: as :class:`Anchors` takes it.
    """
    for key in ("version", "n_anchors"):
        count = state.get(key)
        if isinstance(count, Tensor) and (count.numel() != 1 or count.is_floating_point() or count.is_complex()):
            return Faults([], [], [f"{key} must be one integer, got {describe(count)}"])
    wanted, optional = {"version", "n_anchors"}, {f"offset.{name}" for name in parameters}
    if has_anchors(state):
        wanted |= {f"{kind}.{name}" for kind in ("fisher", "theta_hat", "constant") for name in parameters}
    if optional & state.keys():
        wanted |= optional  # all of them or none
    found = Faults(sorted(wanted - state.keys()), sorted(state.keys() - wanted), [])
    if "version" in state and int(state["version"]) != STATE_VERSION:
        found.errors.append(f"the penalty's state must be of version {STATE_VERSION}, got {int(state['version'])}")
    if int(state.get("n_anchors", 0)) < 0:
        found.errors.append(f"n_anchors must not be negative, got {int(state['n_anchors'])}")
    for name, p in parameters.items():
        kept = kept_as(p.dtype, fisher_dtype)
        dtypes = {"fisher": kept, "theta_hat": p.dtype, "offset": flat_dtype(p.dtype), "constant": torch.float64}
        for kind, dtype in dtypes.items():
            tensor, expected = state.get(f"{kind}.{name}"), () if kind == "constant" else p.shape
            if tensor is None:
                continue
            if tensor.shape != expected:
                got = list(tensor.shape)
                found.errors.append(f"{kind}[{name!r}] must have shape {list(expected)}, got {got}")
            elif not tensor.is_floating_point():
                found.errors.append(f"{kind}[{name!r}] must be of a floating point type, got {describe(tensor)}")
            elif not bool(tensor.to(dtype).isfinite().all()) or (kind == "fisher" and bool((tensor < 0).any())):
                not_negative = " and not negative" if kind == "fisher" else ""
                found.errors.append(f"{kind}[{name!r}] must be finite{not_negative} in {dtype}")
    return found


def has_anchors(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state holds anchors, or should."""
    return bool(int(state.get("n_anchors", 0)))


def from_state(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], fisher_dtype: torch.dtype | None
) -> Anchors:
    """Return the anchors of a faultless state, laid out beside the parameters."""
    anchors = Anchors(list(parameters.values()), fisher_dtype)
    anchors.n_anchors = int(state["n_anchors"])
    for i, name in enumerate(parameters):
        anchors.theta_hat[i].copy_(state[f"theta_hat.{name}"])
        anchors.fisher[i].copy_(state[f"fisher.{name}"])
        anchors.constant[i] = state[f"constant.{name}"]
        anchors.bound[i] = anchors.fisher[i].max() if anchors.fisher[i].numel() else 0.0
    if any(key.startswith("offset.") for key in state):
        for offset, name in zip(anchors.with_offset(), parameters, strict=True):
            offset.copy_(state[f"offset.{name}"])
    return anchors
