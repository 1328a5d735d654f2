"""One network learns the tasks of a scenario one after the other, with one arm; every accuracy after every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wplfast

from ..data.digits import Split
from ..harness.training import accuracy, batch_squared, batches
from .scenarios import SCENARIOS, Network, Setup, Task, network, tasks

#: what earlier tasks leave behind for later ones, and what each is called in tables and figures
ARMS = {
    "none": "fine-tuning",
    "ewc": "EWC, all anchors",
    "online": "online EWC",
    "l2": "L2 anchor (F = 1)",
    "joint": "joint training",
}
TUNED = ("ewc", "online", "l2")
FISHER_BATCH = 64
Params: TypeAlias = Mapping[str, Tensor]
Penalty: TypeAlias = wplfast.WeightPlasticityLoss
#: how F is computed, and what each is called in tables and figures
KINDS = {
    "empirical": "right: empirical",
    "exact": "right: exact over classes",
    "mc": "right: labels drawn from the model",
    "squared": "batch-squared",
}


@dataclass(frozen=True)
class Run:
    """One sequence: test accuracies (row k: of tasks 0 to k after task k), and the validation score at the end."""

    scenario: str
    seed: int
    arm: str
    alpha: float | None
    matrix: list[list[float]]
    validation: float


def arms(n_tasks: int) -> list[str]:
    """List the arms that differ with so many tasks: with two there is one anchor, merged or not."""
    return [arm for arm in ARMS if arm != "online" or n_tasks > 2]


def run(job: tuple[Setup, str, int, str, float | None]) -> Run:
    """Learn all tasks with one arm.

    Args:
        job: the settings, the scenario, the seed, the arm, and alpha where the arm has one.
    """
    setup, scenario, seed, arm, alpha = job
    sequence = tasks(setup, scenario, seed)
    net = deepcopy(first_task(setup, scenario, seed))
    wpl = None if alpha is None else wplfast.WeightPlasticityLoss(net.anchored(scenario, range(len(net.heads))), alpha)
    matrix = [accuracies(net, sequence[:1], "test")]
    for index in range(1, len(sequence)):
        if wpl is not None:
            anchor(wpl, net, setup, scenario, sequence[index - 1], arm)
        learnt = sequence[: index + 1] if arm == "joint" else sequence[index : index + 1]
        train(net, learnt, setup, seed_of(seed, index), wpl, SCENARIOS[scenario].rate)
        matrix.append(accuracies(net, sequence[: index + 1], "test"))
    validation = accuracies(net, sequence, "validation")
    return Run(scenario, seed, arm, alpha, matrix, sum(validation) / len(validation))


@lru_cache(maxsize=2)
def first_task(setup: Setup, scenario: str, seed: int) -> Network:
    """Return the network after the first task, which is the same for all arms: copy it before you change it."""
    task = tasks(setup, scenario, seed)[0]
    net = network(setup, scenario, *task.split.shape, seed)
    train(net, [task], setup, seed_of(seed, 0))
    return net


def anchor(wpl: Penalty, net: Network, setup: Setup, scenario: str, task: Task, arm: str) -> None:
    """Anchor what the task was learnt with where it is now."""
    params = net.anchored(scenario, [task.head])
    fisher: Params = {name: torch.ones_like(p) for name, p in params.items()}
    if arm != "l2":
        fisher = estimate(setup.fisher_type, net.path(task.head), params, task.split, FISHER_BATCH)
    if arm == "online":
        wpl.consolidate(fisher, active=list(params), anchor="replace", decay=setup.gamma)
    else:
        wpl.consolidate(fisher, active=list(params))


def estimate(
    kind: str, model: nn.Module, params: Params, split: Split, batch_size: int, max_samples: int | None = None
) -> Params:
    """Return F of a model over (the first of) its training data, read in batches of one size."""
    images, labels = (part[:max_samples] for part in split.train)
    loader = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    if kind == "squared":
        return {name: total / len(loader) for name, total in batch_squared(model, params, loader, 1).items()}
    return wplfast.fisher_diagonal(model, loader, wplfast.losses.cross_entropy, params=params, fisher_type=kind)


def train(
    net: Network, learnt: Sequence[Task], setup: Setup, seed: int, wpl: Penalty | None = None, rate: float = 1.0
) -> None:
    """Learn a task, or several at once: each step then takes its share of the batch from every one of them."""
    paths = [net.path(task.head) for task in learnt]
    size = max(1, setup.batch_size // len(learnt))
    streams = [batches(task.split.train, size, seed + index) for index, task in enumerate(learnt)]
    optimizer = torch.optim.Adam(net.parameters(), lr=setup.lr, fused=True)
    for step in range(setup.iterations):
        optimizer.param_groups[0]["lr"] = rate * setup.lr * (1 - step / setup.iterations)
        optimizer.zero_grad()
        for path, stream in zip(paths, streams, strict=True):
            images, labels = next(stream)
            (F.cross_entropy(path(images), labels) / len(paths)).backward()
        if wpl is not None:
            wpl.add_grad_()
        optimizer.step()


@torch.no_grad()
def accuracies(net: Network, seen: Sequence[Task], part: str) -> list[float]:
    """Return the share of right answers on a part of each task's data."""
    data = [(net.path(task.head), *getattr(task.split, part)) for task in seen]
    return [accuracy(path(images), labels) for path, images, labels in data]


def seed_of(seed: int, index: int) -> int:
    """Return the seed of one task's order of samples; joint training takes the next ones for its other tasks."""
    return seed * 1_000_000 + index * 1000
