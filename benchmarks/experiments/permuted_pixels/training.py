"""One perceptron learns the tasks one after the other, with one arm; the accuracy of every task after every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wplfast

from ..data.digits import DIGITS, Part, Split, load_split
from ..harness.options import option, positive, several, strength
from ..harness.training import accuracy, hidden_layers
from ..row import training
from ..row.arms import Setting, importance
from ..row.training import Curve, Run, epochs

N_CLASSES = 10


@dataclass(frozen=True)
class Setup:
    """Settings that all arms have in common: every task is learnt with a fresh Adam at one rate."""

    data: str | None = option(None, str, DIGITS, metavar="DIR")
    device: str = "cpu"
    hidden: int = option(400, positive, "width of hidden layers")
    layers: int = option(2, positive, "hidden layers")
    tasks: int = option(4, several, "in a row")
    epochs: int = option(20, positive, "of each task; the record on MNIST has 4")
    batch_size: int = option(64, positive, "of training")
    lr: float = option(0.001, strength, "Adam's rate")


class Course:
    """The tasks of one seed, and the perceptron that learns them; see :class:`..row.training.Course`."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.seed, self.tasks = setup, seed, tasks(setup, seed)

    def begin(self) -> nn.Sequential:
        """Return a network of the seed's initial values."""
        return network(self.setup, *self.tasks[0].shape, self.seed)

    def first(self) -> tuple[nn.Module, Curve]:
        """Return the network after the first task, and its curve."""
        return first_task(self.setup, self.seed)

    def parts(self, model: nn.Module) -> list[nn.Linear]:
        """Return the layers that have parameters, from the input on."""
        return [module for module in model.modules() if isinstance(module, nn.Linear)]

    def importance(self, arm: str, model: nn.Module, part: Part) -> Mapping[str, Tensor]:
        """Return an arm's F of a task's training data."""
        return importance(arm, model, part, self.seed, wplfast.losses.cross_entropy, batch_size=64)

    def learn(self, model: nn.Module, part: Part, seed: int, wpl: wplfast.WeightPlasticityLoss | None = None) -> Curve:
        """Learn some data; return the test accuracy of every task after each epoch."""
        setup = self.setup
        sizes = (setup.epochs, setup.batch_size, setup.lr)
        return [self.scores(model, "test") for _ in epochs(model, part, sizes, seed, F.cross_entropy, wpl)]

    @torch.no_grad()
    def scores(self, model: nn.Module, part: str) -> list[float]:
        """Return the share of right answers on a part of each task's data."""
        return [accuracy(model(images), labels) for images, labels in (getattr(task, part) for task in self.tasks)]


def run(job: tuple[Setup, int, str, Setting]) -> Run:
    """Learn all tasks with one arm.

    Args:
        job: the settings, the seed, the arm, and its setting.
    """
    setup, seed, arm, setting = job
    return training.run(Course(setup, seed), arm, setting)


@lru_cache(maxsize=2)
def tasks(setup: Setup, seed: int) -> tuple[Split, ...]:
    """Return the tasks: digits as they are, then with their pixels in orders that the seed decides."""
    split = load_split(setup.data, seed).to(setup.device)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(*split.shape, generator=generator).to(setup.device) for _ in range(setup.tasks - 1)]
    return (split, *(split.map(lambda part, order=order: (part[0][:, order], part[1])) for order in orders))


@lru_cache(maxsize=2)
def first_task(setup: Setup, seed: int) -> tuple[nn.Sequential, Curve]:
    """Return the model after the first task, and its curve; the same for all arms: copy it before you change it."""
    course = Course(setup, seed)
    model = course.begin()
    return model, course.learn(model, course.tasks[0].train, seed)


def network(setup: Setup, n_features: int, seed: int) -> nn.Sequential:
    """Build the perceptron; the seed decides all initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = hidden_layers(n_features, setup.hidden, setup.layers)
        return hidden.append(nn.Linear(setup.hidden, N_CLASSES)).to(setup.device)
