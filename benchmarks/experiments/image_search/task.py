"""What a search over images is about, small enough to travel to a worker, and the run of one job there."""

from __future__ import annotations

from dataclasses import dataclass

from ...plumbing.images import load_images
from ..search.command import Job
from ..search.loop import Run, search
from ..search.problem import Cover
from .cells import Sizes
from .problem import Batches, ImageProblem


@dataclass(frozen=True)
class Task:
    """What a problem is made from, besides its seed."""

    folder: str | None
    sizes: Sizes
    batches: Batches
    device: str
    cover: Cover


def make(task: Task, seed: int) -> ImageProblem:
    """Make the problem of one run.

    All seeds have one split, so that no test image of one is a validation image of the seed that chooses settings.

    Raises:
        DataError: if the images cannot be read, or are too small.
    """
    return ImageProblem(load_images(task.folder, 0), task.sizes, task.batches, seed, task.device, task.cover)


def run(job: Job) -> Run:
    """Do one job."""
    return search(make(job.task, job.seed), job.setup, job.seed, job.lr, job.alpha)
