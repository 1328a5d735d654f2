"""Processes that start in a tenth of a second: forked from a server that has imported what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

#: What takes seconds to import: once, in the server.
PRELOADED = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "wplfast",
]


@dataclass
class Done:
    """How a process ended: its exit code, or minus the signal that ended it, and what it wrote."""

    returncode: int
    output: str


def started(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function of a module that can be imported, and return it."""
    serve()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def serve() -> None:
    """Say what the server imports, before the first process is asked for."""
    multiprocessing.set_forkserver_preload(PRELOADED)


def run_python(code: str) -> Done:
    """Run code in a process of its own, which has imported torch and wplfast already."""
    with tempfile.TemporaryDirectory() as folder:
        process = started(_run, code, f"{folder}/output")
        process.join()
        return Done(process.exitcode or 0, Path(folder, "output").read_text())


def _run(code: str, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    exec(code, {"__name__": "__main__"})
