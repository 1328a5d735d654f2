"""Anchors as named tensors: what a state_dict or a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
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
    """What is wrong with a state: keys that are missing or of no use, errors; and the names whose anchors are whole."""

    missing: list[str]
    unexpected: list[str]
    errors: list[str]
    fitting: set[str]

    @property
    def headed(self) -> bool:
        """Whether the state says of which version it is, and how many anchors it holds."""
        return not {"version", "n_anchors"} & set(self.missing)

    def join(self, others: Sequence[Faults]) -> None:
        """Take over what is wrong on other ranks, so that all load, or none.

        Args:
            others: of all ranks, in their order.
        """
        own = set(self.errors)
        for rank, other in enumerate(others):
            self.errors += [f"rank {rank}: {text}" for text in other.errors if text not in own]
            self.fitting &= other.fitting
        self.missing = sorted({key for other in others for key in other.missing})
        self.unexpected = sorted({key for other in others for key in other.unexpected})


def faults(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], fisher_dtype: torch.dtype | None, strict: bool
) -> Faults:
    """Compare a state with what ``to_state`` writes for some parameters.

    Args:
        state: the named tensors.
        parameters: by name.
        fisher_dtype: as :class:`Anchors` takes it.
        strict: whether a shape must be the parameter's. Otherwise it may be smaller, as of a head that grew since; one
            that does not fit makes its key missing and unexpected, as everything of a parameter that is not whole.
    """
    head = ["version", "n_anchors"]
    for key in head:
        count = state.get(key)
        if isinstance(count, Tensor) and (count.numel() != 1 or count.is_floating_point() or count.is_complex()):
            return Faults([], [], [f"{key} must be one integer, got {describe(count)}"], set())
    kinds = ["fisher", "theta_hat", "constant"] if has_anchors(state) else []
    if any(f"offset.{name}" in state for name in parameters):
        kinds.append("offset")  # all of them or none
    found = Faults([key for key in head if key not in state], [], [], set())
    if "version" in state and int(state["version"]) != STATE_VERSION:
        found.errors.append(f"the penalty's state must be of version {STATE_VERSION}, got {int(state['version'])}")
    if int(state.get("n_anchors", 0)) < 0:
        found.errors.append(f"n_anchors must not be negative, got {int(state['n_anchors'])}")
    used = set(head)
    for name, p in parameters.items():
        keys = {kind: f"{kind}.{name}" for kind in kinds}
        misfits = {}
        for kind, key in keys.items():
            expected = [] if kind == "constant" else list(p.shape)
            got = list(state[key].shape) if key in state else None
            if got != expected and (strict or got is None or not _within(got, expected)):
                hint = "; strict=False loads these entries" if got is not None and _within(got, expected) else ""
                misfits[key] = f"{kind}[{name!r}] must have shape {expected}, got {got}{hint}"
        shapes = {state[key].shape for kind, key in keys.items() if kind != "constant" and key in state}
        if not strict and len(shapes) > 1:
            misfits |= dict.fromkeys(keys.values(), "")
        absent = [key for key in keys.values() if key not in state]
        found.missing += absent if strict else misfits
        if strict:
            found.errors += [text for key, text in misfits.items() if key not in absent]
        if not misfits:
            found.errors += _bad_values(state, name, keys, p.dtype, fisher_dtype)
            found.fitting |= {name} if keys else set()
        if strict or not misfits:
            used |= set(keys.values())
    found.missing.sort()
    found.unexpected = sorted(state.keys() - used)
    return found


def _within(shape: Sequence[int], larger: Sequence[int]) -> bool:
    """Tell whether a shape is nowhere larger than another one."""
    return len(shape) == len(larger) and all(a <= b for a, b in zip(shape, larger, strict=True))


def _bad_values(
    state: Mapping[str, Tensor],
    name: str,
    keys: Mapping[str, str],
    dtype: torch.dtype,
    fisher_dtype: torch.dtype | None,
) -> list[str]:
    """Return what is wrong with the values of one parameter's anchors."""
    kept = kept_as(dtype, fisher_dtype)
    dtypes = {"fisher": kept, "theta_hat": dtype, "offset": flat_dtype(dtype), "constant": torch.float64}
    errors = []
    for kind, key in keys.items():
        tensor = state[key]
        if not tensor.is_floating_point():
            errors.append(f"{kind}[{name!r}] must be of a floating point type, got {describe(tensor)}")
            continue
        is_sum = kind in ("fisher", "constant")  # of squares
        if not bool(tensor.to(dtypes[kind]).isfinite().all()) or (is_sum and bool((tensor < 0).any())):
            not_negative = " and not negative" if is_sum else ""
            errors.append(f"{kind}[{name!r}] must be finite{not_negative} in {dtypes[kind]}")
    return errors


def has_anchors(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state holds anchors, or should."""
    return bool(int(state.get("n_anchors", 0)))


def from_state(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], fitting: Set[str], anchors: Anchors
) -> Anchors:
    """Write the anchors of some parameters of a faultless state into others, beside the parameters; return these.

    Args:
        state: the named tensors.
        parameters: all of the anchors', by name.
        fitting: names to take; the others keep what they have.
        anchors: nobody's yet.
    """
    anchors.n_anchors = max(anchors.n_anchors, int(state["n_anchors"]))
    offset = anchors.offset
    if any(f"offset.{name}" in state for name in fitting):
        offset = anchors.with_offset()
    for i, (name, p) in enumerate(parameters.items()):
        if name not in fitting:
            continue
        corner = tuple(slice(0, size) for size in state[f"fisher.{name}"].shape)
        anchors.theta_hat[i].copy_(p)
        anchors.theta_hat[i][corner] = state[f"theta_hat.{name}"].to(anchors.theta_hat[i])
        anchors.fisher[i].zero_()[corner] = state[f"fisher.{name}"].to(anchors.fisher[i])
        anchors.constant[i] = state[f"constant.{name}"]
        anchors.bound[i] = anchors.fisher[i].max() if anchors.fisher[i].numel() else 0.0
        if offset is not None:
            offset[i].zero_()
            if f"offset.{name}" in state:
                offset[i][corner] = state[f"offset.{name}"].to(offset[i])
    return anchors
