"""Batches of any form: inputs of samples, inputs that all share, coupling of one of them, state that stays.

Every model is drawn from a seed. Where it does not couple samples, the Fisher is that of the one-sample loop, and a
refusal is a fault. Where it does, the pass is refused, or says that it could not check.
``python tests/test_input_forms.py FIRST LAST`` tries many.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from oracle import assert_close
from torch import Tensor

import wplfast
from wplfast.errors import CoupledSamplesError

C, MAX_N, MAX_T = 2, 7, 9


class Part:
    """One argument of the model: how it is drawn, how one sample of it is taken, and what becomes of it, [N, D]."""

    def draw(self, rng: random.Random, n: int, d: int) -> Any:
        raise NotImplementedError

    def one(self, value: Any, sample: int) -> Any:
        return value[sample : sample + 1]

    def reduce(self, value: Any) -> Tensor:
        return value

    def coupled(self, value: Any) -> Any:
        return value


def normal(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def lengths(rng: random.Random, n: int) -> list[int]:
    """Lengths of which no two are equal: a sample as long as the longest would hide it."""
    return rng.sample(range(1, MAX_T + 1), n)


class Rows(Part):
    def draw(self, rng, n, d):
        self.kind = rng.randrange(6)
        return normal(rng, n, d)

    def coupled(self, value):
        kinds = (
            lambda x: x - x.mean(0),
            lambda x: x / x.abs().max(),
            lambda x: x.softmax(0),
            lambda x: x + 0.5 * x.roll(1, 0),
            lambda x: x / (1 + x.std(0, unbiased=False)),
            lambda x: x * x.norm(),
        )
        return kinds[self.kind](value)


class Steps(Rows):
    def draw(self, rng, n, d):
        super().draw(rng, n, d)
        return normal(rng, n, rng.choice((n, 3)), d)

    def reduce(self, value):
        return torch.tanh(value).sum(1)


class TimeFirst(Steps):
    def draw(self, rng, n, d):
        return super().draw(rng, n, d).transpose(0, 1).contiguous()

    def one(self, value, sample):
        return value[:, sample : sample + 1]

    def reduce(self, value):
        return torch.tanh(value).sum(0)

    def coupled(self, value):
        return super().coupled(value.transpose(0, 1)).transpose(0, 1)


class Ragged(Part):
    def draw(self, rng, n, d):
        return [normal(rng, length, d) for length in lengths(rng, n)]

    def reduce(self, value):
        return torch.stack([torch.tanh(part).sum(0) for part in value])

    def coupled(self, value):
        longest = max(len(part) for part in value)
        return [part * (1 + (torch.arange(len(part)).to(part) + 1) / longest)[:, None] for part in value]


class Mask(Part):
    def draw(self, rng, n, d):
        self.basis = normal(rng, MAX_T, d)
        return torch.arange(MAX_T)[None] < torch.tensor(lengths(rng, n))[:, None]

    def reduce(self, value):
        return value.to(self.basis) @ self.basis

    def coupled(self, value):
        return value.double() / value.sum(1).max()


class Numbers(Part):
    def draw(self, rng, n, d):
        self.basis = normal(rng, d)
        return [rng.uniform(-1, 1) for _ in range(n)]

    def reduce(self, value):
        return torch.tensor(value, dtype=torch.float64)[:, None] * self.basis

    def coupled(self, value):
        return [v - max(value) for v in value]


class Shared(Part):
    def one(self, value, sample):
        return value


class Table(Shared):
    """Rows that the samples' ids choose; the model gets both."""

    def draw(self, rng, n, d):
        self.size = rng.choice((n, 3, 7))
        return normal(rng, self.size, d)


class Ids(Part):
    def __init__(self, table: Table) -> None:
        self.table = table

    def draw(self, rng, n, d):
        return torch.tensor([rng.randrange(self.table.size) for _ in range(n)])


class Vector(Shared):
    def draw(self, rng, n, d):
        return normal(rng, *rng.choice(((), (d,), (1, d))))

    def reduce(self, value):
        return value


class Model(nn.Module):
    def __init__(self, rng: random.Random, parts: dict[str, Part], d: int, coupling: str | None) -> None:
        super().__init__()
        torch.manual_seed(rng.randrange(1 << 30))
        self.linear, self.head = nn.Linear(d, d).double(), nn.Linear(d, C).double()
        self.parts, self.coupling = parts, coupling
        self.count, self.state = 0, rng.choice((None, None, "attribute", "buffer"))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, *args: Any, **named: Any) -> Tensor:
        given = dict(zip(self.parts, args, strict=False)) | named
        if "nest" in given:
            given |= given.pop("nest")
        table = None
        h: Any = 0.0
        for name, part in self.parts.items():
            value = part.coupled(given[name]) if name == self.coupling else given[name]
            if isinstance(part, Table):
                table = value
            elif isinstance(part, Ids):
                h = h + table[value]
            else:
                h = h + part.reduce(value)
        if self.state == "attribute":
            self.count += 1
            h = h * self.count
        elif self.state == "buffer":
            self.total += 1
            h = h * self.total
        return self.head(torch.tanh(self.linear(h)))


def dicts(outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([F.cross_entropy(o, t["label"]) for o, t in zip(outputs, targets, strict=True)])


def draw(seed: int):
    """Return a model, its batches, the same as batches of one sample, the loss, and whether samples are coupled."""
    rng = random.Random(seed)
    d = rng.choice((2, 3, 5))
    parts: dict[str, Part] = {}
    for k in range(rng.randint(1, 3)):
        parts[f"p{k}"] = rng.choice((Rows, Rows, Steps, TimeFirst, Ragged, Mask, Numbers))()
    couplable = list(parts)
    if rng.random() < 0.4:
        parts["table"] = Table()
        parts["ids"] = Ids(parts["table"])
    if rng.random() < 0.3:
        parts["vector"] = Vector()
    names = list(parts)
    if "table" not in parts:
        rng.shuffle(names)
    parts = {name: parts[name] for name in names}
    coupling = rng.choice(couplable) if rng.random() < 0.4 else None
    model = Model(rng, parts, d, coupling)
    form, listed = rng.choice(("tuple", "dict", "nested")), rng.random() < 0.3
    data, ones = [], []

    def formed(values: dict[str, Any]) -> Any:
        if form == "tuple":
            return tuple(values.values())
        return values if form == "dict" else {"nest": values}

    for _ in range(rng.randint(1, 3)):
        n = rng.randint(2, MAX_N)
        values = {name: part.draw(rng, n, d) for name, part in parts.items()}
        labels = torch.tensor([rng.randrange(C) for _ in range(n)])
        targets = [{"label": label} for label in labels] if listed else labels
        data.append((formed(values), targets))
        ones.append(
            [(formed({m: p.one(values[m], k) for m, p in parts.items()}), targets[k : k + 1]) for k in range(n)]
        )
    return model, data, ones, dicts if listed else wplfast.losses.cross_entropy, coupling is not None


def loop(model: Model, batches: list[list[Any]], loss_fn: Any) -> dict[str, Tensor]:
    """The Fisher over batches of one sample; the k-th batch's samples find the state that k batches left."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index, batch in enumerate(batches):
        for inputs, targets in batch:
            model.count = index
            model.total.fill_(index)
            outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
            gradients = torch.autograd.grad(loss_fn(outputs, targets).sum(), list(model.parameters()))
            for f, g in zip(total.values(), gradients, strict=True):
                f += g**2 / sum(map(len, batches))
    model.count = 0
    model.total.zero_()
    return total


def check(seed: int) -> str:
    """Compare one model with the loop; return what came of it."""
    model, data, ones, loss_fn, coupled = draw(seed)
    expected = loop(model, ones, loss_fn)
    try:
        fisher = wplfast.fisher_diagonal(model, data, loss_fn, verify="always" if coupled or seed % 2 else True)
    except CoupledSamplesError:
        assert coupled, "refused, though samples are independent"
        return "refused"
    try:
        assert_close(fisher, expected, 1e-10, 1e-11)
    except AssertionError:
        if not coupled or not fisher.report.unchecked:
            raise
        return "said to be unchecked"
    assert not coupled
    return "right, unchecked" if fisher.report.unchecked else "right"


@pytest.mark.cpu_only("draws in float64")
@pytest.mark.parametrize("seed", [*range(80), 41247])  # 41247: losses that hardly depend on a table of N rows
def test_against_the_loop(seed):
    check(seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    for chosen in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            outcome = check(chosen)
        except Exception as error:
            outcome = "WRONG"
            print(f"seed {chosen}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        counts[outcome] = counts.get(outcome, 0) + 1
    print(counts)
    sys.exit("WRONG" in counts)
