"""What the experiments share of their training: minibatches, a step, layers, the batch-squared Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wplfast


def batches(part: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, without replacement within an epoch; the seed decides the order."""
    images, labels = part
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(labels))
    while True:
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for chosen in order[: len(order) // size * size].split(size):
            yield images[chosen], labels[chosen]


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    wpl: wplfast.WeightPlasticityLoss | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """Take one step; the penalty adds its gradient without a graph, the cheapest way."""
    optimizer.zero_grad()
    loss(model(images), labels).backward()
    if wpl is not None:
        wpl.add_grad_()
    optimizer.step()


def hidden_layers(n_in: int, width: int, count: int) -> nn.Sequential:
    """Build hidden layers of one width."""
    layers = nn.Sequential()
    for index in range(count):
        layers.extend((nn.Linear(width if index else n_in, width), nn.ReLU()))
    return layers


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers."""
    return (logits.argmax(1) == labels).double().mean().item()


def batch_squared(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    loader: Iterable[tuple[Tensor, Tensor]],
    n: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """Return the common mistake in place of F, squares of batches' mean gradients, as a sum of 1/n of each.

    Its mean over batches has n = number of batches; the mean of a sum with n = 1 differs from that by rounding.
    """
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for images, labels in loader:
        gradients = torch.autograd.grad(loss(model(images), labels), list(params.values()))
        for name, gradient in zip(params, gradients, strict=True):
            total[name] += gradient.square() / n
    return total
