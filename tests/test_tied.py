"""Tables that rows are taken from and that also multiply: heads tied to embeddings, in all their forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn

import wplfast
from wplfast.capture.collect import squares as reduce
from wplfast.capture.collect import tied

ce = wplfast.losses.cross_entropy
V, D, T, N = 40, 6, 5, 4


class Tied(nn.Module):
    """A language model whose table is looked up ``lookups`` times and multiplied in one of several ways."""

    def __init__(self, head: str, lookups: int = 1, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D, padding_idx=padding)
        self.mix = nn.Linear(D, D)
        self.head, self.lookups = head, lookups

    def forward(self, tokens):
        x = sum(self.table(tokens.roll(shift, 1)) for shift in range(self.lookups))
        x, weight = torch.tanh(self.mix(x)), self.table.weight
        if self.head == "linear":
            return F.linear(x, weight)
        if self.head == "transposed":
            return x @ weight.t()
        if self.head == "twice":
            return F.linear(x, weight) + F.linear(torch.sin(x), weight)
        return (weight @ x.mT).mT


@pytest.fixture
def materialised(monkeypatch):
    """Count how often per-sample gradients of a table are made."""
    calls, materialise = [], reduce._materialised

    def noted(parameter, group, fisher, *rest, **kwargs):
        calls.append(tuple(fisher.shape))
        return materialise(parameter, group, fisher, *rest, **kwargs)

    monkeypatch.setattr(reduce, "_materialised", noted)
    return calls


def batch(n=N, length=T, vocabulary=V):
    tokens = torch.randint(0, vocabulary, (n, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("head", "lookups"), [("linear", 1), ("linear", 3), ("transposed", 1), ("twice", 2)])
def test_tied_heads_need_no_per_sample_gradients(head, lookups, dtype, materialised):
    model = Tied(head, lookups).to(dtype)
    data = [batch(vocabulary=7), batch(3), batch(1)]  # of seven tokens, some are repeated in every sample
    found = wplfast.fisher_diagonal(model, data, ce, verify=False)
    assert (V, D) not in materialised
    wide = dtype == torch.float64
    assert_close(found, fisher_loop(model, data, ce), *((1e-12, 1e-12) if wide else (1e-5, 2e-6)))


def test_a_head_written_otherwise_is_right(materialised):
    model, data = Tied("other").double(), [batch()]
    assert_close(wplfast.fisher_diagonal(model, data, ce), fisher_loop(model, data, ce), 1e-12, 1e-12)


def test_rows_that_padding_names_are_left_alone(materialised):
    """The padding row gets no gradient from look-ups, but its own from the head."""
    model = Tied("linear", padding=0).double()
    x, y = batch(vocabulary=4)
    x[0] = 0  # a sample of nothing but padding
    found = wplfast.fisher_diagonal(model, [(x, y)], ce, verify=False)
    assert (V, D) not in materialised
    assert found["table.weight"][0].abs().max() > 0
    assert_close(found, fisher_loop(model, [(x, y)], ce), 1e-12, 1e-12)


def test_weights_and_mean_gradients(materialised):
    model, (x, y) = Tied("linear").double(), batch()
    weights = torch.rand(N, dtype=torch.float64)
    found = wplfast.fisher_diagonal(model, [(x, y, weights)], ce, with_grad=True, verify=False)
    assert (V, D) not in materialised
    expected = torch.zeros(V, D, dtype=torch.float64)
    for n in range(N):
        (grad,) = torch.autograd.grad(ce(model(x[n : n + 1]), y[n : n + 1]).sum(), [model.table.weight])
        expected += weights[n] * grad.square() / weights.sum()
    torch.testing.assert_close(found["table.weight"], expected, rtol=1e-12, atol=1e-12)
    model.zero_grad()
    (ce(model(x), y) * weights / weights.sum()).sum().backward()
    torch.testing.assert_close(found.mean_grad["table.weight"], model.table.weight.grad, rtol=1e-12, atol=1e-12)


def test_long_samples_of_a_small_vocabulary_are_summed_whole(materialised):
    model, data = Tied("linear").double(), [batch(length=V // 2 + 1)]
    found = wplfast.fisher_diagonal(model, data, ce, verify=False)
    assert (V, D) in materialised
    assert_close(found, fisher_loop(model, data, ce), 1e-12, 1e-12)


def test_many_samples_go_in_parts(monkeypatch, materialised):
    from wplfast.capture.rules import grad_sample as uses

    model, data = Tied("linear", 2).double(), [batch(7)]
    monkeypatch.setattr(uses, "MAX_ELEMENTS", 3 * T * 2 * D)
    found = wplfast.fisher_diagonal(model, data, ce, verify=False)
    assert (V, D) not in materialised
    assert_close(found, fisher_loop(model, data, ce), 1e-12, 1e-12)


def test_own_rows():
    tokens = torch.tensor([[3, 1, 3, -1], [0, 0, 0, 0], [-1, -1, -1, -1]])
    own, first = tied._own_rows(tokens, 4)
    assert own.tolist() == [[False, True, False, True], [True, False, False, False], [False] * 4]
    assert first.tolist() == [[True, True, False, False], [True, False, False, False], [False] * 4]
