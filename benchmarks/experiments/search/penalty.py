"""The penalty over a search: when it begins, how strong it is, what its Fisher remembers; and as it was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import wplfast

from ..harness.options import count, option, share, strength
from .problem import FisherPass


@dataclass(frozen=True)
class Schedule:
    """When and how the penalty acts. Epochs count from 0.

    The running Fisher is ``F <- (1 - rate) F + rate F_new``. At the first epoch and every so many epochs after it, F
    and all anchors are forgotten (0: never). Each new F is scaled so that its mean entry becomes 1 ("trace"), its
    largest ("max"), or not at all (None; "none" on the command line). Alpha decays, but never reaches zero.
    """

    start: int = option(5, count, "first epoch with the penalty")
    rate: float = option(0.9, share, "of the running Fisher")
    reset_every: int = option(2, count, "epochs; 0: never")
    normalize: Literal["trace", "max"] | None = option("trace", str, "each new F", choices=("trace", "max", "none"))
    clip_norm: float | None = option(
        None, strength, "the most that the norm of one tensor's F may be; default: no limit", flag="clip_fisher"
    )
    decay: float = option(1.0, share, "factor per epoch", flag="alpha_decay")
    decay_after: int = option(0, count, "first epoch of it", flag="alpha_decay_after")

    def alpha(self, alpha: float, epoch: int) -> float:
        """Return the strength in an epoch, 0 before the start."""
        return alpha * self.decay ** max(0, epoch - self.decay_after) if epoch >= self.start else 0.0

    def resets(self, epoch: int) -> bool:
        """Tell whether F is forgotten before an epoch."""
        since = epoch - self.start
        return self.reset_every > 0 and since > 0 and since % self.reset_every == 0

    def begin_epoch(self, wpl: wplfast.WeightPlasticityLoss, alpha: float, epoch: int) -> float:
        """Set the penalty's strength in an epoch, and return it; forget F and anchors where it is time."""
        wpl.alpha = strength = self.alpha(alpha, epoch)
        if self.resets(epoch):
            wpl.reset()
        return strength

    def learn(self, wpl: wplfast.WeightPlasticityLoss, fisher: Mapping[str, Tensor], active: Sequence[str]) -> None:
        """Let the running Fisher take in an architecture's, and anchor its weights, and only these, where they are."""
        wpl.update(fisher, self.rate, active=active, normalize=self.normalize, clip_norm=self.clip_norm)


class ReferencePenalty:
    """The way of the code of arXiv:1902.08232, timed beside the search and without any effect on it.

    The penalty is a sum over parameters that autograd differentiates, F the square of one validation batch's gradient,
    with a running mean of a rate; the anchors are new copies of the weights.
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
