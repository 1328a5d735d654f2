"""One perceptron learns the tasks one after the other, with one arm; the accuracy of every task after every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import wplfast

from ..data.digits import DIGITS, Part, Split, load_split
from ..harness.options import option, positive, several, strength
from ..harness.training import accuracy, batch_squared, batches, hidden_layers, step

#: what an arm's F is, or what it does in place of a penalty; "squared" has a batch size behind it, such as "squared 64"
ARMS = {
    "none": "no penalty",
    "frozen": "layers frozen after the first task",
    "l2": "L2 anchor (F = 1)",
    "mc": "Fisher, labels drawn from the model",
    "exact": "Fisher, exact over classes",
    "empirical": "Fisher, empirical",
    "squared": "batch-squared F, batches of",
    "joint": "all tasks at once",
}
FISHERS = ("mc", "exact", "empirical")
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


@dataclass(frozen=True)
class Run:
    """One sequence, or one training on all tasks at once.

    Attributes:
        seed: of the split, the permutations, the network and the order of samples.
        arm: what protects earlier tasks.
        setting: alpha, or which layers are frozen; None where there is nothing to choose.
        curve: test accuracies, [tasks * epochs, tasks]; a task has values from before it is learnt too.
        validation: the mean of all tasks' validation accuracies at the end.
    """

    seed: int
    arm: str
    setting: float | str | None
    curve: list[list[float]]
    validation: float


def run(job: tuple[Setup, int, str, float | str | None]) -> Run:
    """Learn all tasks with one arm.

    Args:
        job: the settings, the seed, the arm, and its setting.
    """
    setup, seed, arm, setting = job
    sequence = tasks(setup, seed)
    if arm == "joint":
        model = network(setup, *sequence[0].shape, seed)
        together = tuple(torch.cat(parts) for parts in zip(*(task.train for task in sequence), strict=True))
        curve = learn(model, (together[0], together[1]), sequence, setup, seed)
        return Run(seed, arm, setting, curve, _mean(accuracies(model, sequence, "validation")))
    model, curve = deepcopy(first_task(setup, seed))
    wpl = wplfast.WeightPlasticityLoss(model, float(setting)) if isinstance(setting, float) else None
    if arm == "frozen":
        for layer in map(int, str(setting).split("+")):
            linear_layers(model)[layer - 1].requires_grad_(False)
    for index in range(1, len(sequence)):
        if wpl is not None:
            wpl.consolidate(importance(arm, model, sequence[index - 1].train, seed))  # merged with those before it
        curve = curve + learn(model, sequence[index].train, sequence, setup, seed + 1000 * index, wpl)
    return Run(seed, arm, setting, curve, _mean(accuracies(model, sequence, "validation")))


@lru_cache(maxsize=2)
def tasks(setup: Setup, seed: int) -> tuple[Split, ...]:
    """Return the tasks: digits as they are, then with their pixels in orders that the seed decides."""
    split = load_split(setup.data, seed).to(setup.device)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(*split.shape, generator=generator).to(setup.device) for _ in range(setup.tasks - 1)]
    return (split, *(split.map(lambda part, order=order: (part[0][:, order], part[1])) for order in orders))


@lru_cache(maxsize=2)
def first_task(setup: Setup, seed: int) -> tuple[nn.Sequential, list[list[float]]]:
    """Return the model after the first task, and its curve; the same for all arms: copy it before you change it."""
    sequence = tasks(setup, seed)
    model = network(setup, *sequence[0].shape, seed)
    return model, learn(model, sequence[0].train, sequence, setup, seed)


def network(setup: Setup, n_features: int, seed: int) -> nn.Sequential:
    """Build the perceptron; the seed decides all initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = hidden_layers(n_features, setup.hidden, setup.layers)
        return hidden.append(nn.Linear(setup.hidden, N_CLASSES)).to(setup.device)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the layers that have parameters, from the input on."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def learn(
    model: nn.Sequential,
    part: Part,
    sequence: Sequence[Split],
    setup: Setup,
    seed: int,
    wpl: wplfast.WeightPlasticityLoss | None = None,
) -> list[list[float]]:
    """Learn some data; return the test accuracy of every task after each epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=setup.lr, fused=True) if trained else None
    stream, curve = batches(part, setup.batch_size, seed), []
    for _ in range(setup.epochs):
        for _ in range(max(1, len(part[1]) // setup.batch_size) if optimizer else 0):
            step(model, optimizer, *next(stream), wpl)
        curve.append(accuracies(model, sequence, "test"))
    return curve


def importance(arm: str, model: nn.Module, part: Part, seed: int) -> Mapping[str, Tensor]:
    """Return an arm's F of a task's training data."""
    params = dict(model.named_parameters())
    if arm == "l2":
        return {name: torch.ones_like(p) for name, p in params.items()}
    kind, _, size = arm.partition(" ")
    images, labels = part
    loader = list(zip(images.split(int(size or 64)), labels.split(int(size or 64)), strict=True))
    if kind == "squared":
        return batch_squared(model, params, loader, len(loader))
    generator = torch.Generator(images.device).manual_seed(seed)
    return wplfast.fisher_diagonal(
        model, loader, wplfast.losses.cross_entropy, fisher_type=kind, generator=generator if kind == "mc" else None
    )


@torch.no_grad()
def accuracies(model: nn.Module, sequence: Sequence[Split], part: str) -> list[float]:
    """Return the share of right answers on a part of each task's data."""
    return [accuracy(model(images), labels) for images, labels in (getattr(task, part) for task in sequence)]


def _mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)
