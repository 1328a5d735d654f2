"""Passes of two ranks beside ordinary steps of as many: ``python -m benchmarks distributed``, or one of its cases.

ddp         # whole parameters on every rank: beside a step under DistributedDataParallel
fsdp2       # sharded ones: time, what is sent and what is resident, beside a step of fully_shard
end-to-end  # sharded ones: Fisher, training, checkpoint, load in one process, beside all of it in one process
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import wplfast

from . import distributed_fsdp2, end_to_end
from .fisher import Subject, steady
from .ranks import by_collective, checked, counted, on_ranks, oracle_of_all, subject_on_rank, summary_of_ranks
from .timing import Budget, Contender
from .workloads import KNOWN, Workload

N_BATCHES, N_CALLS = 8, 11  # of a whole call; whole calls
GOAL = 1.1  # of a whole call over as many steps


def measure(workload: Workload, budget: Budget) -> dict[str, Any]:
    """Check and time one workload under DistributedDataParallel, on this rank and the others."""
    subject = subject_on_rank(workload, budget)
    watched, expected = DistributedDataParallel(subject.watched), oracle_of_all(subject)
    error = checked(subject, wplfast.fisher_diagonal(watched, [subject.batch], subject.loss_fn), expected)
    n = min(2 if budget.quick else N_BATCHES, len(subject.batches))

    def whole() -> None:
        wplfast.fisher_diagonal(watched, subject.batches[:n], subject.loss_fn)

    with steady(subject) as fisher_pass:
        subject.ordinary = DistributedDataParallel(subject.ordinary)
        found = timed(subject, {"unit": subject.unit, "fisher": fisher_pass}, budget, budget.rounds)
    calls = timed(subject, {"unit": lambda: subject.units(n), "fisher": whole}, budget, min(budget.rounds, N_CALLS))
    with counted() as counts:
        whole()
    parameters = [*subject.ordinary.parameters()]
    return {
        "workload": workload.name,
        "shown": workload.shown,
        "ranks": dist.get_world_size(),
        "parameters": sum(p.numel() for p in parameters),
        "relative_error": error,
        **found,
        "whole": {"batches": n, "target": GOAL, **calls},
        "collectives_of_a_call": by_collective(counts),
        "bytes_of_a_step": sum(p.nbytes for p in parameters),
    }


def timed(subject: Subject, runs: Mapping[str, Callable[[], object]], budget: Budget, rounds: int) -> dict[str, Any]:
    """Time runs in turns, all ranks the same ones: no rank may stop before the others."""

    def prepare() -> None:
        subject.clear()
        dist.barrier()

    budget = replace(budget, rounds=rounds, seconds=float("inf"))
    return summary_of_ranks(budget.time({name: Contender(run, prepare) for name, run in runs.items()}))


def ddp(budget: Budget, names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure the named workloads on this rank and the others."""
    return [measure(KNOWN[name], budget) for name in names]


CASES: dict[str, Callable[[Budget, Sequence[str]], Any]] = {
    "ddp": lambda budget, names: on_ranks(ddp, budget, names),
    "fsdp2": lambda budget, names: distributed_fsdp2.run(budget),
    "end-to-end": lambda budget, names: end_to_end.run(budget),
}


def run(budget: Budget, names: Sequence[str], case: str | None = None) -> dict[str, Any]:
    """Measure one case, or all; ``names``: the workloads of "ddp"."""
    return {name: measure_case(budget, names) for name, measure_case in CASES.items() if case in (None, name)}
