"""The models that are measured: small ones for any machine, and those of the size that GPUs are for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLUs in between."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: Sequence[int]) -> nn.Sequential:
    """Return convolutions 3x3 of these channels over images 32x32, each with ReLU and pooling, and a linear head."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(channels):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 16, 10))


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


class Autocast(nn.Module):
    """A float32 model under ``torch.autocast``; a float64 copy, as the oracle makes, runs as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run the model in bfloat16 where autocast says so."""
        enabled = next(self.model.parameters()).dtype == torch.float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            out: Tensor = self.model(x)
        return out


class Bottleneck(nn.Module):
    """A residual block 1x1, 3x3, 1x1 with four times the width on the outside."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.reduce, self.reduce_norm = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.across, self.across_norm = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.expand_norm = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Identity()
            if inside == out and stride == 1
            else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, 4 width, H / stride, W / stride]."""
        y = F.relu(self.reduce_norm(self.reduce(x)))
        y = F.relu(self.across_norm(self.across(y)))
        return F.relu(self.expand_norm(self.expand(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network over images, in eval mode: batch statistics would couple the samples."""

    def __init__(self, width: int, depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, inside = [], width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                blocks.append(Bottleneck(inside, width << stage, 2 if stage and block == 0 else 1))
                inside = 4 * (width << stage)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inside, classes)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, classes]."""
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class WordLSTM(nn.Module):
    """A word-level language model around ``nn.LSTM``; cuDNN differentiates it in training mode only."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.cells = nn.LSTM(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, T] to logits [N, T, V]."""
        return self.head(self.cells(self.tokens(tokens))[0])
