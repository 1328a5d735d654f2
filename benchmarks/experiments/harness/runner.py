"""Independent jobs on all cores, with progress; finished ones may be kept, so that what was interrupted goes on."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from ...plumbing.record import write_bytes

Job = TypeVar("Job")
Result = TypeVar("Result")


class Runner(AbstractContextManager["Runner"]):
    """A pool of spawned processes of one thread each; without processes, a plain loop.

    Args:
        count: number of processes; 0 runs the jobs here, one after the other.
        kept: folder of finished jobs, which must exist; None: none are kept.
        version: what else results depend on, such as the commit: those of another one are not taken over.
    """

    def __init__(self, count: int = 0, kept: Path | None = None, version: str = "") -> None:
        """Start nothing yet: processes come with the first jobs."""
        self._kept, self._version = kept, version
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _one_thread) if count else None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop the processes; after an error without running what still waits."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def map(self, words: str, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Return the results in the order of the jobs.

        Args:
            words: what is done, for the bar.
            function: a module-level function, so that spawned processes can import it.
            jobs: its picklable arguments; their ``repr`` tells them apart.
        """
        call = function if self._kept is None else partial(run_kept, function, self._kept, self._version)
        bar = partial(tqdm, desc=words, total=len(jobs), unit="run")
        if self._pool is None:
            return [call(job) for job in bar(jobs)]
        futures = [self._pool.submit(call, job) for job in jobs]
        for future in bar(as_completed(futures)):
            future.result()  # so that the first error ends all
        return [future.result() for future in futures]


def run_kept(function: Callable[[Any], Any], folder: Path, version: str, job: Any) -> Any:
    """Return the kept result of an equal job if there is one, else run it and keep what comes out."""
    called = f"{version}\n{function.__module__}.{function.__qualname__}\n{job!r}"
    path = folder / f"{hashlib.sha256(called.encode()).hexdigest()[:16]}.pickle"
    if path.is_file():
        return pickle.loads(path.read_bytes())
    result = function(job)
    write_bytes(path, pickle.dumps(result))
    return result


def _one_thread() -> None:
    """Keep processes from competing for cores."""
    torch.set_num_threads(1)
