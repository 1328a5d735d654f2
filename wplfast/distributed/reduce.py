"""``Fisher.all_reduce_``: the Fishers of all ranks become one, matched by name, or every rank raises the same error.

Ranks first tell each other what they have. Whatever is wrong is found there, on all of them alike, so that none waits
for one that raised; so is what can fail on one rank alone: its values, and memory for the sums.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NameMismatchError, WplfastError
from ..fisher.faults import check_values
from ..ops.layout import flat_dtype
from ..params import some
from .agreement import collective_device, gathered, has_group

if TYPE_CHECKING:
    from ..fisher.result import Fisher

T = TypeVar("T")

#: Name -> shape and dtype, in a Fisher's order.
Entries: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

logger = logging.getLogger(__name__)

#: Bytes that are summed at a time.
BUCKET = 64 * 2**20


@dataclass
class Merged:
    """The Fisher of all ranks."""

    tensors: dict[str, Tensor]
    mean_grad: dict[str, Tensor] | None
    n_samples: int
    total_weight: float


@dataclass
class _Part:
    """What a rank tells about its Fisher."""

    digest: str  # of names, shapes and dtypes
    n_names: int
    n_samples: int
    total_weight: float
    has_grad: bool
    is_reduced: bool
    devices: set[str]


def merged(fisher: Fisher, group: Any) -> Merged:
    """Return the mean over the samples of all ranks, in this rank's dtypes and on its devices; see the module.

    Raises:
        RuntimeError: if there is no process group.
        ValueError: if this rank is not in it; on all ranks: if shapes differ, a value is NaN, infinite or negative, or
            no rank has samples.
        WplfastError: on all ranks, if the Fisher of one was reduced already, or one has no memory for the sums.
        NameMismatchError: on all ranks, if names differ.
    """
    if not has_group():
        raise RuntimeError("all_reduce_ needs a process group: call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("all_reduce_ merges over the ranks of a group, and this rank is not in it")
    entries: Entries = {name: (tuple(t.shape), t.dtype) for name, t in fisher.items()}
    parts = gathered(_described(fisher, entries), group)
    again = [str(rank) for rank, part in enumerate(parts) if part.is_reduced]
    if again:
        raise WplfastError(
            f"the Fisher of rank {', '.join(again)} was reduced already, so it counts the samples of all ranks; reduce "
            "what each rank computed itself, once"
        )
    total = sum(part.total_weight for part in parts)
    if not total > 0:
        raise ValueError(f"at least one of the {len(parts)} ranks must have samples, all have 0")
    nameless = [str(rank) for rank, part in enumerate(parts) if part.total_weight > 0 and not part.n_names]
    if nameless:
        raise ValueError(f"a Fisher without parameters must have 0 samples, which that of rank {nameless[0]} has not")
    alike = len({part.digest for part in parts}) == 1
    common = _common([entries] if alike else gathered(entries, group))
    counted = [part.has_grad for part in parts if part.total_weight > 0]
    if any(counted) and not all(counted):
        logger.warning("mean_grad is left out: only some of the ranks with samples have it")
    device = collective_device(group, set().union(*(part.devices for part in parts)), list(fisher.values()))

    def scaled() -> list[list[tuple[list[str], Tensor]]]:
        check_values(fisher, fisher.mean_grad, "all_reduce_")
        sources = [fisher, fisher.mean_grad or {}] if all(counted) else [fisher]
        return [list(_buckets(source, common, fisher.total_weight / total, device)) for source in sources]

    reduced = []
    for buckets in _on_all(scaled, group):
        sums = {}
        for names, flat in buckets:
            dist.all_reduce(flat, group=group)
            for name, part in zip(names, flat.split([_numel(common, name) for name in names]), strict=True):
                like = fisher.get(name)
                tensor = part.view(common[name][0])
                sums[name] = tensor if like is None else tensor.to(like.device, like.dtype)
        reduced.append({name: sums[name] for name in entries or common})
    n_samples = sum(part.n_samples for part in parts)
    return Merged(reduced[0], reduced[1] if all(counted) else None, n_samples, total)


def _described(fisher: Fisher, entries: Entries) -> _Part:
    """Describe this rank's Fisher."""
    return _Part(
        hashlib.sha256(repr(sorted(entries.items())).encode()).hexdigest(),
        len(entries),
        fisher.n_samples,
        fisher.total_weight,
        fisher.mean_grad is not None,
        fisher.reduced,
        {tensor.device.type for tensor in fisher.values()},
    )


def _on_all(function: Callable[[], T], group: Any) -> T:
    """Call a function that may fail; if it does on one rank, all raise."""
    result: T | None = None
    own: tuple[bool, str] | None = None
    try:
        result = function()
    except (Exception, MemoryError) as error:
        own = isinstance(error, ValueError), f"{type(error).__name__}: {error}"
    failed = {rank: fault for rank, fault in enumerate(gathered(own, group)) if fault is not None}
    if failed:
        kind = ValueError if all(is_value for is_value, _ in failed.values()) else WplfastError
        raise kind("; ".join(f"rank {rank}: {text}" for rank, (_, text) in failed.items()))
    return result  # type: ignore[return-value]


def _common(ranks: list[Entries]) -> Entries:
    """Return names, shapes and the dtype to sum in; a rank without names takes those of the others.

    Raises:
        NameMismatchError: if names differ.
        ValueError: if shapes differ.
    """
    holders = {rank: entries for rank, entries in enumerate(ranks) if entries}
    if not holders:
        return {}
    (first, reference), *others = holders.items()
    for rank, entries in others:
        alone, other = [n for n in reference if n not in entries], [n for n in entries if n not in reference]
        if alone or other:
            raise NameMismatchError(
                f"all_reduce_ needs the same names on all ranks that have any: rank {first} alone has {some(alone)}, "
                f"rank {rank} alone {some(other)}"
            )
        for name, (shape, _) in reference.items():
            if entries[name][0] != shape:
                raise ValueError(
                    f"fisher[{name!r}] must have one shape on all ranks, got {list(shape)} on rank {first}, "
                    f"{list(entries[name][0])} on rank {rank}"
                )

    def widest(name: str) -> torch.dtype:
        return flat_dtype(reduce(torch.promote_types, (entries[name][1] for entries in holders.values())))

    return {name: (shape, widest(name)) for name, (shape, _) in reference.items()}


def _buckets(
    source: Mapping[str, Tensor], common: Entries, share: float, device: torch.device
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield names, and their tensors times ``share`` (zeros if there are none) as one: the same names on all ranks."""
    names: list[str] = []
    size = 0
    ordered = sorted(common, key=lambda name: (str(common[name][1]), name))
    for name, following in zip(ordered, [*ordered[1:], None], strict=True):
        dtype = common[name][1]
        names.append(name)
        size += _numel(common, name) * dtype.itemsize
        if following is None or common[following][1] != dtype or size >= BUCKET:
            flat = torch.zeros(sum(_numel(common, n) for n in names), dtype=dtype, device=device)
            for n, part in zip(names, flat.split([_numel(common, n) for n in names]), strict=True):
                if n in source:
                    part.copy_(source[n].detach().reshape(-1)).mul_(share)
            yield names, flat
            names, size = [], 0


def _numel(common: Entries, name: str) -> int:
    """Return the number of elements of an entry."""
    return torch.Size(common[name][0]).numel()
