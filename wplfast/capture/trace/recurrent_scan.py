"""The recurrence of one RNN layer in one direction, as one autograd node: loops without a graph for each step.

The projections are no part of it: gradients with respect to their outputs, for all steps at once, are what it returns
backwards, and taps behind those turn them into per-sample gradients. Tensors hold one row for each sample and step, in
order of time: [R, D], with ``R = T N``, or the sum of the batch sizes of a packed sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .product import Product


@dataclass(frozen=True)
class Steps:
    """How many rows each step has (never more than the step before), and whether time runs backwards."""

    sizes: list[int]
    reverse: bool

    def of(self, rows: Tensor, back: bool = False) -> list[Tensor]:
        """Split rows into steps, in the order of the recurrence; ``back``: in the order of its backward pass."""
        parts = list(rows.split(self.sizes))
        return parts[::-1] if self.reverse != back else parts

    def living(self, state: Tensor, back: bool = False) -> list[Tensor]:
        """View the samples of a state [N, ...] that each step is about: those whose sequence has the step."""
        parts = [state if size == len(state) else state[:size] for size in self.sizes]
        return parts[::-1] if self.reverse != back else parts


@dataclass(frozen=True)
class Weights:
    """Weights of one layer and direction."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None

    def detached(self) -> Weights:
        """Return the weights without their graphs."""
        biases = (None if t is None else t.detach() for t in (self.b_ih, self.b_hh, self.hr))
        return Weights(self.ih.detach(), self.hh.detach(), *biases)


@dataclass(frozen=True)
class Run:
    """What a loop over time leaves."""

    results: tuple[Tensor, ...]  # outputs [R, D], then the final states [N, .]
    before: Tensor  # the hidden state that each step began with: what W_hh is multiplied with
    projections: tuple[Tensor, Tensor]  # of the shapes of both projections (input, hidden); gradients are all it takes
    kept: tuple[Tensor, ...]  # what the backward pass needs
    unprojected: Tensor | None = None  # what W_hr is multiplied with


class Cell(ABC):
    """One kind of cell: its loops over time, forwards and backwards."""

    n_states = 1

    @abstractmethod
    def forward(self, x: Tensor, states: Sequence[Tensor], weights: Weights, steps: Steps) -> Run:
        """Run over time.

        Args:
            x: the inputs of all steps [R, D].
            states: the states to begin with, [N, .].
            weights: the weights, without their graphs.
            steps: the steps.
        """

    @abstractmethod
    def backward(self, kept: Sequence[Tensor], steps: Steps, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of both projections (input, hidden), of the output's projection and of the states."""


class Scan(torch.autograd.Function):
    """The loop, which has run, from the inputs, the projections' outputs and the initial states to the results."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, steps: Steps, run: Run, w_ih: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Alias the results; ``tensors``: the inputs, both projections, that of the output (or None), the states."""
        ctx.cell, ctx.steps = cell, steps
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w_ih, *run.kept)
        return tuple(result.detach() for result in run.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run back over time."""
        output, *states = grads
        rows = None if output is None else output.reshape(-1, output.shape[-1])
        w_ih, *kept = ctx.saved_tensors
        found = ctx.cell.backward(kept, ctx.steps, (rows, *states))
        of_inputs = Product(w_ih.t())(found[0]) if ctx.needs_input_grad[4] else None
        pairs = zip((of_inputs, *found), ctx.shapes, strict=True)
        return (None, None, None, None, *(None if g is None or shape is None else g.view(shape) for g, shape in pairs))


def each(**views: Sequence[Any]) -> Iterator[SimpleNamespace]:
    """Yield one record for each step: under every name, that step's view."""
    for values in zip(*views.values(), strict=True):
        yield SimpleNamespace(**dict(zip(views, values, strict=True)))


def start(final: Tensor | None, steps: Steps, width: int, like: Tensor) -> Tensor:
    """Return the gradient of a state after the last step, [N, width], as a new tensor."""
    if final is not None:
        return final.clone(memory_format=torch.contiguous_format)
    return like.new_zeros(steps.sizes[0], width)


def split(rows: Tensor | None, steps: Steps) -> Sequence[Tensor | None]:
    """Split the outputs' gradients into steps, in the order of the backward pass."""
    return [None] * len(steps.sizes) if rows is None else steps.of(rows, back=True)
