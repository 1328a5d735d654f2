"""What is learnt one after the other: new data for one model (EWC), or the same data for a new model (WPL).

The scenarios are named as in van de Ven and Tolias, arXiv:1904.07734: task-incremental (the task is known when the
model is used, each has an output layer of its own) and domain-incremental (one output layer, the inputs change).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import nn

from ..data.digits import DIGITS, DataError, Part, Split, load_split
from ..harness.options import option, positive, several, share, strength
from ..harness.training import hidden_layers

N_CLASSES = 10
_CLASSES = {"split2": (range(5), range(5, 10)), "split5": tuple(range(first, first + 2) for first in range(0, 10, 2))}
FISHER_TYPES = ("empirical", "exact", "mc")


@dataclass(frozen=True)
class Setup:
    """Settings that all arms have in common: the network, the schedule of every task, how the Fisher is estimated.

    Every task is learnt with a fresh Adam whose rate falls linearly from ``lr`` to 0.
    """

    data: str | None = option(None, str, DIGITS, metavar="DIR")
    device: str = "cpu"
    hidden: int = option(100, positive, "width of hidden layers")
    layers: int = option(2, positive, "hidden layers")
    permutations: int = option(5, several, "permuted tasks")
    batch_size: int = option(64, positive, "of training")
    iterations: int = option(200, positive, "of each task")
    lr: float = option(0.003, strength, "Adam's rate, falling to 0 in each task")
    gamma: float = option(0.9, share, "what online EWC keeps of F")
    fisher_type: str = option("empirical", str, "of the arms", choices=FISHER_TYPES)
    fisher_samples: int = option(1024, positive, "of the sweep")


@dataclass(frozen=True)
class Scenario:
    """A sequence of tasks: for one model, all of which is anchored (EWC), or for a new one that shares layers (WPL)."""

    title: str
    method: str = "EWC"
    rate: float = 1.0  # of all tasks but the first, over the common one


SCENARIOS = {
    "split2": Scenario("halves of the digits, task-incremental"),
    "split5": Scenario("pairs of digits, task-incremental"),
    "permuted": Scenario("permuted pixels, domain-incremental"),
    "models": Scenario("two models", "WPL"),
    "models10": Scenario("two models, B at 10 x the rate", "WPL", 10.0),  # two_models' rate, which forgets more
}


class Task(NamedTuple):
    """Data, and the number of the output layers that they are classified with."""

    split: Split
    head: int


class Network(nn.Module):
    """Hidden layers shared by all tasks, under one or several output parts."""

    def __init__(self, trunk: nn.Sequential, heads: Sequence[nn.Module]) -> None:
        """Put the parts together."""
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def path(self, head: int) -> nn.Sequential:
        """Return the model of one task: what its data pass through."""
        return nn.Sequential(self.trunk, self.heads[head])

    def anchored(self, scenario: str, heads: Sequence[int]) -> dict[str, nn.Parameter]:
        """Return by name what is anchored after tasks with these heads: the trunk, and for EWC their heads too."""
        prefixes = ["trunk."]
        if SCENARIOS[scenario].method == "EWC":
            prefixes += [f"heads.{head}." for head in heads]
        return {name: p for name, p in self.named_parameters() if name.startswith(tuple(prefixes))}


@lru_cache(maxsize=2)
def tasks(setup: Setup, scenario: str, seed: int) -> tuple[Task, ...]:
    """Return the tasks of a scenario; the seed decides the splits and the permutations.

    Raises:
        DataError: if the data are missing, damaged, or too few.
    """
    split = load_split(setup.data, seed)
    if scenario in _CLASSES:
        parts = [split.map(partial(_classes, classes=classes)) for classes in _CLASSES[scenario]]
    elif scenario == "permuted":
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(*split.shape, generator=generator) for _ in range(setup.permutations - 1)]
        parts = [split, *(split.map(partial(_permuted, order=order)) for order in orders)]
    else:
        parts = [split, split]
    if not all(size for part in parts for size in part.sizes.values()):
        raise DataError(f"{setup.data or 'data'}: too few digits: a task is left without any in one part of the split")
    return tuple(Task(part.to(setup.device), 0 if scenario == "permuted" else head) for head, part in enumerate(parts))


def network(setup: Setup, scenario: str, n_features: int, seed: int) -> Network:
    """Build the network of a scenario; the seed decides all initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = hidden_layers(n_features, setup.hidden, setup.layers)
        if SCENARIOS[scenario].method == "WPL":  # B is deeper than A
            heads = [hidden_layers(setup.hidden, setup.hidden, depth) for depth in (0, 2)]
            heads = [layers.append(nn.Linear(setup.hidden, N_CLASSES)) for layers in heads]
        else:
            sizes = [len(classes) for classes in _CLASSES.get(scenario, [range(N_CLASSES)])]
            heads = [nn.Sequential(nn.Linear(setup.hidden, size)) for size in sizes]
        return Network(trunk, heads).to(setup.device)


def _classes(part: Part, classes: range) -> Part:
    """Return the samples of some classes; their labels count from the first of them."""
    images, labels = part
    rows = (labels >= classes.start) & (labels < classes.stop)
    return images[rows], labels[rows] - classes.start


def _permuted(part: Part, order: torch.Tensor) -> Part:
    """Return the same samples with their pixels in another order."""
    return part[0][:, order], part[1]
