"""A small network whose last layer grows with the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..harness.training import hidden_layers

#: kinds of networks, and their usual widths
WIDTHS = {"mlp": 64, "cnn": 8}


class GrowingNet(nn.Module):
    """A linear layer on two hidden ones, or on two convolutions of 3 x 3.

    Images come flattened, square ones for a "cnn". The width is the units of the hidden layers ("mlp"), or the channels
    of the first convolution; the second has twice as many. The seed decides the initial values of later classes too.
    """

    def __init__(self, kind: str, n_pixels: int, n_classes: int, width: int, seed: int) -> None:
        """See the class."""
        super().__init__()
        self._seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = (
                _convolutions(math.isqrt(n_pixels), width) if kind == "cnn" else hidden_layers(n_pixels, width, 2)
            )
            n_features = self.features(torch.zeros(1, n_pixels)).shape[1]
            self.head = nn.Linear(n_features, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C] of flattened images [N, D]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.no_grad()
    def grow(self, n_classes: int) -> bool:
        """Replace the last layer by one for more classes, whose first rows are the old ones; tell whether it grew."""
        old = self.head
        if n_classes <= old.out_features:
            return False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + n_classes)
            head = nn.Linear(old.in_features, n_classes)
        head = head.to(old.weight)
        for new, before in zip(head.parameters(), old.parameters(), strict=True):
            new[: old.out_features] = before
        self.head = head
        return True


def _convolutions(side: int, width: int) -> nn.Sequential:
    """Return two convolutions; the second, and of larger images both, halve the side."""
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, width, 3, 2 if side >= 16 else 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
    )
