"""Several losses of one forward pass, given one after the other with ``retain_graph=True``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from torch import nn
from zoo import C, D, Lambda, classify, par

import wplfast

N_LOSSES = 9

#: What computes the k-th loss of features that were computed once.
HEADS = {
    "none": lambda m, z, k: z @ m.given + k,
    "one": lambda m, z, k: m.one(z * (k + 1)),
    "two in turn": lambda m, z, k: (m.one if k % 2 else m.two)(z),
    "one after the other": lambda m, z, k: m.one(z) if k < 3 else m.two(z),
    "masked": lambda m, z, k: F.linear(z, m.one.weight * m.mask, m.one.bias) * (k + 1),
    "low rank": lambda m, z, k: F.linear(z, m.one.weight + m.left @ m.right) + m.one.bias,
    "the layer before": lambda m, z, k: m.one(torch.tanh(m.first(z * (k + 1)))),
    "of another axis": lambda m, z, k: m.one(torch.stack([z, z + k], k % 2)).sum(k % 2),
    "twice as deep each time": lambda m, z, k: m.one(torch.tanh(m.first(z)) if k % 3 else z),
}


def build(name):
    def forward(m, z, k):
        return HEADS[name](m, z, k)

    parts = {"first": nn.Linear(D, D), "one": nn.Linear(D, C), "two": nn.Linear(D, C)}
    model = Lambda(forward, **parts, left=par(C, 1), right=par(1, D))
    model.register_buffer("mask", (torch.randn(C, D) > 0).float())
    model.register_buffer("given", torch.randn(D, C))
    return model.double()


def squares(model, losses):
    for one in losses:
        yield torch.autograd.grad(one, list(model.parameters()), retain_graph=True, allow_unused=True)


def expected(model, x, targets):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    z = torch.tanh(model.first(x))
    for k, y in enumerate(targets):
        for gradients in squares(model, classify(model(z, k), y)):
            for f, g in zip(total.values(), gradients, strict=True):
                f += 0 if g is None else g**2 / (len(x) * len(targets))
    return total


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_calls_for_losses_that_are_gone_are_forgotten(name, verify, keep):
    torch.manual_seed(0)
    model, kept, n_calls = build(name), [], []
    x, targets = torch.randn(5, D).double(), torch.randint(C, (N_LOSSES, 5))
    with wplfast.FisherAccumulator(model, verify=verify) as acc:
        for _ in range(2):
            z = torch.tanh(model.first(x))
            for k, y in enumerate(targets):
                losses = classify(model(z, k), y)
                acc.backward(losses, retain_graph=k + 1 < N_LOSSES)
                kept += [losses] * keep
                n_calls.append(len(acc._session.interception.taps))
    assert_close(acc.result(), expected(model, x, targets), 1e-10, 1e-11)
    assert acc.n_samples == 2 * 5 * N_LOSSES
    if not keep:
        assert max(n_calls) <= 3
        assert acc._session.interception.cache._n_sites <= 8  # one way for the first loss, one for the others


def test_a_loss_of_features_that_an_earlier_one_computed():
    torch.manual_seed(1)
    model = build("one")
    x, targets = torch.randn(5, D).double(), torch.randint(C, (4, 5))
    with wplfast.FisherAccumulator(model) as acc:
        h = torch.tanh(model.first(x))
        for y in targets:
            acc.backward(classify(model.one(h), y), retain_graph=True)
            h = torch.tanh(model.first(h))  # which lives on in the next loss
    total, h = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, torch.tanh(model.first(x))
    for y in targets:
        for gradients in squares(model, classify(model.one(h), y)):
            for f, g in zip(total.values(), gradients, strict=True):
                f += 0 if g is None else g**2 / 20
        h = torch.tanh(model.first(h))
    assert_close(acc.result(), total, 1e-10, 1e-11)
