"""Batches without samples, or whose samples reach no parameter; empty tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batch_cases import Graph, X, Y, here
from fisher_cases import Decoder, ce, mlp, tokens
from oracle import assert_close, fisher_loop
from torch import nn

import wplfast
from wplfast.fisher.batches import Batch

NONE = (X[:0], Y[:0])


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"fisher_type": "exact"}, {"fisher_type": "mc"}, {"samples": "losses"}])
def test_batches_without_samples_count_nothing(where, options):
    model = nn.Sequential(mlp(), nn.Unflatten(1, (2, 2)), Folds())
    data = [(X, Y), (X[:3], Y[:3])]
    with_empty = [*data[:where], NONE, *data[where:]]
    fisher = wplfast.fisher_diagonal(model, with_empty, ce, with_grad=True, **options)
    same = wplfast.fisher_diagonal(model, data, ce, with_grad=True, **options)
    assert fisher.n_samples == same.n_samples == 7
    torch.testing.assert_close(fisher.flat, same.flat)
    with pytest.raises(ValueError, match="data is empty"):
        wplfast.fisher_diagonal(model, [NONE], ce, **options)


class Folds(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)  # which PyTorch refuses for no samples


@pytest.mark.parametrize(
    ("inputs", "targets", "empty"),
    [
        (X[:0], Y[:0], True),
        (X[:0], None, True),
        ({"x": X[:0]}, [], True),
        ((), [], True),
        ((torch.zeros(5, 0, 3),), Y[:0], True),  # time first
        (Graph(X[:0], Y[:0]), Y[:0], True),
        (X, Y, False),
        (torch.zeros(4, 0), Y, False),
        (torch.zeros(4, 0), torch.zeros(4, 0), False),
        (X, None, False),
        ((), None, False),
        (X, [], False),
        (Graph(X, Y), None, False),
        ({"state": torch.zeros(0, 3), "x": X}, Y, False),
        ({"state": torch.zeros(0, 3), "x": X}, {"y": Y}, False),
        (X, [{"boxes": torch.zeros(0, 4)}] * 4, False),
        (Graph(X, Y), [{"boxes": torch.zeros(0, 4)}] * 4, False),
        (X[:0], {"y": Y[:0]}, True),
        (torch.zeros(4, 0), {"y": torch.zeros(4, 0)}, False),
        (X[:0], {"y": Y[:0], "scale": torch.tensor(2.0)}, True),
    ],
)
def test_which_batches_hold_no_sample(inputs, targets, empty):
    assert Batch(inputs, targets, None).is_empty is empty


class Routed(nn.Module):
    """Samples go to an expert; that of negative ones is frozen, or no parameter at all."""

    def __init__(self):
        super().__init__()
        self.frozen, self.expert = nn.Linear(6, 4), mlp()
        self.frozen.requires_grad_(False)

    def forward(self, x):
        expert = self.expert if bool(x[0, 0] > 0) else self.frozen
        return expert(x)


@pytest.mark.parametrize("order", [(1, -1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize(
    "options", [{}, {"with_grad": True}, {"fisher_type": "mc", "mc_samples": 2}, {"verify": "always"}]
)
def test_batches_that_reach_no_parameter(order, options):
    model, data = Routed().double(), []
    for sign in order:
        x = torch.randn(4, 6, dtype=torch.float64)
        x[:, 0] = sign
        data.append((x, here(Y)))
    fisher = wplfast.fisher_diagonal(model, data, ce, **options)
    reached = [batch for batch, sign in zip(data, order, strict=True) if sign > 0]
    assert fisher.n_samples == 12
    if "fisher_type" not in options:
        share = len(reached) / 3
        want = {name: share * f for name, f in fisher_loop(model, reached, ce).items()}
        assert_close(fisher, want, rtol=1e-9, model_rtol=1e-9)
        weighted = [
            (*batch, torch.full((4,), 2.0 if sign > 0 else 6.0)) for batch, sign in zip(data, order, strict=True)
        ]
        total = sum(2.0 if sign > 0 else 6.0 for sign in order)
        want = {name: f * 2 / total * 3 / share * share for name, f in want.items()}
        assert_close(wplfast.fisher_diagonal(model, weighted, ce, **options), want, rtol=1e-9, model_rtol=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_batches_whose_losses_are_constant(first):
    """A loss that returns zeros where no target counts."""
    model = mlp().double()
    x, y = here(X).double(), here(Y)
    data = [(x, y), (x + 1, torch.full_like(y, -100)), (x - 1, y)]
    data = [data[1], data[0], data[2]] if first else data

    def loss(outputs, targets):
        return ce(outputs, targets) if bool((targets >= 0).any()) else torch.zeros(len(targets), dtype=outputs.dtype)

    fisher = wplfast.fisher_diagonal(model, data, loss)
    assert fisher.n_samples == 12
    assert_close(fisher, fisher_loop(model, data, ce), rtol=1e-9, model_rtol=1e-9)
    with wplfast.FisherAccumulator(model) as acc:
        for x, y in data:
            acc.backward(loss(model(x), y))
        assert torch.equal(acc.result().flat, fisher.flat)


def test_losses_without_a_graph_in_all_batches(caplog):
    model = mlp()

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        @torch.no_grad()
        def forward(self, x):
            return self.model(x)

    with pytest.raises(ValueError, match="those of no batch do: was the model run under no_grad"):
        wplfast.fisher_diagonal(Blind(), [(X, Y)] * 3, ce)
    assert [r.message for r in caplog.records if "gradients of zero" in r.message] == [caplog.records[0].message]
    with wplfast.FisherAccumulator(model) as acc:
        acc.backward(ce(model(here(X)), here(Y)).detach())
        with pytest.raises(ValueError, match="those of no batch do"):
            acc.result()
        acc.backward(ce(model(here(X)), here(Y)))
        assert acc.result().n_samples == 8


def test_losses_that_reach_parameters_of_the_loss_alone():
    model, scale = mlp().double(), torch.ones((), dtype=torch.float64, requires_grad=True)
    x, y = here(X).double(), here(Y)

    def loss(outputs, targets):
        reached = targets.dtype == torch.int64
        return ce(outputs, targets) if reached else scale * outputs.detach().square().sum(1)

    fisher = wplfast.fisher_diagonal(model, [(x, y.int()), (x, y)], loss)
    assert fisher.n_samples == 8
    want = {name: f / 2 for name, f in fisher_loop(model, [(x, y)], ce).items()}
    assert_close(fisher, want, rtol=1e-9, model_rtol=1e-9)
    assert scale.grad is None


# ---- empty tensors -----------------------------------------------------------------------------------------


class Of(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x):
        return self.function(self, x)


def beside(function, **parts):
    """An empty or short part beside a layer that gets a gradient."""
    return Of(
        lambda m, x: torch.cat([m.layer(x).flatten(1), function(m, x).flatten(1)], 1),
        layer=nn.Linear(3, 2),
        **parts,
    )


EMPTY = {
    "no features": lambda: nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)),
    "no inputs": lambda: Of(lambda m, x: m.linear(x[..., :0]).flatten(1), linear=nn.Linear(0, 2)),
    "no outputs": lambda: beside(lambda m, x: m.linear(x), linear=nn.Linear(3, 0)),
    "no rows": lambda: beside(lambda m, x: m.linear(x[:, :0]), linear=nn.Linear(3, 2)),
    "no rows of experts": lambda: Of(
        lambda m, x: m.a(x).sum(1).index_add(0, torch.zeros(0, dtype=torch.long), m.b(x[:, 0][x[:, 0, 0] > 99])),
        a=nn.Linear(3, 2),
        b=nn.Linear(3, 2),
    ),
    "matmul": lambda: Of(
        lambda m, x: (x @ m.u @ m.v + m.b).flatten(1), u=torch.randn(3, 0), v=torch.randn(0, 2), b=torch.randn(2)
    ),
    "low rank": lambda: Of(
        lambda m, x: F.linear(x, m.w + m.u @ m.v).flatten(1),
        w=torch.randn(2, 3),
        u=torch.randn(2, 0),
        v=torch.randn(0, 3),
    ),
    "einsum": lambda: Of(
        lambda m, x: (torch.einsum("ntk,kd->ntd", torch.einsum("ntd,dk->ntk", x, m.u), m.v) + m.b).flatten(1),
        u=torch.randn(3, 0),
        v=torch.randn(0, 2),
        b=torch.randn(2),
    ),
    "bmm": lambda: beside(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=torch.randn(4, 3, 0)),
    "scale and shift": lambda: beside(lambda m, x: x[..., :0] * m.w + m.b, w=torch.randn(0), b=torch.randn(0)),
    "layer norm": lambda: beside(lambda m, x: m.norm(x[..., :0]), norm=nn.LayerNorm(0)),
    "layer norm of no rows": lambda: beside(lambda m, x: m.norm(x[:, :0]), norm=nn.LayerNorm(3)),
    "embedding": lambda: beside(lambda m, x: m.table((x[..., 0] > 0).long()), table=nn.Embedding(2, 0)),
    "embedding of nothing": lambda: beside(lambda m, x: m.table((x[:, :0, 0] > 0).long()), table=nn.Embedding(2, 3)),
    "embedding without rows": lambda: beside(lambda m, x: m.table((x[:, :0, 0] > 0).long()), table=nn.Embedding(0, 3)),
    "positions": lambda: beside(lambda m, x: x[:, :0] + m.table(torch.arange(0)), table=nn.Embedding(2, 3)),
    "conv": lambda: beside(lambda m, x: m.conv(x.transpose(1, 2)[:, :0]), conv=nn.Conv1d(0, 2, 1)),
    "attention": lambda: beside(
        lambda m, x: m.block(x[:, :0]), block=nn.TransformerEncoderLayer(3, 1, 4, batch_first=True)
    ),
    "no tokens": lambda: Of(
        lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), m.layer(x)], 1).flatten(1),
        t=torch.randn(1, 0, 2),
        layer=nn.Linear(3, 2),
    ),
    "tied": lambda: Of(
        lambda m, x: F.linear(F.linear(x, m.w), m.w.t()).flatten(1) + F.linear(x, m.v).flatten(1),
        w=torch.randn(0, 3),
        v=torch.randn(3, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("n_samples", [3, 1])
def test_empty_tensors(name, n_samples):
    model = EMPTY[name]().double().eval()
    x = torch.randn(n_samples, 4, 3, dtype=torch.float64)
    y = torch.zeros(n_samples, dtype=torch.long)
    loss = lambda o, _: (o - 1).square().flatten(1).sum(1)  # noqa: E731
    for options in ({}, {"with_grad": True}, {"verify": "always"}):
        fisher = wplfast.fisher_diagonal(model, [(x, y)] * 3, loss, **options)
        assert_close(fisher, fisher_loop(model, [(x, y)], loss), rtol=1e-9, model_rtol=1e-9)


@pytest.mark.parametrize("lengths", [(3, 0, 3, 0, 5), (0, 3, 3, 0)])
def test_sequences_of_no_tokens(lengths):
    model = Decoder(width=16).double()
    data = [tokens(4, t) for t in lengths]
    fisher = wplfast.fisher_diagonal(model, data, ce)
    assert fisher.n_samples == 4 * len(lengths)
    assert_close(fisher, fisher_loop(model, data, ce), rtol=1e-9, model_rtol=1e-9)
