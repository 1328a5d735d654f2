"""Later batches that look like an earlier one and are not: losses of an older forward pass, exchanged roles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn
from zoo import Lambda

import wplfast
from wplfast.errors import CoupledSamplesError

D = 4


def loop(forward, batches):
    """The mean over samples of squared gradients: ``forward(index, x)`` gives the losses of a batch."""
    total, count = None, 0
    for index, x in enumerate(batches):
        for n in range(len(x)):
            model = forward.model
            model.zero_grad()
            forward(index, x[n : n + 1]).sum().backward()
            squares = {k: torch.zeros_like(p) if p.grad is None else p.grad**2 for k, p in model.named_parameters()}
            total = squares if total is None else {k: total[k] + g for k, g in squares.items()}
            count += 1
    model.zero_grad(set_to_none=True)
    return {k: g / count for k, g in total.items()}


class Heads:
    """One layer or the other, by the batch."""

    def __init__(self):
        self.model = nn.ModuleList([nn.Linear(D, D) for _ in range(2)]).double()

    def __call__(self, index, x):
        return self.model[index % 2](x).square().sum(1)


class Plain:
    """A perceptron."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def __call__(self, index, x):
        return self.model(x).square().sum(1)


class Cells:
    """Loops of changing length, of one cell or the other."""

    def __init__(self):
        self.model = nn.ModuleList([nn.Linear(D, D) for _ in range(2)]).double()

    def __call__(self, index, x):
        for _ in range(1 + index // 2 % 3):
            x = torch.tanh(self.model[index % 2](x))
        return x.square().sum(1)


class Derived:
    """A normalised weight, in two layers whose order depends on the batch."""

    def __init__(self):
        self.model = nn.ModuleList([nn.utils.parametrizations.weight_norm(nn.Linear(D, D)) for _ in range(2)]).double()

    def __call__(self, index, x):
        first, second = (self.model[index % 2], self.model[1 - index % 2])
        return second(torch.tanh(first(x))).square().sum(1)


#: f: a forward pass, b: the losses of that batch are given.
ORDERS = {
    "one ahead": "f0 f1 b0 f2 b1 f3 b2 f4 b3 f5 b4 f6 b5 f7 b6 b7",
    "one ahead, later": "f0 b0 f1 b1 f2 b2 f3 f4 b3 f5 b4 f6 b5 f7 b6 b7",
    "two ahead": "f0 f1 f2 b0 f3 b1 f4 b2 f5 b3 f6 b4 f7 b5 b6 b7",
    "one held back": "f0 b0 f1 b1 f2 f3 b3 f5 b5 b2 f4 b4 f6 b6 f7 b7",
    "all, then all": "f0 f1 f2 f3 f4 f5 f6 f7 b0 b1 b2 b3 b4 b5 b6 b7",
    "all, then all, backwards": "f0 f1 f2 f3 f4 f5 f6 f7 b7 b6 b5 b4 b3 b2 b1 b0",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [Heads, Plain, Cells, Derived])
@pytest.mark.parametrize("sizes", [[3] * 8, [3, 3, 5, 3, 1, 5, 4, 3]], ids=["alike", "others"])
def test_losses_that_come_after_another_forward_pass_began(kind, order, sizes):
    torch.manual_seed(0)
    forward, batches = kind(), [torch.randn(n, D).double() for n in sizes]
    expected, held = loop(forward, batches), {}
    with wplfast.FisherAccumulator(forward.model) as accumulator:
        for step in ORDERS[order].split():
            index = int(step[1:])
            if step[0] == "f":
                held[index] = forward(index, batches[index])
            else:
                accumulator.backward(held.pop(index))
    assert_close(accumulator.result(), expected, 1e-10, 1e-11)


def test_two_passes_over_one_graph():
    """The calls of another pass's model stand in the graph too, under numbers of their own."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)).double() for _ in range(2))
    both = nn.Sequential(first, second)
    data = [(torch.randn(n, D).double(), torch.zeros(n)) for n in (3, 3, 5, 3)]
    expected = fisher_loop(both, data, lambda outputs, _: outputs.square().sum(1))
    with wplfast.FisherAccumulator(first) as one, wplfast.FisherAccumulator(second) as other:
        for x, _ in data:
            losses = second(first(x)).square().sum(1)
            one.backward(losses, retain_graph=True)
            other.backward(losses)
    found = {f"0.{k}": f for k, f in one.result().items()} | {f"1.{k}": f for k, f in other.result().items()}
    assert_close(found, expected, 1e-10, 1e-11)


def rows(x):
    return x.reshape(-1, D), x.transpose(0, 1).reshape(-1, D)


def of_rows(outputs, n, t):
    first, second = outputs
    return first.view(n, t, -1).sin().sum((1, 2)) + second.view(t, n, -1).cos().square().sum((0, 2))


USES = {
    "linear": (lambda m, x: m.layer(x), lambda: nn.Linear(D, 3)),
    "norm": (lambda m, x: m.layer(x), lambda: nn.LayerNorm(D)),
    "product": (lambda m, x: x @ m.layer.weight, lambda: nn.Linear(D, D, bias=False)),
    "scale": (lambda m, x: x * m.layer.weight, lambda: nn.LayerNorm(D, bias=False)),
    "cell": (lambda m, x: m.layer(m.layer(x)), lambda: nn.GRUCell(D, D)),
    "conv": (lambda m, x: m.layer(x.unsqueeze(1)).flatten(1), lambda: nn.Conv1d(1, 2, 3)),
}


@pytest.mark.parametrize("first", [1, 3], ids=["second batch", "fourth batch"])
@pytest.mark.parametrize("shape", [(2, 3), (3, 3)], ids=["N != T", "N = T"])
@pytest.mark.parametrize("use", USES)
def test_calls_of_one_shape_that_exchange_their_roles(use, shape, first):
    """The graph is the same but for which call is where: samples lie along other axes of each."""
    torch.manual_seed(0)
    call, make = USES[use]

    def forward(m, x, swapped):
        p, q = rows(x)
        if swapped:
            second = call(m, q)
            return of_rows((call(m, p), second), *x.shape[:2])
        return of_rows((call(m, p), call(m, q)), *x.shape[:2])

    model = Lambda(forward, layer=make()).double()
    data = [((torch.randn(*shape, D).double(), index >= first), torch.zeros(shape[0])) for index in range(6)]
    expected = fisher_loop(model, data, lambda losses, _: losses)
    found = wplfast.fisher_diagonal(model, data, lambda losses, _: losses)
    assert_close(found, expected, 1e-10, 1e-11)
    with wplfast.FisherAccumulator(model) as accumulator:
        for inputs, _ in data:
            accumulator.backward(model(*inputs))
    assert_close(accumulator.result(), expected, 1e-10, 1e-11)


def test_slices_of_another_step():
    torch.manual_seed(0)

    def forward(m, x, halves):
        z = m.layer(x.flatten(0, 1))
        first, second = (z[: len(z) // 2], z[len(z) // 2 :]) if halves else (z[::2], z[1::2])
        return (first * second).view(len(x), -1).sum(1) if not halves else (first * second).view(2, -1).sum(1).repeat(1)

    model = Lambda(forward, layer=nn.Linear(D, 3)).double()
    data = [((torch.randn(2, 2, D).double(), False), torch.zeros(2)) for _ in range(5)]
    expected = fisher_loop(model, data, lambda losses, _: losses)
    assert_close(wplfast.fisher_diagonal(model, data, lambda losses, _: losses), expected, 1e-10, 1e-11)


OVER_THE_BATCH = {
    "mean": lambda c: c.mean(0),
    "largest": lambda c: c.amax(0),
    "logsumexp": lambda c: c.logsumexp(0),
}


@pytest.mark.parametrize("over", OVER_THE_BATCH)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_samples_that_are_coupled_in_later_batches_alone(over, first):
    """What a sample alone showed of an earlier graph says nothing of this one."""
    torch.manual_seed(0)

    def forward(m, x, coupled):
        h = m.a(x).tanh()
        return m.head(h - OVER_THE_BATCH[over](m.c(x)) if coupled else h)

    model = Lambda(forward, a=nn.Linear(D, 5), c=nn.Linear(D, 5), head=nn.Linear(5, 3)).double()
    data = [((torch.randn(6, D).double(), index >= first), torch.randint(0, 3, (6,))) for index in range(6)]
    with pytest.raises(CoupledSamplesError):
        wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
    with pytest.raises(CoupledSamplesError):
        accumulate(model, data, wplfast.losses.cross_entropy)


def accumulate(model, data, loss_fn):
    with wplfast.FisherAccumulator(model) as accumulator:
        for inputs, targets in data:
            accumulator.backward(loss_fn(model(*inputs), targets))


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("t", [6, 3])
def test_positions_in_later_batches_alone(first, t):
    """As many as samples: a sample is run alone again, and found to need no other."""
    torch.manual_seed(0)

    def forward(m, x, with_positions):
        h = m.a(x)
        where = m.p(torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None])
        return m.head(torch.tanh(h + where if with_positions else h).sum(1))

    model = Lambda(forward, a=nn.Linear(D, 5), p=nn.Linear(1, 5), head=nn.Linear(5, 3)).double()
    data = [((torch.randn(6, t, D).double(), index >= first), torch.randint(0, 3, (6,))) for index in range(6)]
    expected = fisher_loop(model, data, wplfast.losses.cross_entropy)
    assert_close(wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy), expected, 1e-10, 1e-11)


UNREACHED = {
    "another output": lambda m, x: (m.head(m.a(x).tanh()), m.other(m.a(x)))[0],
    "a choice": lambda m, x: m.head(m.a(x).tanh()) * (1 + m.other(x).argmax(1, keepdim=True)),
    "detached": lambda m, x: m.head(m.a(x).tanh()) + m.other(x).detach().sum(1, keepdim=True),
    "a number": lambda m, x: m.head(m.a(x).tanh()) * (1 + 0 * m.other(x).sum().item()),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_calls_that_no_loss_reaches_are_not_measured_for(name):
    torch.manual_seed(0)
    model = Lambda(
        UNREACHED[name], a=nn.Linear(D, 5), other=nn.Linear(5 if "output" in name else D, 3), head=nn.Linear(5, 3)
    )
    data = [(torch.randn(5, D).double(), torch.randint(0, 3, (5,))) for _ in range(20)]
    model = model.double()
    found = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
    assert found.report.passes_per_batch < 1.5
    assert set(found.report.unreached) == {"other.weight", "other.bias"}
    used = {k: p for k, p in model.named_parameters() if "other" not in k}
    expected = fisher_loop(model, data, wplfast.losses.cross_entropy, params=used)
    assert_close(found.select(list(used)), expected, 1e-10, 1e-11)


def test_a_call_that_losses_reach_later():
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x, both: m.head(m.a(x).tanh()) + (m.other(x) if both else m.other(x).detach()),
        a=nn.Linear(D, 5), other=nn.Linear(D, 3), head=nn.Linear(5, 3),
    ).double()  # fmt: skip
    data = [((torch.randn(5, D).double(), index > 2), torch.randint(0, 3, (5,))) for index in range(6)]
    expected = fisher_loop(model, data, lambda o, t: F.cross_entropy(o, t, reduction="none"))
    found = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
    assert_close(found, expected, 1e-10, 1e-11)
