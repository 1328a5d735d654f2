"""What a search space must offer, so that one loop searches them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

#: one architecture: what was chosen at every decision
Choices = tuple[int, ...]

#: What the penalty covers: all weights that an architecture uses, or those of its cell alone, as in the published code.
Cover: TypeAlias = Literal["used", "cells"]
COVERS: tuple[Cover, ...] = get_args(Cover)


@dataclass(frozen=True)
class Decision:
    """One choice that the controller makes.

    Args:
        kind: decisions of one kind share the embedding that tells the controller what was chosen before.
        options: number of them.
    """

    kind: str
    options: int


class Problem(ABC):
    """Data and one set of shared weights from which architectures are made.

    Attributes:
        model: holds all shared weights.
        decisions: what makes up an architecture.
        weights: the weights that the penalty covers, by name.
    """

    model: nn.Module
    decisions: tuple[Decision, ...]
    weights: dict[str, Tensor]

    def __init__(self, make: Callable[[], nn.Module], seed: int, device: str) -> None:
        """Make the shared weights; the seed decides their initial values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = make()
        self.model.to(device)

    def cover(self, cells: Mapping[str, Tensor], cover: Cover) -> None:
        """Say which weights the penalty covers.

        Args:
            cells: weights that cells are made of, by name: an architecture uses some of them.
            cover: whether the rest of the model, which all architectures use, is covered too.
        """
        own = {id(weight) for weight in cells.values()}
        named = self.model.named_parameters()
        common = {name: p for name, p in named if id(p) not in own} if cover == "used" else {}
        self.weights = {**cells, **common}
        self._common = tuple(common)

    def active(self, choices: Choices) -> list[str]:
        """Return the names of the covered weights that an architecture uses."""
        return [*self.of_cell(choices), *self._common]

    @abstractmethod
    def of_cell(self, choices: Choices) -> list[str]:
        """Return the names of the weights that an architecture's cell is made of."""

    @abstractmethod
    def train_loss(self, choices: Choices) -> Tensor:
        """Return the mean loss of the next training minibatch, with a graph."""

    @abstractmethod
    def fisher_pass(self, choices: Choices) -> FisherPass:
        """Return what the Fisher is estimated with: a model and the next held-out minibatch."""

    @abstractmethod
    def error(self, choices: Choices) -> float:
        """Return the validation error, on the same minibatches at every call."""

    @abstractmethod
    def reward(self, choices: Choices) -> float:
        """Return the reward of one validation minibatch, another one at every call."""

    @abstractmethod
    def test_error(self, choices: Choices) -> float:
        """Return the error on the test part."""


class Child(nn.Module):
    """One architecture, for passes that call a model with data alone."""

    def __init__(self, shared: nn.Module, choices: Choices) -> None:
        """Refer to the shared weights."""
        super().__init__()
        self.shared, self.choices = shared, choices

    def forward(self, *data: Tensor) -> Tensor:
        """Return logits."""
        found = self.shared(self.choices, *data)
        return found[0] if isinstance(found, tuple) else found  # without a state


@dataclass(frozen=True)
class FisherPass:
    """A model, one minibatch ``(inputs, targets)`` and a loss per sample, as ``wplfast.fisher_diagonal`` takes them."""

    model: nn.Module
    batch: tuple[Any, Tensor]
    loss_fn: Any
