"""Small models, one for each way in which a per-sample Fisher goes wrong; all have non-zero biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wplfast

D, C, V = 6, 3, 11


def classify(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per sample, summed over tokens."""
    return wplfast.losses.cross_entropy(outputs, targets)


@dataclass
class Case:
    """A model with its data: batches of (inputs, targets)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]  # (N, T) -> inputs
    targets: Callable[[int, int], Tensor] = lambda n, t: torch.randint(0, C, (n,))
    loss: Callable[[Any, Tensor], Tensor] = classify
    axes: tuple[int, int] = (0, 0)
    rules: str = ""  # a rule that must have served something


def rows(n: int, t: int) -> Tensor:
    """[N, D]."""
    return torch.randn(n, D)


def sequence(n: int, t: int) -> Tensor:
    """[N, T, D]."""
    return torch.randn(n, t, D)


def time_first(n: int, t: int) -> Tensor:
    """[T, N, D]."""
    return torch.randn(t, n, D)


def tokens(n: int, t: int) -> Tensor:
    """[N, T] indices with repetitions."""
    return torch.randint(0, V, (n, t))


def image(n: int, t: int) -> Tensor:
    """[N, 2, 8, 8]."""
    return torch.randn(n, 2, 8, 8)


def token_targets(n: int, t: int) -> Tensor:
    """[N, T] classes, some ignored."""
    targets = torch.randint(0, V, (n, t))
    return torch.where(torch.rand(n, t) < 0.2, -100, targets)


class Lambda(nn.Module):
    """A module with named children (or parameters) and a forward function."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._forward_function = forward

    def forward(self, *args: Any) -> Any:
        return self._forward_function(self, *args)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.5)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(inplace=True), nn.Linear(8, C))


def head() -> nn.Linear:
    return nn.Linear(D, C)


def pooled(m: Any, h: Tensor) -> Tensor:
    return m.head(h.mean(1))


def rnn_cell(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], D)
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ m.w + h @ m.u + m.b)
    return m.head(h)


def rnn_cell_linear(m: Any, tokens: Tensor) -> Tensor:
    h = m.embedding.weight.new_zeros(tokens.shape[0], D)
    out = []
    for t in range(tokens.shape[1]):
        h = torch.tanh(m.wx(m.embedding(tokens[:, t])) + m.wh(h))
        out.append(m.head(h))
    return torch.stack(out, 1)


def tied_lm(m: Any, x: Tensor) -> Tensor:
    h = m.embedding(x) + m.position(torch.arange(x.shape[1]))
    h = h + torch.tanh(m.mix(h.transpose(1, 2)[..., :3].transpose(1, 2).mean(1, keepdim=True)))
    return F.linear(m.norm(h), m.embedding.weight)


def gpt_positions(m: Any, x: Tensor) -> Tensor:
    position = torch.arange(x.shape[1]).unsqueeze(0)
    return m.head(torch.tanh(m.embedding(x) + m.position_norm(m.position(position))))


def inplace_position(m: Any, x: Tensor) -> Tensor:
    h = m.embedding(x)
    h += m.position[:, : x.shape[1]]
    return m.head(torch.tanh(h))


def cls_token(m: Any, x: Tensor) -> Tensor:
    h = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1)
    return m.head(m.block(h)[:, 0])


def flattened(m: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    h = torch.tanh(m.fc(x.reshape(n * t, d))).view(n, t, -1)
    return pooled(m, h)


def flattened_time_major(m: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    h = torch.tanh(m.fc(x.transpose(0, 1).reshape(t * n, d))).view(t, n, -1).transpose(0, 1)
    return pooled(m, h)


def addmm(m: Any, x: Tensor) -> Tensor:
    h = torch.addmm(m.bias, x.reshape(-1, D), m.weight).view(*x.shape[:-1], -1)
    return pooled(m, torch.tanh(h))


def routed(m: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    choice = (flat.sum(1) * 10).long() % 2
    out = torch.zeros_like(flat)
    for e, expert in enumerate((m.first, m.second)):
        index = (choice == e).nonzero().squeeze(1)
        index = index.flip(0)
        out = out.index_add(0, index, torch.tanh(expert(flat[index])))
    return pooled(m, out.view_as(x))


def windows(m: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    h = x.view(n, t // 2, 2, d).permute(2, 0, 1, 3).reshape(2 * n * (t // 2), d)
    h = torch.tanh(m.fc(h)).view(2, n, t // 2, d).permute(1, 2, 0, 3).reshape(n, t, d)
    return pooled(m, h)


class Double(torch.autograd.Function):
    """A custom Function: no torch function sees its parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        for _ in range(2):
            h = checkpoint(lambda h: F.relu(m.second(h)) + m.scale * h, h, use_reentrant=reentrant)
        return pooled(m, h)

    return forward


def weight_norm(m: nn.Linear) -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(m)


def lora(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(F.linear(x, m.w + m.b @ m.a, m.bias)))


def masked(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(F.linear(x, m.w * m.mask)))


def masked_local(m: Any, x: Tensor) -> Tensor:
    mask = (torch.arange(D * D).view(D, D) % 2).to(x)
    return m.head(torch.tanh(F.linear(x, m.w * mask)))


def mha(batch_first: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attention(x, x, x, need_weights=False)
        return m.head(h.mean(1 if batch_first else 0))

    return forward


def cross_mha(m: Any, x: Tensor) -> Tensor:
    h, _ = m.attention(x[:, :2], x, x)
    return m.head(h.mean(1))


def lstm(m: Any, x: Tensor) -> Tensor:
    out, (h, c) = m.rnn(x)
    return m.head(out[:, -1] + h[-1] + c[0])


def gru(m: Any, x: Tensor) -> Tensor:
    out, h = m.rnn(x)
    return m.head(out.mean(0) + h[-1])


def conv(layers: Callable[[], tuple[nn.Module, ...]]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers(), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(C))


def dead_branch(m: Any, x: Tensor) -> Tensor:
    m.unused(x)
    return m.head(m.used(x))


LM = {"inputs": tokens, "targets": token_targets}
EMB = {"embedding": lambda: nn.Embedding(V, D)}

CASES: dict[str, Case] = {
    "mlp, in-place relu": Case(mlp, rows, rules="linear"),
    "mlp on [N, T, D]": Case(
        lambda: Lambda(lambda m, x: pooled(m, m.fc(x)), fc=nn.Linear(D, D), head=head()), sequence
    ),
    "module used twice": Case(
        lambda: Lambda(lambda m, x: m.head(m.fc(torch.tanh(m.fc(x)))), fc=nn.Linear(D, D), head=head()), rows
    ),
    "module used on both ranks": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.tanh(m.fc(x)).mean(1) + m.fc(x[:, 0])), fc=nn.Linear(D, D), head=head()
        ),
        sequence,
    ),
    "rnn cell, raw matmul": Case(lambda: Lambda(rnn_cell, w=par(D, D), u=par(D, D), b=par(D), head=head()), sequence),
    "rnn cell, linear": Case(
        lambda: Lambda(
            rnn_cell_linear, embedding=nn.Embedding(V, D), wx=nn.Linear(D, D), wh=nn.Linear(D, D), head=nn.Linear(D, V)
        ),
        **LM,
    ),
    "tied head": Case(
        lambda: Lambda(
            tied_lm,
            embedding=nn.Embedding(V, D),
            position=nn.Embedding(9, D),
            mix=nn.Linear(D, D),
            norm=nn.LayerNorm(D),
        ),
        **LM,
    ),
    "positions [1, T], normalised": Case(
        lambda: Lambda(
            gpt_positions,
            embedding=nn.Embedding(V, D, padding_idx=0),
            position=nn.Embedding(9, D),
            position_norm=nn.LayerNorm(D),
            head=nn.Linear(D, V),
        ),
        **LM,
    ),
    "position parameter, in place": Case(
        lambda: Lambda(inplace_position, embedding=nn.Embedding(V, D), position=par(1, 9, D), head=nn.Linear(D, V)),
        **LM,
    ),
    "class token": Case(
        lambda: Lambda(
            cls_token, cls=par(1, 1, D), block=nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), head=head()
        ),
        sequence,
    ),
    "flattened [N*T, D]": Case(lambda: Lambda(flattened, fc=nn.Linear(D, D), head=head()), sequence, rules="linear"),
    "flattened [T*N, D]": Case(
        lambda: Lambda(flattened_time_major, fc=nn.Linear(D, D), head=head()), sequence, rules="linear"
    ),
    "windows [2*N*T/2, D]": Case(
        lambda: Lambda(windows, fc=nn.Linear(D, D), head=head()), lambda n, t: torch.randn(n, 4, D), rules="linear"
    ),
    "conv1d of HF (addmm)": Case(lambda: Lambda(addmm, weight=par(D, D), bias=par(D), head=head()), sequence),
    "routed experts": Case(
        lambda: Lambda(routed, first=nn.Linear(D, D), second=nn.Linear(D, D), head=head()), sequence, rules="linear"
    ),
    "checkpoint, reentrant": Case(
        lambda: Lambda(checkpointed(True), first=nn.Linear(D, D), second=nn.Linear(D, D), scale=par(D), head=head()),
        sequence,
    ),
    "checkpoint, non-reentrant": Case(
        lambda: Lambda(checkpointed(False), first=nn.Linear(D, D), second=nn.Linear(D, D), scale=par(D), head=head()),
        sequence,
    ),
    "attention, batch first": Case(
        lambda: Lambda(mha(True), attention=nn.MultiheadAttention(D, 2, batch_first=True), head=head()),
        sequence,
        rules="linear",
    ),
    "attention, time first": Case(
        lambda: Lambda(mha(False), attention=nn.MultiheadAttention(D, 2), head=head()),
        time_first,
        axes=(1, 0),
        rules="linear",
    ),
    "attention, cross": Case(
        lambda: Lambda(cross_mha, attention=nn.MultiheadAttention(D, 2, batch_first=True), head=head()), sequence
    ),
    "encoder layer": Case(
        lambda: Lambda(
            lambda m, x: pooled(m, m.block(x)),
            block=nn.TransformerEncoderLayer(D, 2, 8, 0.1, batch_first=True),
            head=head(),
        ),
        sequence,
    ),
    "lstm": Case(lambda: Lambda(lstm, rnn=nn.LSTM(D, D, 2, batch_first=True), head=head()), sequence),
    "gru, time first": Case(lambda: Lambda(gru, rnn=nn.GRU(D, D), head=head()), time_first, axes=(1, 0)),
    "conv, strided and padded": Case(conv(lambda: (nn.Conv2d(2, 4, 3, stride=2, padding=1),)), image),
    "conv, dilated, circular": Case(
        conv(lambda: (nn.Conv2d(2, 4, 3, padding=2, dilation=2, padding_mode="circular"),)), image
    ),
    "conv, grouped and depthwise": Case(
        conv(
            lambda: (
                nn.Conv2d(2, 4, 3, groups=2),
                nn.Conv2d(4, 4, 3, groups=4, bias=False),
            )
        ),
        image,
    ),
    "conv, transposed": Case(conv(lambda: (nn.ConvTranspose2d(2, 4, 3, stride=2),)), image),
    "conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(D, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, C)
        ),
        lambda n, t: torch.randn(n, D, t),
    ),
    "batch norm in eval": Case(
        conv(
            lambda: (
                nn.Conv2d(2, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
            )
        ),
        image,
    ),
    "group and instance norm": Case(
        conv(
            lambda: (
                nn.Conv2d(2, 4, 3),
                nn.GroupNorm(2, 4),
                nn.InstanceNorm2d(4, affine=True),
            )
        ),
        image,
    ),
    "layer and rms norm": Case(
        lambda: Lambda(
            lambda m, x: pooled(m, m.rms(torch.tanh(m.ln(x)))), ln=nn.LayerNorm(D), rms=nn.RMSNorm(D), head=head()
        ),
        sequence,
    ),
    "weight norm": Case(lambda: nn.Sequential(weight_norm(nn.Linear(D, D)), nn.Tanh(), head()), rows),
    "lora, W + BA": Case(
        lambda: Lambda(lora, w=par(D, D), a=par(2, D), b=par(D, 2), bias=par(D), head=head()),
        sequence,
        lambda n, t: torch.randint(0, C, (n, t)),
    ),
    "mask on a weight, local": Case(lambda: Lambda(masked_local, w=par(D, D), head=head()), rows),
    "cat of weights": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.tanh(F.linear(x, torch.cat([m.a, m.b])))),
            a=par(2, D),
            b=par(D - 2, D),
            head=head(),
        ),
        rows,
    ),
    "transposed weight": Case(
        lambda: Lambda(lambda m, x: m.head(torch.tanh(F.linear(x, m.w.t()))), w=par(D, D), head=head()),
        sequence,
        lambda n, t: torch.randint(0, C, (n, t)),
    ),
    "chunks of a packed weight": Case(
        lambda: Lambda(
            lambda m, x: pooled(m, F.linear(x, m.w.chunk(2)[0]) * torch.sigmoid(F.linear(x, m.w.chunk(2)[1]))),
            w=par(2 * D, D),
            head=head(),
        ),
        sequence,
    ),
    "overlapping views": Case(
        lambda: Lambda(lambda m, x: m.head(F.linear(x, m.w[:D]) * F.linear(x, m.w[1:])), w=par(D + 1, D), head=head()),
        rows,
    ),
    "einsum": Case(
        lambda: Lambda(
            lambda m, x: pooled(m, torch.tanh(torch.einsum("ntd,dk->ntk", x, m.w))), w=par(D, D), head=head()
        ),
        sequence,
    ),
    "scale and shift": Case(
        lambda: Lambda(lambda m, x: pooled(m, 2 - (x * m.scale - m.shift)), scale=par(D), shift=par(1), head=head()),
        sequence,
    ),
    "custom autograd.Function": Case(
        lambda: Lambda(lambda m, x: m.head(torch.tanh(Double.apply(x, m.w)) + m.w[0]), w=par(D, D), head=head()),
        rows,
        rules="one by one",
    ),
    "torch.jit.script": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.tanh(m.scripted(x))), scripted=torch.jit.script(nn.Linear(D, D)), head=head()
        ),
        rows,
        rules="one by one",
    ),
    "vmap inside": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.vmap(lambda r: torch.tanh(m.fc(r)))(x)), fc=nn.Linear(D, D), head=head()
        ),
        rows,
    ),
    "dead branch": Case(lambda: Lambda(dead_branch, used=nn.Linear(D, D), unused=nn.Linear(D, D), head=head()), rows),
    "bilinear": Case(
        lambda: Lambda(lambda m, x: m.head(m.bi(x, torch.tanh(x))), bi=nn.Bilinear(D, D, D), head=head()), rows
    ),
    "prelu": Case(
        lambda: Lambda(lambda m, x: m.head(m.act(m.fc(x))), fc=nn.Linear(D, D), act=nn.PReLU(D), head=head()),
        rows,
        rules="scale",
    ),
    "prelu of channels": Case(
        lambda: Lambda(
            lambda m, x: m.head(m.act(m.one(m.fc(x)).mT).mT).sum(1),
            fc=nn.Linear(D, D),
            one=nn.PReLU(),
            act=nn.PReLU(D),
            head=head(),
        ),
        sequence,
        rules="scale",
    ),
    "prelu of channels, time first": Case(
        lambda: Lambda(
            lambda m, x: m.head(m.act(m.fc(x.transpose(0, 1)).mT).mT.transpose(0, 1)).sum(1),
            fc=nn.Linear(D, D),
            act=nn.PReLU(D),
            head=head(),
        ),
        sequence,
    ),
    "in place, as a statement": Case(
        lambda: Lambda(in_place_statements, f=nn.Linear(D, D), p=par(D), q=par(D), head=head()), sequence
    ),
    "in place on a fresh tensor": Case(lambda: Lambda(fresh_table, p=par(3, D), head=head()), sequence),
    "derived, unseen consumer": Case(
        lambda: Lambda(straight_through, w=par(D, D), s=par(D), head=head()), rows, rules="one by one"
    ),
    "complex weights": Case(lambda: Lambda(fourier, w=par(D // 2 + 1, 2), head=head()), sequence, rules="scale"),
    "permuted and merged": Case(
        lambda: Lambda(merged, f=nn.Linear(D, D), head=head()), lambda n, t: torch.randn(n, t, 2, D)
    ),
    "samples sorted by size": Case(lambda: Lambda(sorted_inside, f=nn.Linear(D, D), head=head()), rows),
    "cast to the weight's type": Case(lambda: Lambda(lambda m, x: m.fc(x.to(m.fc.weight)), fc=head()), rows),
    "sparse embedding": Case(
        lambda: Lambda(lambda m, x: m.head(m.e(x)), e=nn.Embedding(V, D, sparse=True), head=nn.Linear(D, V)), **LM
    ),
    "expanded view": Case(
        lambda: Lambda(lambda m, x: m.head(F.linear(x, m.w[:, :1].expand(D, D))), w=par(D, 2), head=head()), rows
    ),
    "bias alone": Case(
        lambda: Lambda(
            lambda m, x: m.head(F.linear(x, m.eye, m.b)),
            eye=nn.Parameter(torch.eye(D), requires_grad=False),
            b=par(D),
            head=head(),
        ),
        rows,
    ),
    "set item": Case(lambda: Lambda(set_item, cls=par(D), head=head()), sequence),
}


def in_place_statements(m: Any, x: Tensor) -> Tensor:
    h = m.f(x)
    h.add_(m.p)
    h[:, 0].mul_(m.q)
    return pooled(m, torch.tanh(h))


def fresh_table(m: Any, x: Tensor) -> Tensor:
    table = torch.zeros(x.shape[1], D, dtype=x.dtype)
    table[1:3] = m.p[: x.shape[1] - 1][:2]
    return pooled(m, torch.tanh(x + table))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def straight_through(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(F.linear(x, StraightThrough.apply(m.w * m.s))))


def fourier(m: Any, x: Tensor) -> Tensor:
    return pooled(m, torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w), n=D)))


def merged(m: Any, x: Tensor) -> Tensor:
    n, t, k, d = x.shape
    h = torch.tanh(m.f(x.permute(1, 0, 2, 3).reshape(t * n * k, d))).view(t, n, k, d)
    return m.head(h.mean((0, 2)))


def sorted_inside(m: Any, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    h = torch.tanh(m.f(x[order]))
    return m.head(torch.zeros_like(h).index_copy(0, order, h))


def set_item(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(x).clone()
    h[:, 0] = m.cls
    return m.head(h.prod(1))
