"""The controller's training: REINFORCE with a moving-average baseline and an entropy bonus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .controller import Controller
from .problem import Choices


@dataclass(frozen=True)
class Policy:
    """Settings of the controller's training.

    Args:
        lr: of Adam.
        steps: per epoch.
        batch: architectures per step.
        baseline_decay: of the moving average of rewards.
        entropy: weight of the bonus.
    """

    lr: float = 3.5e-4
    steps: int = 2000
    batch: int = 1
    baseline_decay: float = 0.95
    entropy: float = 1e-4


class Reinforce:
    """Raises the probability of architectures whose reward is above the moving average of rewards.

    The loss of one step is ``-mean_k((R_k - b) log p_k + entropy * H_k)`` over the architectures k of the step, with b
    the average before them (their own mean at the very first step).

    Args:
        controller: to train.
        policy: how.
        generator: draws the architectures.
    """

    def __init__(self, controller: Controller, policy: Policy, generator: torch.Generator) -> None:
        """Start without a baseline."""
        self._controller, self._policy, self._generator = controller, policy, generator
        self._optimizer = torch.optim.Adam(controller.parameters(), lr=policy.lr)
        self.baseline: float | None = None

    def step(self, reward: Callable[[Choices], float]) -> list[float]:
        """Sample architectures, take one step, and return their rewards."""
        sample = self._controller.sample(self._policy.batch, self._generator)
        rewards = torch.tensor([reward(choices) for choices in sample.architectures])
        mean = rewards.mean().item()
        baseline = mean if self.baseline is None else self.baseline
        gain = (rewards - baseline) * sample.log_probabilities + self._policy.entropy * sample.entropies
        self._optimizer.zero_grad()
        (-gain.mean()).backward()
        self._optimizer.step()
        decay = self._policy.baseline_decay
        self.baseline = decay * baseline + (1 - decay) * mean
        return rewards.tolist()
