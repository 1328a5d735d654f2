"""One model learns the tasks one after the other, with one arm; the score of every task after every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import wplfast

from ..data.digits import Part, Split
from ..harness.training import batches, step
from .arms import Setting

Curve = list[list[float]]


@dataclass(frozen=True)
class Run:
    """One sequence, or one training on all tasks at once.

    Attributes:
        seed: of the data's split, the model and the order of samples.
        arm: what protects earlier tasks.
        setting: alpha, or which parts are frozen; None where there is nothing to choose.
        curve: test scores, [tasks * epochs, tasks]; a task has values from before it is learnt too.
        validation: the mean of all tasks' validation scores at the end.
    """

    seed: int
    arm: str
    setting: Setting
    curve: Curve
    validation: float


class Course(Protocol):
    """The tasks of one seed, and the model that learns them."""

    seed: int
    tasks: Sequence[Split]

    def begin(self) -> nn.Module:
        """Return the model as it is before the first task."""

    def first(self) -> tuple[nn.Module, Curve]:
        """Return the model after the first task, and its curve; the same for all arms: copied before it is changed."""

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return what may be frozen."""

    def importance(self, arm: str, model: nn.Module, part: Part) -> Mapping[str, Tensor]:
        """Return an arm's F of a task's training data."""

    def learn(self, model: nn.Module, part: Part, seed: int, wpl: wplfast.WeightPlasticityLoss | None = None) -> Curve:
        """Learn some data; return the test score of every task after each epoch."""

    def scores(self, model: nn.Module, part: str) -> list[float]:
        """Return the score on a part of each task's data."""


def run(course: Course, arm: str, setting: Setting) -> Run:
    """Learn all tasks with one arm."""
    if arm == "joint":
        model = course.begin()
        inputs, labels = (torch.cat(parts) for parts in zip(*(task.train for task in course.tasks), strict=True))
        return _ended(course, arm, setting, model, course.learn(model, (inputs, labels), course.seed))
    model, curve = deepcopy(course.first())
    wpl = wplfast.WeightPlasticityLoss(model, float(setting)) if isinstance(setting, float) else None
    if arm == "frozen":
        for part in map(int, str(setting).split("+")):
            course.parts(model)[part - 1].requires_grad_(False)
    for index in range(1, len(course.tasks)):
        if wpl is not None:
            wpl.consolidate(course.importance(arm, model, course.tasks[index - 1].train))  # merged with those before
        curve = curve + course.learn(model, course.tasks[index].train, course.seed + 1000 * index, wpl)
    return _ended(course, arm, setting, model, curve)


def epochs(
    model: nn.Module,
    part: Part,
    sizes: tuple[int, int, float],
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    wpl: wplfast.WeightPlasticityLoss | None = None,
) -> Iterator[None]:
    """Learn some data with a fresh Adam; yields after each epoch.

    Args:
        model: what requires grad is trained; where nothing does, epochs pass.
        part: the data.
        sizes: the number of epochs, the batch size, Adam's rate.
        seed: of the samples' order.
        loss: mean over a batch.
        wpl: a penalty.
    """
    count, batch_size, lr = sizes
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, fused=True) if trained else None
    stream = batches(part, batch_size, seed)
    for _ in range(count):
        for _ in range(max(1, len(part[1]) // batch_size) if optimizer else 0):
            step(model, optimizer, *next(stream), wpl, loss)
        yield


def _ended(course: Course, arm: str, setting: Setting, model: nn.Module, curve: Curve) -> Run:
    """Return the run of a model after the last task."""
    scores = course.scores(model, "validation")
    return Run(course.seed, arm, setting, curve, sum(scores) / len(scores))
