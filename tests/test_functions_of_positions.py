"""What a model computes of positions in several steps, which an accumulator is to know from coupled samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import C, classify

import wplfast

D, H = 16, 8


def line(x):
    return torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]


def waves(x):
    return torch.sin(line(x) * torch.arange(D, dtype=x.dtype))


def mlp(n, *sizes):
    pairs = zip((n, *sizes), sizes, strict=False)
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def zero_at_the_end(module):
    nn.init.zeros_(module[-1].weight)
    return module


def by_distance(m, x):
    """Bias of attention, as in Swin v2."""
    t = x.shape[1]
    places = torch.arange(1 - t, t, dtype=x.dtype) / t
    bias = m.f(torch.stack([places, places.abs()], -1))[torch.arange(t)[:, None] - torch.arange(t) + t - 1][..., 0]
    return torch.softmax(m.fc(x) @ x.transpose(1, 2) + bias, -1) @ x


def long_kernel(m, x):
    """S4D: a kernel over all times, applied by Fourier transforms."""
    t = x.shape[1]
    kernel = torch.einsum("dn,dnt->dt", m.c, torch.exp(-m.a.exp()[..., None] * torch.arange(t)))
    u = torch.fft.rfft(x.transpose(1, 2), n=2 * t)
    return m.fc(torch.fft.irfft(torch.fft.rfft(kernel, n=2 * t) * u, n=2 * t)[..., :t].transpose(1, 2))


def attended(m, x):
    places = m.f(line(x))[None]
    return m.fc(x) + m.g(m.attention(places, places, places, need_weights=False)[0])


def normalised(m, x):
    places = m.norm(torch.tanh(m.f(line(x))))
    return m.fc(x) * torch.sigmoid(m.g(places + m.h(places)))


def as_kernel(m, x):
    kernel = m.f(torch.linspace(-1, 1, 5, dtype=x.dtype)[:, None]).t()[:, None]
    return F.conv1d(m.fc(x).transpose(1, 2), kernel, padding=2, groups=D).transpose(1, 2)


def looked_up(m, x):
    return m.fc(x + m.norm(m.table(torch.arange(x.shape[1]))))


def grid(m, x):
    axes = torch.linspace(-1, 1, x.shape[1] // 3, dtype=x.dtype), torch.linspace(0, 1, 3, dtype=x.dtype)
    return m.fc(x) + m.f(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).flatten(0, 1)


#: What a model does, and what it has for that.
RANGES = {  # of indices before any data
    "table, normalised": (looked_up, lambda: {"table": nn.Embedding(64, D), "norm": nn.LayerNorm(D)}),
    "long kernel": (long_kernel, lambda: {n: nn.Parameter(torch.rand(D, 3)) for n in "ac"}),
}
MEASURED = {
    "added": (lambda m, x: m.fc(x) + m.f(line(x)), lambda: {"f": mlp(1, H, D)}),
    "multiplied": (lambda m, x: m.fc(x) * m.f(line(x)), lambda: {"f": mlp(1, H, H + 1, D)}),
    "before": (lambda m, x: m.fc(x + m.f(line(x))), lambda: {"f": mlp(1, H, D)}),
    "waves": (lambda m, x: m.fc(x) + m.f(waves(x)), lambda: {"f": mlp(D, H, D)}),
    "zero": (lambda m, x: m.fc(x) + m.f(line(x)), lambda: {"f": zero_at_the_end(mlp(1, H, H + 1, D))}),
    "expanded": (lambda m, x: m.fc(x) + m.f(line(x)).expand(len(x), -1, -1), lambda: {"f": mlp(1, H, D)}),
    "two joined": (
        lambda m, x: m.fc(x) + m.h(torch.cat([m.f(line(x)), m.g(1 - line(x))], 1)),
        lambda: {"f": mlp(1, H), "g": mlp(1, H), "h": nn.Linear(2 * H, D)},
    ),
    "shared with data": (
        lambda m, x: m.f(m.fc(x)) + m.f(line(x) * torch.ones(D, dtype=x.dtype)),
        lambda: {"f": mlp(D, H, D)},
    ),
    "normalised": (
        normalised,
        lambda: {"f": nn.Linear(1, H), "norm": nn.LayerNorm(H), "h": nn.Linear(H, H), "g": nn.Linear(H, D)},
    ),
    "attention": (
        attended,
        lambda: {
            "f": nn.Linear(1, H),
            "attention": nn.MultiheadAttention(H, 2, batch_first=True),
            "g": nn.Linear(H, D),
        },
    ),
    "checkpointed": (
        lambda m, x: m.fc(x) + checkpoint(m.f, line(x), use_reentrant=False),
        lambda: {"f": mlp(1, H, D)},
    ),
    "frozen at first": (
        lambda m, x: m.fc(x) + m.f(line(x)),
        lambda: {"f": nn.Sequential(nn.Linear(1, H).requires_grad_(False), nn.Tanh(), nn.Linear(H, D))},
    ),
    "by distance": (by_distance, lambda: {"f": mlp(2, H, 2)}),
    "kernel": (as_kernel, lambda: {"f": mlp(1, H, D)}),
    "grid": (grid, lambda: {"f": mlp(2, H, D)}),
}
CASES = RANGES | MEASURED


class Model(nn.Module):
    """A head on what ``mix(model, x)`` makes of x [N, T, D]."""

    def __init__(self, mix, parts):
        super().__init__()
        self.fc, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.mix = mix
        for name, part in parts().items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self, x)).mean(1))


def model_of(mix, parts):
    torch.manual_seed(0)
    return Model(mix, parts).double()


def batches(*sizes):
    return [(torch.randn(n, t, D, dtype=torch.float64), torch.randint(0, C, (n,))) for n, t in sizes]


def accumulated(model, data, **options):
    with wplfast.FisherAccumulator(model, **options) as accumulator:
        for x, y in data:
            accumulator.backward(classify(model(x), y))
    return accumulator.result()


@pytest.mark.parametrize("sizes", [[(4, 9)] * 2 + [(3, 9)], [(16, 9), (16, 6)], [(20, 9), (5, 9)]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_fisher_is_that_of_the_loop(name, sizes):
    model, data = model_of(*CASES[name]), batches(*sizes)
    expected = fisher_loop(model, data, classify)
    found = accumulated(model, data)
    assert_close(found, expected, 1e-11, 1e-12)
    assert_close(wplfast.fisher_diagonal(model, data, classify), expected, 1e-11, 1e-12)
    assert bool(found.report.unchecked) == (name in MEASURED), "statistics of the batch look the same"


@pytest.mark.parametrize("size", [6, 18])
@pytest.mark.parametrize("name", CASES)
def test_as_many_positions_as_samples(name, size):
    """One batch does not tell then, and the error says what does."""
    model, data = model_of(*CASES[name]), batches((size, size), (size, size), (2, size))
    expected = fisher_loop(model, data, classify)
    assert_close(accumulated(model, data, independent=True), expected, 1e-11, 1e-12)
    assert_close(wplfast.fisher_diagonal(model, data, classify), expected, 1e-11, 1e-12)
    if name in RANGES:
        assert_close(accumulated(model, data), expected, 1e-11, 1e-12)
    elif name not in ("kernel", "grid", "by distance"):
        with pytest.raises(wplfast.errors.CoupledSamplesError, match="independent=True"):
            accumulated(model, data)


def test_positions_are_parameters_alone_from_the_second_batch_on():
    model, data = model_of(*MEASURED["zero"]), batches((4, 9))
    with wplfast.FisherAccumulator(model) as accumulator:
        for _ in range(3):
            ((x, y),) = data
            accumulator.backward(classify(model(x), y))
            session = accumulator._session
        assert len(session.interception.taps) == 3, "fc, a sum, and head"


def pooled(m, x):
    return m.fc(x).mean(0)


#: Batches of 4 samples fit in none of the sizes of a tensor [T, 1], nor of [T, H + 1].
COUPLED = {
    "pooled": lambda m, x: m.fc(x) + m.g(pooled(m, x)),
    "negatives": lambda m, x: torch.einsum("nm,mtd->ntd", m.fc(x).flatten(1) @ m.fc(x).flatten(1).t(), x),
    "centred": lambda m, x: m.fc(x) - pooled(m, x),
    "positions times statistics": lambda m, x: m.fc(x) + m.g(m.f(line(x)) * pooled(m, x)),
    "positions and statistics": lambda m, x: m.fc(x) + m.g(torch.tanh(m.f(line(x)) + pooled(m, x))),
    "data, gated by positions": lambda m, x: m.fc(x) + m.g((m.f(line(x)) * x).mean(0)),
    "data, shifted by positions": lambda m, x: m.fc(x) + m.g(torch.tanh(m.f(line(x)) + x).mean(0)),
    "data, chosen by positions": lambda m, x: m.fc(x) + m.g(torch.where(x > 0, m.f(line(x)), 0.0).mean(0)),
    "data, in one product": lambda m, x: m.fc(x) + torch.einsum("td,ntd,de->te", m.f(line(x)), x, m.g.weight),
    "positions and a leaf": lambda m, x: m.fc(x) + m.g(m.f(line(x)) + x.mean(0).requires_grad_()),
}


@pytest.mark.parametrize("size", [(4, 9), (20, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_stay_an_error(name, size):
    model = model_of(COUPLED[name], lambda: {"f": mlp(1, H, D), "g": nn.Linear(D, D)})
    data = batches(size)
    with pytest.raises(wplfast.errors.CoupledSamplesError, match="samples are coupled"):
        accumulated(model, data)
