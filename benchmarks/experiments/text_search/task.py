"""What a search over text is about, small enough to travel to a worker, and the run of one job there."""

from __future__ import annotations

from dataclasses import dataclass

from ...plumbing.text import Files, load_text
from ..search.command import Job
from ..search.loop import Run, search
from ..search.problem import Cover
from .cells import Sizes
from .problem import Batches, TextProblem


@dataclass(frozen=True)
class Task:
    """What a problem is made from, besides its seed."""

    files: Files
    vocabulary: int
    sizes: Sizes
    batches: Batches
    device: str
    cover: Cover


def make(task: Task, seed: int) -> TextProblem:
    """Make the problem of one run.

    Raises:
        DataError: if the text cannot be read, or is too short.
    """
    text = load_text(task.files, task.vocabulary)
    return TextProblem(text, task.sizes, task.batches, seed, task.device, task.cover)


def run(job: Job) -> Run:
    """Do one job."""
    return search(make(job.task, job.seed), job.setup, job.seed, job.lr, job.alpha)
