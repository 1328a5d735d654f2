"""A Fisher pass of two ranks beside an ordinary step under DistributedDataParallel, whose gradients are averaged.

Both ranks run on this machine, over gloo. They begin each measurement together, and what counts is the rank that ends
last. Bytes are those that a rank hands to collectives; of a step, those of its gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import wplfast
from wplfast.distributed.agreement import gathered

from .fisher import TOLERANCE, Subject, errors_of, steady, subject_of
from .timing import Budget, Contender, quartiles, ratio
from .ways import WrongResultError
from .workloads import KNOWN, Workload

N_RANKS = 2
N_BATCHES, N_CALLS = 8, 11  # of a whole call; whole calls
GOAL = 1.1  # of a whole call over as many steps


class Replica:
    """A workload on one rank: a wrapped model that is watched, and another one that takes ordinary steps.

    Args:
        workload: with batches of each rank's own.
        budget: where, and how large.
    """

    def __init__(self, workload: Workload, budget: Budget) -> None:
        """Wrap both, which gives all ranks the model of rank 0."""
        self.subject = subject_of(workload, budget.device, budget.quick, seed=dist.get_rank())
        self.watched = DistributedDataParallel(self.subject.watched)
        self.subject.ordinary.load_state_dict(self.subject.watched.state_dict())
        self._expected = self.subject.oracle()
        self._rounds = budget

    def check(self) -> float:
        """Return the error of a reduced Fisher, relative to a parameter's largest entry.

        Raises:
            WrongResultError: if it is too large.
        """
        parts = gathered(self._expected)
        expected = {name: sum(part[name] for part in parts) / len(parts) for name in self._expected}
        subject = self.subject
        error = errors_of(wplfast.fisher_diagonal(self.watched, [subject.batch], subject.loss_fn), expected)["largest"]
        if not error <= TOLERANCE:
            raise WrongResultError(f"{subject.name}: relative error {error:.2g} against float64 on {N_RANKS} ranks")
        return error

    def whole(self, n: int) -> None:
        """Run a whole call."""
        wplfast.fisher_diagonal(self.watched, self.subject.batches[:n], self.subject.loss_fn)

    def timed(self, runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
        """Time runs in turns, all ranks the same ones: no rank may stop before the others."""

        def prepare() -> None:
            self.subject.clear()
            dist.barrier()

        budget = replace(self._rounds, rounds=rounds, seconds=float("inf"))
        own = budget.time({name: Contender(run, prepare) for name, run in runs.items()})
        times = {name: list(map(max, *(rank[name] for rank in gathered(own)))) for name in own}
        return {
            "pairs": rounds,
            "milliseconds": {name: quartiles(taken, 1e3) for name, taken in times.items()},
            "ratio": ratio(times["fisher"], times["unit"]),
        }


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Count the calls of collectives from Python, and the bytes of this rank's tensors in them."""
    found: dict[str, list[int]] = {}
    functions = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            own = next(argument for argument in reversed(arguments) if isinstance(argument, Tensor))
            found.setdefault(name, []).append(own.nbytes)
            return functions[name](*arguments, **options)

        return call

    try:
        for name in functions:
            setattr(dist, name, counting(name))
        yield found
    finally:
        for name, function in functions.items():
            setattr(dist, name, function)


def measure(workload: Workload, budget: Budget) -> dict[str, Any]:
    """Check and time one workload on this rank and the others."""
    replica = Replica(workload, budget)
    subject: Subject = replica.subject
    error = replica.check()
    n = min(2 if budget.quick else N_BATCHES, len(subject.batches))
    with steady(subject) as fisher_pass:
        subject.ordinary = DistributedDataParallel(subject.ordinary)
        found = replica.timed({"unit": subject.unit, "fisher": fisher_pass}, budget.rounds)
    runs = {"unit": lambda: subject.units(n), "fisher": lambda: replica.whole(n)}
    whole = replica.timed(runs, min(budget.rounds, N_CALLS))
    with counted() as collectives:
        replica.whole(n)
    return {
        "workload": workload.name,
        "shown": workload.shown,
        "ranks": dist.get_world_size(),
        "parameters": sum(p.numel() for p in subject.ordinary.parameters()),
        "relative_error": error,
        **found,
        "whole": {"batches": n, "target": GOAL, **whole},
        "collectives_of_a_call": {name: {"calls": len(b), "bytes": sum(b)} for name, b in collectives.items()},
        "bytes_of_a_step": sum(p.numel() * p.element_size() for p in subject.ordinary.parameters()),
    }


def _work(rank: int, folder: str, names: Sequence[str], budget: Budget, threads: int) -> None:
    """Be one rank."""
    torch.set_num_threads(threads)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=N_RANKS)
    records = [measure(KNOWN[name], budget) for name in names]
    if rank == 0:
        torch.save(records, Path(folder, "records"))
    dist.barrier()
    dist.destroy_process_group()


def run(budget: Budget, names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure the named workloads on ranks of their own, each with as many threads as this process has."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder, names, budget, torch.get_num_threads()), nprocs=N_RANKS)
        records: list[dict[str, Any]] = torch.load(Path(folder, "records"))
    return records
