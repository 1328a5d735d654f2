"""Models of one operation each, for ``python -m benchmarks rule NAME``.

A case is a function that returns a model, a batch of inputs and targets with the samples on their first axis, and a
loss function from outputs and targets to one loss per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workloads import Batch, Loss, rows, text

Case = Callable[[], tuple[nn.Module, Batch, Loss]]


class Function(nn.Module):
    """A function of an input and of one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(x, self.weight)


def squared(outputs: Tensor, _: Tensor) -> Tensor:
    """Return half the sum of each sample's squared outputs."""
    return outputs.flatten(1).square().sum(1) / 2


def _of(model: Callable[[], nn.Module], *shape: int, tokens: int = 0) -> Case:
    """Return the case of a model on numbers of a shape, or on tokens below a number."""
    draw = text(*shape, tokens) if tokens else rows(*shape)
    return lambda: (model(), draw(False, torch.Generator().manual_seed(0)), squared)


class Pairs(nn.Module):
    """A bilinear layer of two halves of its input."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Bilinear(width, width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        left, right = x.chunk(2, -1)
        output: Tensor = self.layer(left, right)
        return output


def _experts(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def _fourier(x: Tensor, weight: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(weight.view(-1, 2)), x.shape[-1])


class Experts(nn.Module):
    """Two-layer experts, each for the tokens that a router sends to it."""

    def __init__(self, width: int, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.router, self.chosen = nn.Linear(width, experts), chosen
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the chosen experts to every token of [N, T, D]."""
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(self.chosen, -1)
        found = torch.zeros_like(tokens)
        for expert in range(len(self.up)):
            place, rank = (chosen == expert).nonzero(as_tuple=True)
            inner = F.silu(tokens[place] @ self.up[expert]) @ self.down[expert]
            found = found.index_add(0, place, inner * shares[place, rank, None])
        return found.view_as(x)


class Standardised(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        dims = (1, 2, 3)
        weight = self.weight - self.weight.mean(dims, keepdim=True)
        weight = weight / (self.weight.var(dims, keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def _complex(x: Tensor, weight: Tensor) -> Tensor:
    return torch.view_as_real(F.linear(x + 0j, torch.view_as_complex(weight.unflatten(1, (-1, 2)))))


CASES: dict[str, Case] = {
    "linear": _of(lambda: nn.Linear(1024, 1024), 256, 1024),
    "small": _of(lambda: nn.Linear(8, 8), 8, 8),  # what a call site costs by itself
    "conv": _of(lambda: nn.Conv2d(32, 64, 3, padding=1), 64, 32, 16, 16),
    "embedding": _of(lambda: nn.Embedding(1000, 256), 16, 128, tokens=1000),
    "norm": _of(lambda: nn.LayerNorm(256), 16, 128, 256),
    "scale": _of(lambda: Function(torch.mul, 256), 16, 128, 256),
    "shift": _of(lambda: Function(torch.add, 256), 16, 128, 256),
    "matmul": _of(lambda: Function(torch.matmul, 256, 256), 16, 128, 256),
    "einsum": _of(lambda: Function(lambda x, w: torch.einsum("ntd,de->nte", x, w), 256, 256), 16, 128, 256),
    "bilinear": _of(lambda: Pairs(32, 32), 64, 4, 64),
    "scores": _of(lambda: Pairs(256, 1), 64, 16, 512),  # a bilinear layer with one output
    "bags": _of(lambda: nn.EmbeddingBag(1000, 64), 64, 16, tokens=1000),
    "experts": _of(lambda: Function(_experts, 8, 64, 64), 64, 8, 64),  # a weight with a batch axis
    "cosine": _of(lambda: Function(lambda x, w: F.linear(x, F.normalize(w)), 512, 512), 64, 512),
    "weight norm": _of(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(512, 512)), 64, 512),
    "standardised": _of(lambda: Standardised(32, 64, 3, padding=1), 32, 32, 16, 16),
    "routed": _of(lambda: Experts(256, 512, 8, 2), 32, 64, 256),
    "complex": _of(lambda: Function(_complex, 256, 512), 64, 16, 256),
    "fft": _of(lambda: Function(_fourier, 66), 32, 64),
}
