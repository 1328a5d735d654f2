"""Convolution cells that are cut from one set of shared weights: the micro space of ENAS, small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.options import option, positive
from ..search.problem import Choices, Decision

OPERATIONS = ("sep3", "sep5", "avg3", "max3", "identity")
_KERNELS = {"sep3": 3, "sep5": 5}
_GROUP = 4  # channels that a normalisation has in common


@dataclass(frozen=True)
class Sizes:
    """Sizes of the classifiers: channels of the images, stride of the first convolution, and what the options say.

    All cells have the same architecture, and weights of their own. Each stage has as many cells, or one less.
    """

    inputs: int = 1
    channels: int = option(12, positive, "of all cells, a multiple of 4")
    nodes: int = option(3, positive, "of a cell")
    cells: int = option(2, positive, "stacked")
    stages: int = option(2, positive, "images are halved in height and width between them")
    stride: int = 1
    classes: int = 10


def decisions(nodes: int) -> tuple[Decision, ...]:
    """Return what makes up a cell: for each node two inputs (the last two cells, earlier nodes), each with its op."""
    operation = Decision("operation", len(OPERATIONS))
    return tuple(d for node in range(nodes) for d in (Decision("input", node + 2), operation) * 2)


def edges(choices: Choices) -> list[tuple[int, int, str]]:
    """Return a cell's edges (node, input, operation), two for each node. Inputs 0 and 1 are the last two cells."""
    pairs = zip(choices[::2], choices[1::2], strict=True)
    return [(index // 2, source, OPERATIONS[operation]) for index, (source, operation) in enumerate(pairs)]


def describe(choices: Choices) -> str:
    """Render a cell: for each node its two operations and their inputs."""
    words = [f"{operation}({source})" for _, source, operation in edges(choices)]
    return " ".join(f"{first}+{second}" for first, second in zip(words[::2], words[1::2], strict=True))


class Separable(nn.Sequential):
    """ReLU, a convolution of each channel for itself, one of all channels at each place, and a normalisation.

    GroupNorm, not BatchNorm: statistics of the batch would couple the samples, so that there would be no gradient of
    one sample's own loss; and running averages would mix the architectures that share the layer.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        """Make the layers."""
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.GroupNorm(channels // _GROUP, channels),
        )


class SharedCells(nn.Module):
    """One set of weights for all cells of N nodes, between a first convolution and a linear classifier.

    A node is the sum of two operations, each on the output of one of the last two cells or of an earlier node; there is
    one set of weights for each (cell, node, input, operation). A cell's output is the mean of its loose ends,
    normalised: sums of sums would otherwise grow, and training collapse at all but small learning rates.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Make all layers with PyTorch's initial values."""
        super().__init__()
        channels, self.sizes = sizes.channels, sizes
        self.stem = nn.Sequential(
            nn.Conv2d(sizes.inputs, channels, 3, sizes.stride, 1, bias=False),
            nn.GroupNorm(channels // _GROUP, channels),
        )
        self.operations = nn.ModuleDict(
            {
                f"{cell}-{node}-{source}-{operation}": Separable(channels, kernel)
                for cell in range(sizes.cells)
                for node in range(sizes.nodes)
                for source in range(node + 2)
                for operation, kernel in _KERNELS.items()
            }
        )
        self.head = nn.Linear(channels, sizes.classes)

    def used(self, choices: Choices) -> list[str]:
        """Return the names of the operations with weights that an architecture uses, each once."""
        keys = [f"{n}-{source}-{operation}" for n, source, operation in edges(choices) if operation in _KERNELS]
        return [f"{cell}-{key}" for cell in self._reached(choices) for key in dict.fromkeys(keys)]

    def forward(self, choices: Choices, images: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, C, H, W]."""
        chosen = edges(choices)
        loose = sorted(set(range(2, self.sizes.nodes + 2)) - {source for _, source, _ in chosen})
        last = current = self.stem(images)
        boundaries = {round(self.sizes.cells * stage / self.sizes.stages) for stage in range(1, self.sizes.stages)}
        for cell in range(self.sizes.cells):
            if cell in boundaries:
                last, current = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (last, current))
            nodes = [last, current]
            for (node, i, first), (_, j, second) in zip(chosen[::2], chosen[1::2], strict=True):
                one = self._apply_operation(f"{cell}-{node}", i, first, nodes[i])
                nodes.append(one + self._apply_operation(f"{cell}-{node}", j, second, nodes[j]))
            mean = torch.stack([nodes[i] for i in loose]).mean(0)
            last, current = current, F.group_norm(mean, mean.shape[1] // _GROUP)
        return self.head(F.relu(current).mean((2, 3)))

    def _reached(self, choices: Choices) -> list[int]:
        """Return the cells that the last one depends on: one that reads input 0 alone passes over its predecessor."""
        steps = [2 - source for _, source, _ in edges(choices) if source < 2]
        reached = {self.sizes.cells - 1}
        for cell in reversed(range(self.sizes.cells)):
            if cell in reached:
                reached.update(cell - step for step in steps if cell >= step)
        return sorted(reached)

    def _apply_operation(self, place: str, source: int, operation: str, x: Tensor) -> Tensor:
        """Run one operation."""
        if operation == "identity":
            return x
        if operation == "avg3":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if operation == "max3":
            return F.max_pool2d(x, 3, 1, 1)
        return self.operations[f"{place}-{source}-{operation}"](x)
