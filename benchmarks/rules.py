"""Models of one operation each, for ``python -m benchmarks rule NAME``: what every capture rule is measured on.

A case is a function that returns a model, a batch of inputs and targets with the samples on their first axis, and a
loss function from outputs and targets to one loss per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .workloads import Batch, Loss, rows, text

Case = Callable[[], tuple[nn.Module, Batch, Loss]]


def squared(outputs: Tensor, _: Tensor) -> Tensor:
    """Return half the sum of each sample's squared outputs."""
    return outputs.flatten(1).square().sum(1) / 2


class Function(nn.Module):
    """A function of an input and of one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(x, self.weight)


class Bags(nn.Module):
    """Bags of tokens, [N, L], through an embedding that adds them up."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(vocabulary, width, mode="sum")

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, L] to [N, D]."""
        return self.bags(tokens)


def _numbers(*shape: int) -> Batch:
    return rows(shape[0], *shape[1:])(False, torch.Generator().manual_seed(0))


def _tokens(n: int, length: int, vocabulary: int) -> Batch:
    return text(n, length, vocabulary)(False, torch.Generator().manual_seed(0))


def _spectral(x: Tensor, weight: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(weight.view(-1, 2)), x.shape[-1])


CASES: dict[str, Case] = {
    "linear": lambda: (nn.Linear(1024, 1024), _numbers(256, 1024), squared),
    "small": lambda: (nn.Linear(8, 8), _numbers(8, 8), squared),  # what a call site costs by itself
    "conv": lambda: (nn.Conv2d(32, 64, 3, padding=1), _numbers(64, 32, 16, 16), squared),
    "embedding": lambda: (nn.Embedding(1000, 256), _tokens(16, 128, 1000), squared),
    "norm": lambda: (nn.LayerNorm(256), _numbers(16, 128, 256), squared),
    "scale": lambda: (Function(torch.mul, 256), _numbers(16, 128, 256), squared),
    "shift": lambda: (Function(torch.add, 256), _numbers(16, 128, 256), squared),
    "matmul": lambda: (Function(torch.matmul, 256, 256), _numbers(16, 128, 256), squared),
    "einsum": lambda: (
        Function(lambda x, w: torch.einsum("ntd,de->nte", x, w), 256, 256), _numbers(16, 128, 256), squared
    ),
    "bags": lambda: (Bags(1000, 64), _tokens(64, 16, 1000), squared),
    "experts": lambda: (
        Function(lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), 8, 64, 64), _numbers(64, 8, 64), squared
    ),
    "fft": lambda: (Function(_spectral, 66), _numbers(32, 64), squared),
}  # fmt: skip
