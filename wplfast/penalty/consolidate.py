"""What a caller gives to a consolidation: options, F and theta_hat, found by name and checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..errors import NameMismatchError, NonFiniteError
from ..fisher.result import Fisher
from ..ops.expect import FLOATING
from ..ops.layout import by_kind
from ..params import is_sharded, names_hint, part_of, prefixes, some, suggest_prefix
from .references import References

logger = logging.getLogger(__name__)

AnchorRule: TypeAlias = Literal["merge", "replace"]
Normalization: TypeAlias = Literal["trace", "max"]
Extra: TypeAlias = Literal["error", "ignore"]


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


#: See :class:`NewerAnchor`.
OverRanks: TypeAlias = Callable[[Sequence[float]], list[float]]


class NewerAnchor(NamedTuple):
    """An anchor of some parameters that is about to enter; one entry per parameter in each list."""

    keys: list[str]  #: names in the mapping that F came from, for error messages
    theta_hat: list[Tensor]  #: on the parameters' devices, of any dtype that the parameter's can hold; parts of shards
    fisher: list[Tensor]  #: on the parameters' devices; finite and not negative; parts of shards
    largest: list[float]  #: entries of F, on all ranks
    weight: float  #: factor on F
    over_ranks: OverRanks = list  #: adds up a number for each parameter over the ranks that hold parts of it


def newer_anchor(
    parameters: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    theta_hat: Mapping[str, Tensor] | None,
    prefix: str,
    options: Options,
) -> NewerAnchor:
    """Find and check what enters for some parameters.

    Args:
        parameters: by name.
        fisher: diagonals by name.
        theta_hat: anchors by name; None means the parameters' values.
        prefix: put before every name when it is looked up.
        options: ``weight`` and ``normalize`` make the factor on F.

    Raises:
        NameMismatchError: if a name is missing.
        ValueError: if something found is no floating point tensor of the parameter's shape, F is negative or cannot be
            normalised, or theta_hat is beyond the parameter's dtype.
        NonFiniteError: if F, theta_hat or a parameter has NaN or inf.
    """
    names, theta = list(parameters), list(parameters.values())
    parts, over_ranks, most = (
        [part_of(p, p).detach() for p in theta],
        _over_ranks(theta),
        _over_ranks(theta, largest=True),
    )
    found = look_up(fisher, names, theta, "fisher", prefix)
    if theta_hat is not None:
        hats = look_up(theta_hat, names, theta, "theta_hat", prefix)
    elif isinstance(fisher, Fisher) and fisher.theta_hat is not None:  # from the file that F came from
        hats = taken(fisher.theta_hat, found.keys, theta, "theta_hat")
    else:
        hats = None
        check_finite(names, parts, "parameter")
    for key, low in zip(found.keys, found.low, strict=True):
        if low < 0:
            raise ValueError(f"fisher[{key!r}] must not be negative, got a least entry of {low:g}")
    found.high = most(found.high)
    weight = options.weight * _factor(found, options.normalize, theta, over_ranks)
    if hats is None:
        return NewerAnchor(found.keys, parts, found.tensors, found.high, weight, over_ranks)
    for key, low, high, p in zip(hats.keys, hats.low, hats.high, theta, strict=True):
        if max(-low, high) > torch.finfo(p.dtype).max:
            raise ValueError(f"theta_hat[{key!r}] has entries beyond {p.dtype}, its parameter's type")
    return NewerAnchor(found.keys, hats.tensors, found.tensors, found.high, weight, over_ranks)


def _over_ranks(parameters: Sequence[Tensor], largest: bool = False) -> OverRanks:
    """Return what adds up a number for each parameter over the ranks that hold parts of it, or finds the largest."""
    if not any(map(is_sharded, parameters)):
        return list
    from ..distributed.shards import over_ranks

    return partial(over_ranks, shards=parameters, largest=largest)


def _factor(
    found: Found, normalization: Normalization | None, parameters: Sequence[Tensor], over_ranks: OverRanks
) -> float:
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
    traces = over_ranks([float(tensor.sum(dtype=torch.float64)) for tensor in found.tensors])
    return sum(p.numel() for p in parameters) / sum(traces)


def check_mapping(given: Any, what: str) -> None:
    """Require a mapping, and tell what else there is to do with what a caller may have in its place.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(given, Mapping):
        return
    if isinstance(given, str | PathLike):
        do = f"load it first: wplfast.Fisher.load({str(given)!r}), or wpl.load({str(given)!r}) if a penalty saved it"
    elif isinstance(given, nn.Module) and what == "theta_hat":
        do = "pass its values: model.state_dict()"
    elif isinstance(given, nn.Module):
        do = "pass its Fisher: wplfast.fisher_diagonal(model, data, loss_fn)"
    elif hasattr(given, "result"):
        do = "pass what its result() returns"
    else:
        do = "pass a Fisher, or {name: tensor} with the parameters' names and shapes"
    raise TypeError(f"{what} must map names to tensors, got {type(given).__name__}: {do}")


def check_extra(
    fisher: Mapping[str, Tensor], found: Sequence[str], references: References, prefix: str, extra: Extra
) -> None:
    """Require that no name of a Fisher is left over: its parameter would silently not be anchored.

    Args:
        fisher: diagonals by name. With a prefix, other parts' names are left alone.
        found: names that were taken from it.
        references: to all parameters of the penalty, of which some may be inactive.
        prefix: put before every name when it is looked up.
        extra: ``"ignore"`` leaves out what is left over.

    Raises:
        NameMismatchError: if a name is left over.
        ValueError: if extra is of no known kind.
    """
    if extra not in get_args(Extra):
        raise ValueError(f"extra must be 'error' or 'ignore', got {extra!r}")
    taken = set(found)
    left = [key for key in fisher if key.startswith(prefix) and key not in taken]
    if extra == "ignore" or not left:
        return
    by_identity = fisher.names_of(references.tensors()) if isinstance(fisher, Fisher) and not prefix else {}
    covered = {by_identity.get(index, prefix + name) for index, name in enumerate(references.names)}
    left = [key for key in left if key not in covered]
    if left:
        raise NameMismatchError(
            f"fisher has {len(left)} names that this penalty does not cover: {some(left)}; it covers "
            f"{some(references.names)}. If the model grew, call rebind(module, new='add') first; if they are not "
            "meant, pass extra='ignore', fisher.select(names), or fisher_diagonal(..., params=) the part that is shared"
        )


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
        ValueError: if something found is no dense floating point tensor of the parameter's shape.
        NonFiniteError: if a tensor has NaN or inf.
    """
    by_identity = mapping.names_of(parameters) if isinstance(mapping, Fisher) and not prefix else {}
    keys = [by_identity.get(index, prefix + name) for index, name in enumerate(names)]
    owned = set(by_identity.values())  # what belongs to one parameter is not another one's, whatever its name is
    by_name = [key for index, key in enumerate(keys) if index not in by_identity]
    free = [key for key in mapping if key not in owned]
    if not set(free).issuperset(by_name):
        raise NameMismatchError(_what_is_missing(mapping, names, keys, by_identity, free, what, prefix))
    if isinstance(mapping, Fisher) and not (prefix or by_identity) and _knows_parameters(mapping):
        logger.info(
            "%s is of parameters that exist, and none of them is this penalty's: %s are matched by name, which is "
            "right for a copy of a model, and wrong for another part of it",
            what,
            some(by_name),
        )
    return taken(mapping, keys, parameters, what)


def _knows_parameters(fisher: Fisher) -> bool:
    """Tell whether a parameter that a Fisher was computed for still exists in this process."""
    return any(reference() is not None for reference in fisher._parameters.values())


def _what_is_missing(
    mapping: Mapping[str, Tensor],
    names: Sequence[str],
    keys: Sequence[str],
    by_identity: Mapping[int, str],
    free: Sequence[str],
    what: str,
    prefix: str,
) -> str:
    """Describe which names a mapping lacks, which it has, and what to do about it.

    Args:
        mapping: was looked into.
        names: of the parameters.
        keys: looked up for them.
        by_identity: position of a parameter -> its name in the mapping, where the parameter itself is known to it.
        free: names in the mapping that belong to none of these.
        what: is looked up.
        prefix: was put before the names.
    """
    have, given = set(free), list(mapping)
    lacking = [i for i, key in enumerate(keys) if i not in by_identity and key not in have]
    missing, bare = [keys[i] for i in lacking], [names[i] for i in lacking]
    lines = [f"{what} lacks {len(missing)} of {len(keys)} names: {some(missing)}; it has {some(given)}"]
    if by_identity:
        own = [names[i] for i in by_identity]
        lines[0] += f", of which {some([*by_identity.values()])} are this penalty's {some(own)}"
    right = "" if prefix and have.issuperset(bare) else suggest_prefix(list(free), bare)
    parts = prefixes(missing, list(free))
    covered = [name for i, name in enumerate(names) if i not in set(lacking)]
    if right is not None and right != prefix:
        lines.append(f"prefix={right!r} would match them")
    elif parts:
        part = parts[0]
        renamed = f"{{{part!r} + name: t for name, t in {what}.items()}}"
        renamed = f"{what}.rename(lambda name: {part!r} + name)" if isinstance(mapping, Fisher) else renamed
        active = [name for name in names if (prefix + name).removeprefix(part) in have]
        lines.append(
            f"its names are those of a part without {' or '.join(map(repr, parts[:3]))}: consolidate a penalty over "
            f"that part alone, or pass {renamed} with active={some(active)}"
        )
    elif covered:
        lines.append(f"pass active={some(covered)} to consolidate what it has alone")
    elif hint := names_hint(given, missing):
        lines.append(hint)
    return "; ".join(lines)


def taken(mapping: Mapping[str, Tensor], keys: list[str], parameters: Sequence[Tensor], what: str) -> Found:
    """Take every parameter's tensor by its name in a mapping; see :func:`look_up`."""
    tensors = []
    for key, parameter in zip(keys, parameters, strict=True):
        tensor, shape = mapping[key], parameter.shape
        if not (isinstance(tensor, Tensor) and _is_usable(tensor) and tensor.shape == shape):
            raise ValueError(
                f"{what}[{key!r}] must be dense, floating point (float32, float64, bfloat16 or float16) and in memory, "
                f"of shape {list(shape)}, got {_described(tensor)}"
            )
        tensors.append(part_of(tensor.detach(), parameter).to(parameter.device))
    return Found(keys, tensors, *check_finite(keys, tensors, what))


def _is_usable(tensor: Tensor) -> bool:
    """Tell whether a tensor has numbers that can be computed with, in memory that is laid out by strides."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta) and tensor.dtype in FLOATING


def _described(given: Any) -> str:
    """Describe what was given in a tensor's place."""
    if not isinstance(given, Tensor):
        return type(given).__name__
    kind = "nested" if given.is_nested else str(given.layout).removeprefix("torch.")
    kind = "" if kind == "strided" else f"{kind} "
    shape = "" if given.is_nested else str(list(given.shape))
    return f"{kind}{given.dtype}{shape}{' on meta' if given.is_meta else ''}"


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
    """Return every tensor's least and largest entry, with one synchronisation for each device and dtype."""
    low, high = [0.0] * len(tensors), [0.0] * len(tensors)
    for indices in by_kind(tensors).values():
        chosen = [index for index in indices if tensors[index].numel()]
        if chosen:
            pairs = torch.stack([extreme for index in chosen for extreme in tensors[index].detach().aminmax()])
            for index, (least, largest) in zip(chosen, pairs.double().view(-1, 2).tolist(), strict=True):
                low[index], high[index] = least, largest
    return low, high
