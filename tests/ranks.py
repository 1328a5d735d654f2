"""Real processes over gloo: many situations in one launch, since starting processes is what takes the time."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: For files of tests that start processes.
NEEDS_GLOO = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)

#: Seconds after which a rank that waits in vain gives up.
TIMEOUT = 60

Situation = Callable[[int, int], Any]


@dataclass
class Outcome:
    """What a situation came to on one rank."""

    value: Any = None
    error: str = ""  # "Type: text"
    seconds: float = 0.0
    log: tuple[str, ...] = ()

    def get(self) -> Any:
        """Return its value.

        Raises:
            AssertionError: if it raised.
        """
        assert not self.error, self.error
        return self.value


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _work(rank: int, n_ranks: int, folder: str, situations: Sequence[Situation], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ |= environment  # the server's is of when it started
    logging.getLogger("wplfast").addHandler(log := _Log())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "localhost"}
    store, timeout = Path(folder, "store").as_uri(), datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n_ranks, timeout=timeout)
    found = {}
    for situation in situations:
        dist.barrier()  # ranks begin together, so that times tell who waited for whom
        log.lines.clear()
        torch.manual_seed(0)
        outcome, started = Outcome(), time.monotonic()
        try:
            outcome.value = situation(rank, n_ranks)
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds, outcome.log = time.monotonic() - started, tuple(log.lines)
        found[situation.__name__] = outcome
    torch.save(found, Path(folder, f"result.{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def start(function: Callable[..., None], arguments: tuple[Any, ...], n_ranks: int) -> None:
    """Let processes call a function of their rank and these arguments, and wait until they end.

    Raises:
        torch.multiprocessing.ProcessException: if one of them fails.
    """
    processes.serve()
    mp.start_processes(function, arguments, nprocs=n_ranks, start_method="forkserver")


def launched(n_ranks: int, situations: Sequence[Situation], folder: Path) -> list[dict[str, Outcome]]:
    """Return every rank's outcomes, by the situations' names.

    Args:
        n_ranks: processes.
        situations: functions of the rank and the number of ranks, each of which all ranks call. They are of a module
            that can be imported, and what they return is pickled.
        folder: for files.
    """
    arguments = n_ranks, str(folder), situations, dict(os.environ)
    start(_work, arguments, n_ranks)
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(n_ranks)]
