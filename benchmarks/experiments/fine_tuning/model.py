"""A small convolutional network whose last layer grows with the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GrowingNet(nn.Module):
    """Two convolutions of 3 x 3 and a linear layer.

    Args:
        n_pixels: of square images, which come flattened.
        n_classes: at the beginning.
        width: channels of the first convolution; the second has twice as many.
        seed: decides all initial values, those of later classes too.
    """

    def __init__(self, n_pixels: int, n_classes: int, width: int, seed: int) -> None:
        """See the class."""
        super().__init__()
        self.side = math.isqrt(n_pixels)
        stride = 2 if self.side >= 16 else 1
        self._seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(1, width, 3, stride, 1),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, 2, 1),
                nn.ReLU(),
                nn.Flatten(),
            )
            n_features = self.features(torch.zeros(1, 1, self.side, self.side)).shape[1]
            self.head = nn.Linear(n_features, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C] of flattened images [N, D]."""
        return self.head(self.features(images.view(-1, 1, self.side, self.side)))

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
