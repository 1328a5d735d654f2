"""A small language model over bytes, and the low-rank adapters that it is fine-tuned with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256
_SCALE = 2.0  # of adapters: LoRA's alpha over its rank, where alpha is twice the rank


class Adapted(nn.Module):
    """A linear layer with an adapter of low rank beside it: y = W x + b + 2 B A x, B = 0 to begin with."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out)
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., n_in] to [..., n_out]."""
        return self.base(x) + _SCALE * self.up(self.down(x))


class Block(nn.Module):
    """Causal attention, then a perceptron, each beside a residual connection."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Adapted(width, 3 * width, rank), Adapted(width, width, rank)
        self.wider, self.back = Adapted(width, 4 * width, rank), Adapted(4 * width, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, T, width] to the same shape."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.back(F.gelu(self.wider(self.before_mlp(x))))


class Model(nn.Module):
    """A transformer that predicts the next byte.

    Args:
        width: of a token's vector.
        depth: number of blocks.
        heads: of attention.
        rank: of adapters.
        length: of the longest input.
    """

    def __init__(self, width: int, depth: int, heads: int, rank: int, length: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, rank) for _ in range(depth))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes [N, T], int64, to logits [N, T, 256]."""
        h = self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.last(h))

    def train_adapters(self, adapters: bool) -> Model:
        """Let the adapters require grad, or all other parameters."""
        for name, p in self.named_parameters():
            p.requires_grad_((".down." in name or ".up." in name) == adapters)
        return self
