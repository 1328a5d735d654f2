"""The penalty over a search: when it begins, how strong it is, what its Fisher remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import wplfast


@dataclass(frozen=True)
class Schedule:
    """When and how the penalty acts. Epochs count from 0.

    Args:
        start: the epoch from which on it is switched on.
        rate: of the running Fisher, ``F <- (1 - rate) F + rate F_new``.
        reset_every: forget F and all anchors at the first epoch and every so many epochs after it; 0: never.
        normalize: how each new F is scaled: its mean entry becomes 1 ("trace"), its largest ("max"), or not at all.
        clip_norm: the most that the Euclidean norm of one tensor's F may be.
        decay: alpha is multiplied by it after every epoch ...
        decay_after: ... from this one on. It never reaches zero.
    """

    start: int = 5
    rate: float = 0.9
    reset_every: int = 2
    normalize: Literal["trace", "max"] | None = "trace"
    clip_norm: float | None = None
    decay: float = 1.0
    decay_after: int = 0

    def alpha(self, alpha: float, epoch: int) -> float:
        """Return the strength in an epoch, 0 before the start."""
        return alpha * self.decay ** max(0, epoch - self.decay_after) if epoch >= self.start else 0.0

    def resets(self, epoch: int) -> bool:
        """Tell whether F is forgotten before an epoch."""
        since = epoch - self.start
        return self.reset_every > 0 and since > 0 and since % self.reset_every == 0


class Plasticity:
    """The weight plasticity loss of all covered weights, of which each architecture uses some.

    Args:
        weights: all covered weights by name.
        alpha: strength; None: no penalty at all.
        schedule: when and how.
    """

    def __init__(self, weights: Mapping[str, Tensor], alpha: float | None, schedule: Schedule) -> None:
        """Anchor nothing yet."""
        self._alpha, self._schedule = alpha, schedule
        self.penalty = None if alpha is None else wplfast.WeightPlasticityLoss(weights, alpha)
        self.alpha = 0.0

    @property
    def on(self) -> bool:
        """Whether the penalty acts in this epoch."""
        return self.penalty is not None and self.alpha > 0

    def begin_epoch(self, epoch: int) -> None:
        """Set the strength, and forget where the schedule says so."""
        if self.penalty is None or self._alpha is None:
            return
        self.alpha = self._schedule.alpha(self._alpha, epoch)
        self.penalty.alpha = self.alpha
        if self._schedule.resets(epoch):
            self.penalty.reset()

    def add_grad_(self, active: Sequence[str]) -> Tensor:
        """Add the gradient of the penalty over an architecture's weights; return its value."""
        assert self.penalty is not None
        return self.penalty.add_grad_(active=active)

    def learn(self, fisher: Mapping[str, Tensor], active: Sequence[str]) -> None:
        """Let the running Fisher take in an architecture's, and anchor its weights, and only these, where they are."""
        assert self.penalty is not None
        options = self._schedule
        self.penalty.update(
            fisher, options.rate, active=active, normalize=options.normalize, clip_norm=options.clip_norm
        )
