"""What the experiments on images share of their training: batches in an order that a seed decides, and a step."""

from __future__ import annotations

from collections.abc import Iterator

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
) -> None:
    """Take one step; the penalty adds its gradient without a graph, the cheapest way."""
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    if wpl is not None:
        wpl.add_grad_()
    optimizer.step()
