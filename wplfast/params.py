"""What callers may pass as ``params``, and how names of two mappings are matched."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed.engines import check_engine, check_parameter, inner_module
from .errors import NameMismatchError, UnsupportedParameterError
from .ops.expect import FLOATING

#: A module (its parameters that require grad), a mapping from names to tensors, or pairs of name and tensor.
Params: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def named(
    params: Params, what: str = "params", complex_too: bool = False, sharded_too: bool = False
) -> dict[str, Tensor]:
    """Return the parameters by name.

    Args:
        params: a module (those of its parameters that require grad; of DistributedDataParallel, those of the module
            that it wraps, by that one's names), a mapping, or (name, tensor) pairs.
        what: the argument's name, for error messages.
        complex_too: complex parameters may be among them.
        sharded_too: DTensors may be among them.

    Raises:
        TypeError: if an entry is not a (str, Tensor) pair.
        ValueError: if there are none, a name or a tensor occurs twice, or a tensor is not a floating point leaf, or
            that of a lazy module that has not run.
        UnsupportedParameterError: if a tensor wraps others (DTensor and the like), or the engine that a module is
            wrapped in has no whole parameters.
    """
    check_engine(params, what)
    params = inner_module(params)
    if isinstance(params, nn.Module):
        pairs: list[tuple[str, Tensor]] = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        if not pairs:
            raise ValueError(f"{what}: {type(params).__name__} has no parameters that require grad")
    elif isinstance(params, Mapping):
        pairs = list(params.items())
    elif isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"{what} must be a Module, a mapping or (name, tensor) pairs, got {type(params).__name__}")
    else:
        pairs = []
        for entry in params:
            if not (isinstance(entry, tuple) and len(entry) == 2):
                raise TypeError(f"{what} must hold (name, tensor) pairs, got {_no_pair(params, entry)}")
            pairs.append(entry)
    found: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in pairs:
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise TypeError(f"{what} must map str to Tensor, got {type(name).__name__} -> {type(tensor).__name__}")
        if name in found:
            raise ValueError(f"{what}: the name {name!r} occurs twice")
        if id(tensor) in names:
            raise ValueError(f"{what}: {names[id(tensor)]!r} and {name!r} are the same tensor; pass it under one name")
        check_has_shape(f"{what}[{name!r}]", tensor)
        if not tensor.is_leaf:
            raise ValueError(f"{what}[{name!r}] must be a leaf tensor (a parameter), got the result of an operation")
        sharded = sharded_too and is_sharded(tensor)
        if not sharded:
            check_parameter(name, tensor, what)
        if _wraps_others(tensor) and not sharded:
            raise UnsupportedParameterError(f"{what}[{name!r}] must have memory of its own, got a {type(tensor)}")
        if tensor.is_neg():
            raise ValueError(f"{what}[{name!r}] must not be a negated view (torch._neg_view)")
        if tensor.dtype not in FLOATING and not (complex_too and tensor.dtype in (torch.complex64, torch.complex128)):
            raise ValueError(f"{what}[{name!r}] must be of a floating point type, got {tensor.dtype}")
        found[name], names[id(tensor)] = tensor, name
    if not found:
        raise ValueError(f"{what} is empty")
    return found


#: What to pass in the place of names or patterns.
_BY_NAME = (
    "names choose nothing, pass the part of the model itself, such as model.head, or {n: p for n, p in "
    "model.named_parameters() if n.startswith('head.')}"
)


def _no_pair(params: Any, entry: Any) -> str:
    """Describe an entry of params that is no pair, and say what to pass in its place."""
    if isinstance(params, str):
        return f"{params!r}: {_BY_NAME}"
    described = f"an entry of {type(entry).__name__}"
    if isinstance(entry, str):
        return f"{described}, {entry!r}: {_BY_NAME}"
    if isinstance(entry, Tensor):
        return f"{described}, without a name: pass the model itself, or model.named_parameters()"
    if isinstance(entry, nn.Module):
        return f"{described}, a module: pass a module as it is, not in a list; several as one, nn.ModuleList([...])"
    return described


def check_has_shape(what: str, tensor: Tensor) -> None:
    """Refuse a parameter or buffer of a lazy module that has not run.

    Raises:
        ValueError: if it is one.
    """
    if is_lazy(tensor):
        raise ValueError(f"{what} has no shape yet, as its module is lazy: run one batch through the model first")


def _wraps_others(tensor: Any) -> bool:
    """Tell whether a tensor is a wrapper of others (DTensor and the like)."""
    return is_traceable_wrapper_subclass(tensor)


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor; torch.distributed is not imported for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a tensor that lies where that of a parameter on this rank does; all of it for whole ones."""
    if not (is_sharded(tensor) or is_sharded(parameter)):
        return tensor
    from .distributed.shards import local_part  # not with the package

    return local_part(tensor, parameter)


def is_fully_sharded(model: Any) -> bool:
    """Tell whether FSDP2's ``fully_shard`` was applied to a model, or to parts of it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return (
        module is not None
        and isinstance(model, nn.Module)
        and any(isinstance(part, module.FSDPModule) for part in model.modules())
    )


def check_names(given: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Require that every wanted name is given.

    Raises:
        NameMismatchError: if one is missing; the message lists both sides and suggests a prefix that would match.
    """
    given, wanted = list(given), list(wanted)
    have = set(given)
    missing = [name for name in wanted if name not in have]
    if not missing:
        return
    lacks = f"{what} lacks {len(missing)} of {len(wanted)} names: {some(missing)}; it has {some(given)}"
    prefix = suggest_prefix(given, wanted)
    hint = names_hint(given, missing) if prefix is None else f"prefix={prefix!r} would match them"
    raise NameMismatchError("; ".join([lacks, *filter(None, [hint])]))


def names_hint(given: list[str], missing: list[str]) -> str:
    """Say how given names are related to missing ones: as names of a part of a module, or as a name misspelt."""
    found = prefixes(missing, given)
    if found:
        return f"its names are missing ones without {' or '.join(map(repr, found[:3]))}"
    close = difflib.get_close_matches(missing[0], given, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def suggest_prefix(given: list[str], wanted: list[str]) -> str | None:
    """Return the prefix that, put before every wanted name, gives a given name; None if there is no such one."""
    return next(iter(prefixes(given, wanted)), None)


def prefixes(given: list[str], wanted: list[str]) -> list[str]:
    """Return all prefixes that, put before every wanted name, give given names."""
    have = set(given)
    found = [name.removesuffix(wanted[0]) for name in given if wanted and name.endswith(wanted[0])]
    return [prefix for prefix in found if prefix and all(prefix + w in have for w in wanted)]


def some(names: list[str], most: int = 6) -> str:
    """List a few names for a message."""
    shown = ", ".join(map(repr, names[:most]))
    return f"[{shown}{', ...' if len(names) > most else ''}]"


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """Return the device of the first tensor."""
    return next(iter(tensors)).device
