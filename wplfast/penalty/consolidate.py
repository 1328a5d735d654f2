"""One consolidation: what the caller gave, checked and scaled before anything of the old state is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .anchors import Anchors
from .lookup import Found, check_finite, look_up

AnchorRule: TypeAlias = Literal["merge", "replace"]
Normalization: TypeAlias = Literal["trace", "max"]


@dataclass(frozen=True)
class Options:
    """How a Fisher enters; see :meth:`wplfast.WeightPlasticityLoss.consolidate`.

    Raises:
        ValueError: if one is out of range.
    """

    weight: float = 1.0
    decay: float = 1.0
    anchor: AnchorRule = "merge"
    normalize: Normalization | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check."""
        if self.anchor not in get_args(AnchorRule):
            raise ValueError(f"anchor must be 'merge' or 'replace', got {self.anchor!r}")
        if self.normalize is not None and self.normalize not in get_args(Normalization):
            raise ValueError(f"normalize must be 'trace', 'max' or None, got {self.normalize!r}")
        for what, value in (("weight", self.weight), ("decay", self.decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{what} must be finite and not negative, got {value}")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise ValueError(f"clip_norm must be finite and positive, got {self.clip_norm}")


def consolidate_(
    anchors: Anchors,
    indices: Sequence[int],
    names: Sequence[str],
    theta: Sequence[Tensor],
    fisher: Mapping[str, Tensor],
    theta_hat: Mapping[str, Tensor] | None,
    prefix: str,
    options: Options,
    first: bool,
) -> bool:
    """Let anchors take in a Fisher; on an error they are as they were.

    Args:
        anchors: of all parameters.
        indices: of the parameters that are consolidated.
        names: of these.
        theta: these.
        fisher: by name.
        theta_hat: by name; None means theta.
        prefix: put before every name when it is looked up.
        options: how it enters.
        first: whether the anchors hold nothing yet.

    Returns:
        Whether groups of the anchors are out of date.
    """
    found = look_up(fisher, names, theta, "fisher", prefix)
    hats = None if theta_hat is None else look_up(theta_hat, names, theta, "theta_hat", prefix)
    if hats is None:
        check_finite(names, theta, "parameter")
    for key, low in zip(found.keys, found.low, strict=True):
        if low < 0:
            raise ValueError(f"fisher[{key!r}] must not be negative, got a least entry of {low:g}")
    weight = options.weight * _factor(found, options.normalize)
    bound = options.decay * anchors.bound[list(indices)] + weight * torch.tensor(
        found.high, dtype=torch.float64, device="cpu"
    )
    for k, i in enumerate(indices):
        kept, dtype = anchors.fisher[i].dtype, theta[k].dtype
        if not bound[k] <= torch.finfo(kept).max:
            raise ValueError(f"fisher[{found.keys[k]!r}] adds up to {bound[k]:g}, more than {kept} holds")
        if hats is not None and max(-hats.low[k], hats.high[k]) > torch.finfo(dtype).max:
            raise ValueError(f"theta_hat[{hats.keys[k]!r}] has entries beyond {dtype}, its parameter's type")
    values = [p.detach() for p in theta] if hats is None else hats.tensors
    # What the anchors themselves own would be read and written at once.
    values, given = anchors.apart(values), anchors.apart(found.tensors)
    merging, had_constants = options.anchor == "merge" and not first, bool(anchors.constant.any())
    enter = anchors.merge_ if merging else anchors.replace_
    outdated = enter(indices, values, given, weight, options.decay)
    anchors.bound[list(indices)] = bound
    if options.clip_norm is not None:
        anchors.clip_(indices, options.clip_norm)
    return outdated or merging or had_constants  # the constants, which groups hold, may have changed


def _factor(found: Found, normalization: Normalization | None) -> float:
    """Return the factor that normalises the Fisher of all parameters together.

    Raises:
        ValueError: if the Fisher is zero everywhere.
    """
    if normalization is None:
        return 1.0
    if not any(found.high):
        raise ValueError("a Fisher that is zero everywhere cannot be normalised")
    if normalization == "max":
        return 1.0 / max(found.high)
    trace = sum(float(tensor.sum(dtype=torch.float64)) for tensor in found.tensors)
    return sum(tensor.numel() for tensor in found.tensors) / trace
