"""Independent jobs on all cores, with one progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import TypeVar

import torch
from tqdm.auto import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """A pool of spawned processes of one thread each; without processes, a plain loop.

    Args:
        count: number of processes; 0 runs the jobs here, one after the other.
        bar: advanced by one after each job.
    """

    def __init__(self, count: int, bar: tqdm) -> None:
        """Start nothing yet: processes come with the first jobs."""
        self._bar = bar
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _one_thread) if count else None

    def __enter__(self) -> Workers:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the processes; after an error without running what still waits."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Return the results in the order of the jobs.

        Args:
            function: a module-level function, so that spawned processes can import it.
            jobs: its picklable arguments.
        """
        if self._pool is None:
            return [self._advance(function(job)) for job in jobs]
        futures = [self._pool.submit(function, job) for job in jobs]
        for future in as_completed(futures):
            self._advance(future.result())
        return [future.result() for future in futures]

    def _advance(self, result: Result) -> Result:
        """Move the bar."""
        self._bar.update(1)
        return result


def default_count(device: str) -> int:
    """Return one process per usable core on the CPU, none (a plain loop) on a GPU."""
    if device != "cpu":
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    """Keep processes from competing for cores."""
    torch.set_num_threads(1)
