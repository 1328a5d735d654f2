"""Ranks on this machine, over gloo: how they are started, what they send, and that each measures the same.

All ranks begin each measurement together, and what counts is the one that ends last. Bytes are those of the tensors
that collectives are given: what an all-gather fills, what a reduce-scatter or an all-reduce adds up.
"""

from __future__ import annotations

import datetime
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wplfast.distributed import blocks
from wplfast.distributed.agreement import gathered

from .fisher import TOLERANCE, Subject, errors_of, subject_of, summary
from .timing import Budget
from .ways import WrongResultError
from .workloads import Workload

N_RANKS = 2
PATIENCE = datetime.timedelta(minutes=5)

#: Where collectives are called from Python, and what they are; DistributedDataParallel calls its own from C++.
COLLECTIVES = (
    (dist, "all_gather_into_tensor", "all-gather"),
    (dist, "all_gather_single", "all-gather"),
    (dist, "reduce_scatter_tensor", "reduce-scatter"),
    (dist, "reduce_scatter_single", "reduce-scatter"),
    (blocks, "_reduce_scatter", "reduce-scatter"),
    (dist, "all_reduce", "all-reduce"),
    (dist, "broadcast", "broadcast"),
    (dist, "all_gather", "agreement"),
)

Counts = Counter[tuple[str, str]]  # (collective, "calls" or "bytes")


def on_ranks(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on ranks of their own, each with as many threads as this process has; return what the first says.

    Args:
        function: of a module, which every rank imports.
        arguments: pickled for it. What it returns is made of numbers, strings, tensors, lists and dicts.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (function, arguments, folder, torch.get_num_threads()), nprocs=N_RANKS)
        return torch.load(Path(folder, "found"))


def _work(rank: int, function: Callable[..., Any], arguments: Sequence[Any], folder: str, threads: int) -> None:
    """Be one rank."""
    torch.set_num_threads(threads)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=N_RANKS, timeout=PATIENCE)
    found = function(*arguments)
    if rank == 0:
        torch.save(found, Path(folder, "found"))
    dist.barrier()
    dist.destroy_process_group()


def subject_on_rank(workload: Workload, budget: Budget) -> Subject:
    """Return a workload with the model of rank 0, and batches of each rank's own."""
    subject = subject_of(workload, budget.device, budget.quick, seed=dist.get_rank())
    for tensor in subject.watched.state_dict().values():
        dist.broadcast(tensor, 0)
    subject.ordinary.load_state_dict(subject.watched.state_dict())
    return subject


def oracle_of_all(subject: Subject) -> dict[str, Tensor]:
    """Return the Fisher of the first batches of all ranks in float64, one sample at a time; before any is wrapped."""
    parts = gathered(subject.oracle())
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


def checked(subject: Subject, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the error of a Fisher of all ranks, relative to a parameter's largest entry.

    Raises:
        WrongResultError: if it is too large.
    """
    error = errors_of(found, expected)["largest"]
    if not error <= TOLERANCE:
        raise WrongResultError(f"{subject.name}: relative error {error:.2g} against float64 on several ranks")
    return error


def summary_of_ranks(own: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Summarise the seconds of "unit" and "fisher" by round, each those of the rank that was last in it."""
    ranks = gathered(own)
    return summary({name: [max(each) for each in zip(*(r[name] for r in ranks), strict=True)] for name in own})


@contextmanager
def counted() -> Iterator[Counts]:
    """Count the collectives of this rank and their bytes; a call within another one is not counted again."""
    counts: Counts = Counter()
    is_inside = False

    def counting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(*arguments, **options)
            counts[kind, "calls"] += 1
            counts[kind, "bytes"] += max(t.nbytes for t in tree_leaves((arguments, options)) if isinstance(t, Tensor))
            is_inside = True
            try:
                return function(*arguments, **options)
            finally:
                is_inside = False

        return call

    with ExitStack() as stack:
        for place, name, kind in COLLECTIVES:
            if hasattr(place, name):
                stack.enter_context(mock.patch.object(place, name, counting(kind, getattr(place, name))))
        yield counts


def by_collective(counts: Counts) -> dict[str, dict[str, int]]:
    """Return calls and bytes by collective."""
    found: dict[str, dict[str, int]] = {}
    for (kind, what), count in counts.items():
        found.setdefault(kind, {})[what] = count
    return found
