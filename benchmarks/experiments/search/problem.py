"""What a search space must offer, so that one loop searches them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

#: one architecture: what was chosen at every decision
Choices = tuple[int, ...]

#: What the penalty covers: all weights that an architecture uses, or those of its cell alone, as in the published code.
Cover: TypeAlias = Literal["used", "cells"]
COVERS: tuple[Cover, ...] = get_args(Cover)


class Decision(NamedTuple):
    """One choice that the controller makes; decisions of one kind share an embedding of what was chosen before."""

    kind: str
    options: int  # number of them


class Problem:
    """Data and one set of shared weights from which architectures are made; the seed decides their initial values.

    The penalty covers ``weights``, by name: those of the cells, of which an architecture uses some, and where the task
    says so the rest of the model, which all architectures use. A kind of problem has

    - ``cells()``: the weights that cells are made of, by name; ``of_cell(choices)``: the names of those of one;
    - ``train_loss(choices)``: the mean loss of the next training minibatch, with a graph;
    - ``fisher_pass(choices)``: what the Fisher is estimated with, of the next held-out minibatch;
    - ``error(choices)``: the validation error, on the same minibatches at every call;
    - ``reward(choices)``: the reward of one validation minibatch, another one at every call;
    - ``test_error(choices)``: the error on the test part.
    """

    def __init__(self, task: Any, seed: int, make: Callable[[Any], nn.Module], decisions: Sequence[Decision]) -> None:
        """Make the shared weights of the task's sizes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = make(task.sizes)
        self.model.to(task.device)
        self.decisions, cells = decisions, self.cells()
        own = {id(weight) for weight in cells.values()}
        common = {name: p for name, p in self.model.named_parameters() if id(p) not in own and task.cover == "used"}
        self.weights = {**cells, **common}
        self._common = tuple(common)

    def active(self, choices: Choices) -> list[str]:
        """Return the names of the covered weights that an architecture uses."""
        return [*self.of_cell(choices), *self._common]


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


class FisherPass(NamedTuple):
    """A model, one minibatch ``(inputs, targets)`` and a loss per sample, as ``wplfast.fisher_diagonal`` takes them."""

    model: nn.Module
    batch: tuple[Any, Tensor]
    loss_fn: Any
