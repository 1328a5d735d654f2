"""Anchors as named tensors: what a state_dict or a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .anchors import Anchors

#: Version of the keys that ``to_state`` writes.
STATE_VERSION = 1


def to_state(names: Sequence[str], anchors: Anchors | None, n_anchors: int) -> dict[str, Tensor]:
    """Return anchors as named tensors, views of their buffers."""
    state = {"version": torch.tensor(STATE_VERSION), "n_anchors": torch.tensor(n_anchors)}
    if anchors is None:
        return state
    for i, name in enumerate(names):
        state[f"fisher.{name}"] = anchors.fisher[i]
        state[f"theta_hat.{name}"] = anchors.theta_hat[i]
        if anchors.offset is not None:
            state[f"offset.{name}"] = anchors.offset[i]
    state["constant"] = anchors.constant
    return state


@dataclass
class Faults:
    """What is wrong with a state."""

    missing: list[str]
    unexpected: list[str]
    errors: list[str]

    def __bool__(self) -> bool:
        """Tell whether anything is."""
        return bool(self.missing or self.unexpected or self.errors)


def faults(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Faults:
    """Compare a state with what ``to_state`` writes for parameters of these names and shapes.

    Args:
        state: the named tensors.
        shapes: the parameters' shapes by name.
    """
    wanted, optional = {"version", "n_anchors"}, {f"offset.{name}" for name in shapes}
    if has_anchors(state):
        wanted |= {f"{kind}.{name}" for kind in ("fisher", "theta_hat") for name in shapes} | {"constant"}
    if optional & state.keys():
        wanted |= optional  # all of them or none
    found = Faults(sorted(wanted - state.keys()), sorted(state.keys() - wanted), [])
    if "version" in state and int(state["version"]) != STATE_VERSION:
        found.errors.append(f"the penalty's state must be of version {STATE_VERSION}, got {int(state['version'])}")
    for name, shape in shapes.items():
        for kind in ("fisher", "theta_hat", "offset"):
            tensor = state.get(f"{kind}.{name}")
            if tensor is None:
                continue
            if tensor.shape != shape:
                got = list(tensor.shape)
                found.errors.append(f"{kind}[{name!r}] must have shape {list(shape)} as its parameter, got {got}")
            elif not bool(tensor.isfinite().all()) or (kind == "fisher" and bool((tensor < 0).any())):
                found.errors.append(f"{kind}[{name!r}] must be finite{' and not negative' * (kind == 'fisher')}")
    constant = state.get("constant")
    if constant is not None and not (constant.shape == (len(shapes),) and bool(constant.isfinite().all())):
        found.errors.append(f"constant must be finite, of shape [{len(shapes)}], got {constant}")
    return found


def has_anchors(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state holds anchors, or should."""
    return "constant" in state or bool(int(state.get("n_anchors", torch.tensor(0))))


def from_state(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], fisher_dtype: torch.dtype | None
) -> Anchors:
    """Return the anchors of a faultless state, laid out beside the parameters."""
    anchors = Anchors(list(parameters.values()), fisher_dtype)
    for i, name in enumerate(parameters):
        anchors.theta_hat[i].copy_(state[f"theta_hat.{name}"])
        anchors.fisher[i].copy_(state[f"fisher.{name}"])
    if any(key.startswith("offset.") for key in state):
        for offset, name in zip(anchors.with_offset(), parameters, strict=True):
            offset.copy_(state[f"offset.{name}"])
    anchors.constant.copy_(state["constant"])
    anchors.bound.copy_(torch.tensor([float(f.max()) if f.numel() else 0.0 for f in anchors.fisher]))
    return anchors
