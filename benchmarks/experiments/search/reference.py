"""The penalty and its Fisher the way they were first published: loops over parameters, squares of a batch's gradient.

Timed beside the search and without any effect on it. It follows the description of the code of arXiv:1902.08232: the
penalty is a sum over parameters that autograd differentiates, F is the square of one validation batch's gradient, and
the anchors are new copies of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .problem import FisherPass


class ReferencePenalty:
    """Diagonals and anchors in dictionaries.

    Args:
        weights: all covered weights by name.
        alpha: strength.
        rate: of the running Fisher.
    """

    def __init__(self, weights: Mapping[str, Tensor], alpha: float, rate: float) -> None:
        """Anchor the weights where they are, with F = 0."""
        self._weights, self._alpha, self._rate = weights, alpha, rate
        self.fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._anchors = {name: weight.detach().clone() for name, weight in weights.items()}

    def value(self, active: Sequence[str]) -> Tensor:
        """Return ``alpha/2 sum F (theta - theta_hat)^2`` over an architecture's weights, with a graph."""
        total = torch.zeros((), device=next(iter(self._weights.values())).device)
        for name in active:
            total = total + (self.fisher[name] * (self._weights[name] - self._anchors[name]).square()).sum()
        return 0.5 * self._alpha * total

    def gradients(self, active: Sequence[str]) -> list[Tensor]:
        """Return the gradient of the penalty."""
        return list(torch.autograd.grad(self.value(active), [self._weights[name] for name in active]))

    def learn(self, given: FisherPass, active: Sequence[str]) -> None:
        """Take in the square of a batch's gradient, and anchor the architecture's weights."""
        inputs, targets = given.batch
        outputs = given.model(*inputs) if isinstance(inputs, tuple) else given.model(inputs)
        loss = given.loss_fn(outputs, targets).mean()
        found = torch.autograd.grad(loss, [self._weights[name] for name in active])
        for name, gradient in zip(active, found, strict=True):
            self.fisher[name] = (1 - self._rate) * self.fisher[name] + self._rate * gradient.square()
            self._anchors[name] = self._weights[name].detach().clone()
