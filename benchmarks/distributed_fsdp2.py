"""A Fisher pass under FSDP2 beside an ordinary step: time, what collectives send, and what is resident on a rank.

A step is a forward pass and ``loss.backward()``, gradients reduced. Batches of a pass are timed within it, and each
takes its turn with a step of another model. Memory is the process's own (resident), above that of the idle model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import wplfast
from wplfast.distributed import blocks

from .fisher import Subject
from .models import Decoder
from .plumbing import malloc
from .ranks import Counts, by_collective, checked, counted, on_ranks, oracle_of_all, subject_on_rank, summary_of_ranks
from .timing import Budget
from .workloads import WORKLOADS, Batch, Workload, text

SETTLED = 3  # batches after which a pass measures nothing more and is one forward and one backward pass
TIMED = replace(WORKLOADS["tied"], shown=f"{WORKLOADS['decoder'].shown}, tied head")
#: Of blocks that are large beside what else a process holds.
WIDE = Workload(
    "wide", "decoder d=640, 6 layers, V=1000, T=32, N=1, tied head", 1.05,
    lambda quick: Decoder(50, 8, 16, 2, tied=True) if quick else Decoder(1000, 32, 640, 6, tied=True),
    text(1, 32, 1000), batches=1,
)  # fmt: skip
STATM = Path("/proc/self/statm")  # of Linux


def sharded(model: nn.Module) -> nn.Module:
    """Apply FSDP2 to each block and the root."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fisher_of(subject: Subject, data: Any) -> wplfast.Fisher:
    """Run a pass of all ranks."""
    return wplfast.fisher_diagonal(subject.watched, data, subject.loss_fn, independent=True)


def measure(budget: Budget) -> dict[str, Any]:
    """Check and time a pass on this rank and the others, and count what is sent."""
    subject = subject_on_rank(TIMED, budget)
    expected = oracle_of_all(subject)
    subject.watched, subject.ordinary = sharded(subject.watched), sharded(subject.ordinary)
    found = {name: shard.full_tensor() for name, shard in fisher_of(subject, [subject.batch]).items()}
    error = checked(subject, found, expected)
    parameters = [*subject.ordinary.parameters()]
    return {
        "workload": TIMED.name,
        "shown": TIMED.shown,
        "ranks": dist.get_world_size(),
        "parameters": sum(p.numel() for p in parameters),
        "bytes_of_parameters": sum(p.nbytes for p in parameters),
        "relative_error": error,
        **summary_of_ranks(timed(subject, budget.rounds)),
        "collectives": communicated(subject),
    }


def timed(subject: Subject, rounds: int) -> dict[str, list[float]]:
    """Return seconds of steps and of batches of one pass, in turns."""
    times: dict[str, list[float]] = {"unit": [], "fisher": []}

    def stopped(name: str) -> Callable[[], None]:
        dist.barrier()
        started = time.perf_counter()
        return lambda: times[name].append(time.perf_counter() - started)

    def data() -> Iterator[Batch]:
        for _ in range(SETTLED + rounds):
            subject.clear()
            stop = stopped("unit")
            subject.unit()
            stop()
            stop = stopped("fisher")
            yield subject.batch
            stop()

    fisher_of(subject, data())
    return {name: taken[SETTLED:] for name, taken in times.items()}


def communicated(subject: Subject) -> dict[str, Any]:
    """Return calls and bytes of a step, of batches of a pass, and of each use of the penalty."""
    found: dict[str, Counts] = {}
    with counted() as counts:
        subject.unit()
        found["step"] = counts
    seen: list[Counts] = []
    with counted() as counts:

        def data() -> Iterator[Batch]:
            for _ in range(SETTLED + 2):
                seen.append(counts.copy())
                yield subject.batch

        fisher = fisher_of(subject, data())
    found["first batch"], found["batch of a pass"] = seen[1] - seen[0], seen[-1] - seen[-2]
    wpl = wplfast.WeightPlasticityLoss(subject.watched)
    uses = {"consolidate": lambda: wpl.consolidate(fisher), "wpl()": wpl, "add_grad_()": wpl.add_grad_}
    for name, use in uses.items():
        with counted() as counts:
            use()
        found[name] = counts
    return {name: by_collective(counts) for name, counts in found.items()}


def peak(run: Callable[[], object]) -> int:
    """Return the bytes that came to be resident while something ran, at most."""

    def resident() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    malloc.give_back()
    before, seen, done = resident(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(0, max(seen) - before)


def memory(budget: Budget) -> dict[str, Any]:
    """Return bytes above the idle model: of a step with its gradients, and of a pass; and those of parts of F."""
    malloc.map_large()
    subject = subject_on_rank(WIDE, budget)
    model = subject.watched = subject.ordinary = sharded(subject.watched)
    fishers: list[wplfast.Fisher] = []
    for _ in range(2):  # what is there once and for all after a step is no step's
        subject.clear()
        of_step = peak(subject.unit)
    subject.clear()
    for module in blocks.modules_of(model):
        module.reshard()
    of_pass = peak(lambda: fishers.append(fisher_of(subject, [subject.batch] * (SETTLED + 1))))

    def size(tensors: Any) -> int:
        return sum(t.nbytes for t in tensors)

    of_blocks = [size(block.parameters()) for block in model.blocks]
    return {
        "workload": WIDE.name,
        "shown": WIDE.shown,
        "ranks": dist.get_world_size(),
        "bytes": {
            "step": of_step,
            "pass": of_pass,
            "shards of F": size(f.to_local() for f in fishers[0].values()),
            "F of a block": max(of_blocks),
            "F of the root": size(model.parameters()) - sum(of_blocks),
        },
    }


def run(budget: Budget) -> dict[str, Any]:
    """Measure on ranks of their own; memory, where the system tells it, in processes that did nothing else."""
    return {**on_ranks(measure, budget), "memory": on_ranks(memory, budget) if STATM.exists() else None}
