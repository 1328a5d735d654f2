"""Models and batches of growing size, for the measurements of scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..fisher import Model
from ..workloads import Batch, Decoder, Workload

SAMPLES = 32  # of each batch where classes or the number of batches grow


@dataclass(frozen=True)
class Series:
    """Models and batches of growing size.

    Args:
        name: what grows.
        shown: of what.
        sizes: measured ones.
        quick: tiny ones.
        model: makes the model of a size.
        batch: makes a batch for it.
    """

    name: str
    shown: str
    sizes: Sequence[int]
    quick: Sequence[int]
    model: Callable[[int], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]

    def at(self, size: int, device: torch.device) -> Model:
        """Make model and batches of one size."""
        workload = Workload(
            f"{self.name}={size}", self.shown, math.nan, lambda _: self.model(size), lambda _, g: self.batch(size, g)
        )
        return Model(workload, device, quick=False)


def _mlp(inputs: int, width: int, classes: int) -> nn.Module:
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)]
    return nn.Sequential(*layers)


def _rows(n: int, width: int, classes: int, generator: torch.Generator) -> Batch:
    return torch.randn(n, width, generator=generator), torch.randint(classes, (n,), generator=generator)


def _tokens(n: int, length: int, generator: torch.Generator) -> Batch:
    tokens = torch.randint(200, (n, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _powers(first: int, last: int) -> list[int]:
    return [2**k for k in range(first, last + 1)]


TIMED = (
    Series(
        "N",
        "MLP 784-512-512-10, batch size N",
        _powers(3, 10),
        (2, 4, 8),
        lambda n: _mlp(784, 512, 10),
        lambda n, g: _rows(n, 784, 10, g),
    ),
    Series(
        "T",
        "decoder d=64, 2 layers, V=200, batch of 4, length T",
        _powers(4, 10),
        (4, 8, 16),
        lambda t: Decoder(200, t, 64, 2, tied=False),
        lambda t, g: _tokens(4, t, g),
    ),
    Series(
        "D",
        "MLP D-D-D-10, batch of 64, width D",
        _powers(5, 11),
        (8, 16, 32),
        lambda d: _mlp(d, d, 10),
        lambda d, g: _rows(64, d, 10, g),
    ),
)
CLASSES = Series(
    "C",
    "MLP 256-256-256-C, batch of 32, exact over C classes",
    _powers(1, 8),
    (2, 3, 4),
    lambda c: _mlp(256, 256, c),
    lambda c, g: _rows(SAMPLES, 256, c, g),
)
HELD = Series(
    "samples",
    "MLP 256-256-256-10, batches of 32, samples in all",
    [SAMPLES * k for k in _powers(0, 6)],
    [SAMPLES * k for k in (1, 2, 3)],
    lambda _: _mlp(256, 256, 10),
    lambda _, g: _rows(SAMPLES, 256, 10, g),
)
