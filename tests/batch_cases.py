"""Four samples, and where they lie: what files of tests of batches share."""

from __future__ import annotations

import torch

X, Y = torch.randn(4, 6), torch.tensor([0, 3, 1, 2])


def here(tensor):
    """Move what a loader yields to where the models are."""
    return tensor.to(torch.empty(0).device)


class Graph:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Graph(self.x.to(device), self.y.to(device))
