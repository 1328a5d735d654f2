"""Models whose calls change from batch to batch, in number, order and size: the Fisher is that of the one-sample loop.

Every model is drawn from a seed: a few operations that use the same weights in layouts of several kinds, and for each
batch which of them run, how often and in which order, on how many samples and steps. Samples do not depend on each
other, so that a wrong value and a refusal are faults alike. ``python tests/test_varying_calls.py FIRST LAST``
tries many.
"""

from __future__ import annotations

import random
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import Tensor

import wplfast

MAX_T = 6


class Varying(nn.Module):
    """Runs the operations that a batch names, on h [N, T, D]."""

    def __init__(self, rng: random.Random, d: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

        def matrix(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") / d**0.5)

        self.w = nn.ParameterList([matrix(d, d) for _ in range(2)])
        self.b = nn.ParameterList([matrix(d) for _ in range(2)])
        self.scale, self.positions, self.table = matrix(d), matrix(MAX_T, d), matrix(5, d)
        self.mask = torch.rand(d, d, generator=generator, dtype=torch.float64, device="cpu")

    def forward(self, h: Tensor, plan: list[tuple[int, int]]) -> Tensor:
        for operation, index in plan:
            h = OPERATIONS[operation](self, h, self.w[index], self.b[index])
        return h


def recurrent(m, h, w, b):
    state, found = torch.zeros_like(h[:, 0]), []
    for t in range(h.shape[1]):
        state = torch.tanh(F.linear(h[:, t], w, b) + state @ m.w[0])
        found.append(state)
    return torch.stack(found, 1)


def windows(m, h, w, b):
    n, t, d = h.shape
    if t % 2:
        return torch.tanh(F.linear(h, w, b))
    rows = h.view(n, t // 2, 2, d).permute(1, 0, 2, 3).reshape(t * n, d)
    return torch.tanh(F.linear(rows, w, b)).view(t // 2, n, 2, d).permute(1, 0, 2, 3).reshape(n, t, d)


def features_first(time_first):
    def run(m, h, w, b):
        n, t, d = h.shape
        order, back = ((2, 1, 0), (2, 1, 0)) if time_first else ((2, 0, 1), (1, 2, 0))
        sizes = (d, t, n) if time_first else (d, n, t)
        return torch.tanh(w @ h.permute(order).reshape(d, n * t)).view(sizes).permute(back)

    return run


def pooled(m, h, w, b):
    return h + torch.tanh(F.linear(h.mean(1), w, b)).unsqueeze(1)


def unused(m, h, w, b):
    F.linear(h, w, b)
    return h


OPERATIONS = [
    lambda m, h, w, b: torch.tanh(F.linear(h, w, b)),
    lambda m, h, w, b: torch.tanh(F.linear(h.transpose(0, 1), w, b)).transpose(0, 1),
    lambda m, h, w, b: torch.tanh(F.linear(h.transpose(0, 1).contiguous(), w, b)).transpose(0, 1).contiguous(),
    lambda m, h, w, b: torch.tanh(F.linear(h.reshape(-1, h.shape[2]), w, b)).view(h.shape),
    lambda m, h, w, b: (
        torch.tanh(F.linear(h.transpose(0, 1).reshape(-1, h.shape[2]), w, b))
        .view(h.shape[1], h.shape[0], -1)
        .transpose(0, 1)
    ),
    features_first(time_first=False),
    features_first(time_first=True),
    lambda m, h, w, b: torch.tanh(h @ w),
    lambda m, h, w, b: torch.tanh(h.transpose(0, 1).contiguous() @ w).transpose(0, 1),
    lambda m, h, w, b: h * m.scale,
    lambda m, h, w, b: h + m.positions[: h.shape[1]],
    lambda m, h, w, b: h + F.embedding(torch.arange(h.shape[1]), m.positions),
    lambda m, h, w, b: h + F.embedding((h.detach()[..., 0] > 0).long() + 2 * (h.detach()[..., 1] > 0).long(), m.table),
    recurrent,
    windows,
    pooled,
    lambda m, h, w, b: torch.tanh(F.linear(h, w * m.mask + m.w[0], b)),
    lambda m, h, w, b: torch.tanh(torch.einsum("ntd,ed->nte", h, w)),
    lambda m, h, w, b: torch.tanh(F.linear(h, torch.cat([m.w[0][:1], w[1:]]), b)),
    unused,
]


def draw(seed: int):
    """Return a model and its batches."""
    rng = random.Random(seed)
    d = rng.choice((2, 3, 4))
    model = Varying(rng, d)
    pool = [(rng.randrange(len(OPERATIONS)), rng.randrange(2)) for _ in range(rng.randint(1, 4))]
    base = [rng.choice(pool) for _ in range(rng.randint(1, 5))]
    varies = rng.choice(("count", "order", "both", "sizes"))
    sizes = [(rng.randint(1, 5), rng.randint(1, MAX_T)) for _ in range(rng.randint(1, 3))]
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(rng.randint(2, 6)):
        plan = list(base)
        if varies in ("count", "both"):
            plan = plan[: rng.randint(1, len(plan))] + [rng.choice(pool)] * rng.randint(0, 3)
        if varies in ("order", "both"):
            rng.shuffle(plan)
        n, t = rng.choice(sizes)
        x = torch.randn(n, t, d, generator=generator, dtype=torch.float64, device="cpu")
        plan.append((9, 0))  # some parameter is used in any case
        data.append(((x, plan), torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")))
    return model, data


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    steps = torch.arange(1.0, 1 + outputs[0].numel(), dtype=outputs.dtype, device="cpu").view(outputs.shape[1:]).cos()
    return ((outputs * steps).flatten(1).sum(1) - targets).square()


def check(seed: int) -> None:
    """Compare one model with the loop."""
    model, data = draw(seed)
    expected = fisher_loop(model, data, loss)
    if seed % 3:
        found = wplfast.fisher_diagonal(model, data, loss)
    else:
        with wplfast.FisherAccumulator(model, independent=True) as accumulator:
            for (x, plan), targets in data:
                accumulator.backward(loss(model(x, plan), targets))
        found = accumulator.result()
    assert_close(found, expected, 1e-10, 1e-11)


@pytest.mark.cpu_only("draws in float64")
@pytest.mark.parametrize("seed", range(60))
def test_against_the_loop(seed):
    check(seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wrong = 0
    for chosen in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            check(chosen)
        except Exception as error:
            wrong += 1
            print(f"seed {chosen}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    print(f"{int(sys.argv[2]) - int(sys.argv[1])} models, {wrong} wrong")
    sys.exit(wrong > 0)
