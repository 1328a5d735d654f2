"""The models that the Fisher pass is measured on, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and a source of batches.

    Args:
        name: as on the command line.
        shown: what it is.
        target: the ratio of a Fisher pass to an ordinary pass that it should not exceed.
        model: makes the model; ``quick`` asks for a tiny one.
        batch: makes a batch for it.
        precision: "fp32"; or "bf16" or "tf32", where an error is measured in that of a one-sample loop of the same
            precision.
        batches: of a whole call.
    """

    name: str
    shown: str
    target: float
    model: Callable[[bool], nn.Module]
    batch: Callable[[bool, torch.Generator], Batch]
    precision: str = "fp32"
    batches: int = 32


class Block(nn.Module):
    """A transformer block, normalised before attention and before the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, D] to [N, T, D]."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    """A causal language model with learnt positions; ``tied`` shares the head's weight with the embedding's."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, T] to logits [N, T, V]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


class Recurrent(nn.Module):
    """A language model around a recurrent cell written with ``@``, as architecture search builds its cells."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.input, self.hidden = (nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, T] to logits [N, T, V]."""
        state, states = self.bias.new_zeros(len(tokens), len(self.bias)), []
        for x in self.tokens(tokens).unbind(1):
            state = torch.tanh(x @ self.input + state @ self.hidden + self.bias)
            states.append(state)
        return self.head(torch.stack(states, 1))


def _mlp(quick: bool) -> nn.Module:
    width = 32 if quick else 1024
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def _cnn(quick: bool) -> nn.Module:
    channels = (3, 4, 4, 4) if quick else (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(channels):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 16, 10))


def _decoder(tied: bool) -> Callable[[bool], nn.Module]:
    return lambda quick: Decoder(50, 8, 16, 1, tied) if quick else Decoder(1000, 128, 256, 4, tied)


def _recurrent(quick: bool) -> nn.Module:
    return Recurrent(50, 16) if quick else Recurrent(500, 256)


def _images(n: int, *shape: int) -> Callable[[bool, torch.Generator], Batch]:
    def batch(quick: bool, generator: torch.Generator) -> Batch:
        size = 4 if quick else n
        return torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator)

    return batch


def _text(n: int, length: int, vocabulary: int) -> Callable[[bool, torch.Generator], Batch]:
    def batch(quick: bool, generator: torch.Generator) -> Batch:
        size = (4, 8 + 1) if quick else (n, length + 1)
        tokens = torch.randint(50 if quick else vocabulary, size, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp", "MLP 784-1024-1024-10, N=256", 1.05, _mlp, _images(256, 784)),
        Workload("cnn", "CNN 3x(conv 3x3, relu, pool) 32-64-128, 32x32, N=64", 1.3, _cnn, _images(64, 3, 32, 32)),
        Workload(
            "decoder", "decoder d=256, 4 layers, V=1000, T=128, N=16", 1.05, _decoder(False), _text(16, 128, 1000)
        ),
        Workload("tied", "the same decoder, tied head", 1.05, _decoder(True), _text(16, 128, 1000)),
        Workload("rnn", "RNN cell written with @, d=256, V=500, T=35, N=32", 1.1, _recurrent, _text(32, 35, 500)),
    )
}
