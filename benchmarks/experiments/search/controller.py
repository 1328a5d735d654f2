"""The controller, an LSTM that makes one decision after the other, and its training, as in ENAS (arXiv:1802.03268)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..harness.options import count, option, strength
from .problem import Choices, Decision


class Sample(NamedTuple):
    """Architectures, and how likely they were."""

    architectures: list[Choices]
    log_probabilities: Tensor  # [n], summed over the decisions of each
    entropies: Tensor  # [n], of the distributions that were drawn from, summed over decisions; in nats


class Controller(nn.Module):
    """Samples architectures; every decision is drawn from a softmax that depends on all decisions before.

    It stays on the CPU: it is tiny, and its choices are needed there.

    Args:
        decisions: in the order in which they are made.
        hidden: width of the LSTM.
        temperature: logits are divided by it.
        bound: logits are then squashed into (-bound, bound), so that no option ever becomes impossible.
    """

    def __init__(
        self, decisions: Sequence[Decision], hidden: int = 100, temperature: float = 5.0, bound: float = 2.5
    ) -> None:
        """Draw all weights uniformly from [-0.1, 0.1]."""
        super().__init__()
        self.temperature, self.bound = temperature, bound
        tables: dict[str, int] = {}
        total = 1  # the first entry of the table begins every sequence
        for kind in dict.fromkeys(decision.kind for decision in decisions):
            tables[kind] = total
            total += max(decision.options for decision in decisions if decision.kind == kind)
        self.offsets = [tables[decision.kind] for decision in decisions]
        self.embedding = nn.Embedding(total, hidden)
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, decision.options) for decision in decisions)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Draw architectures, with a graph for their log-probabilities and entropies."""
        token, state = torch.zeros(n, dtype=torch.int64), None
        chosen, log_probabilities, entropies = [], [], []
        for head, offset in zip(self.heads, self.offsets, strict=True):
            state = self.lstm(self.embedding(token), state)
            logits = self.bound * torch.tanh(head(state[0]) / self.temperature)
            log_p = logits.log_softmax(1)
            choice = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            chosen.append(choice)
            log_probabilities.append(log_p.gather(1, choice))
            entropies.append(-(log_p.exp() * log_p).sum(1))
            token = offset + choice[:, 0]
        architectures = [tuple(row) for row in torch.cat(chosen, 1).tolist()]
        return Sample(architectures, torch.cat(log_probabilities, 1).sum(1), torch.stack(entropies, 1).sum(1))


@dataclass(frozen=True)
class Policy:
    """Settings of the controller's training."""

    lr: float = option(3.5e-4, strength, "of Adam", flag="controller_lr")
    steps: int = option(2000, count, "per epoch", flag="controller_steps")
    batch: int = 1  # architectures per step
    baseline_decay: float = 0.95  # of the moving average of rewards
    entropy: float = 1e-4  # weight of the bonus


class Reinforce:
    """Raises the probability of architectures whose reward is above the moving average of rewards.

    The loss of one step is ``-mean_k((R_k - b) log p_k + entropy * H_k)`` over the architectures k of the step, with b
    the average before them (their own mean at the very first step).
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
