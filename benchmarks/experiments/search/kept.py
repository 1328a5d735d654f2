"""Finished runs in files, so that a comparison that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...plumbing.record import write_json
from .loop import Run


@dataclass(frozen=True)
class Kept:
    """A function of jobs whose results are kept, one file for each job.

    Args:
        function: runs a job; at module level, so that workers can import it.
        folder: of the files; it must exist.
        version: what else results depend on, such as the commit: those of another one are not taken over.
    """

    function: Callable[[Any], Run]
    folder: Path
    version: str

    def __call__(self, job: Any) -> Run:
        """Return the result of an equal job if there is one, else run it; jobs are told apart by their ``repr``."""
        name = hashlib.sha256(f"{self.version}\n{job!r}".encode()).hexdigest()[:16]
        path = self.folder / f"{name}.json"
        if path.is_file():
            return Run(**json.loads(path.read_text()))
        run = self.function(job)
        write_json(path, asdict(run))
        return run
