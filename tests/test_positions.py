"""Positions that a model looks up: samples share them, which the first batch is to know without a second run."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close, fisher_loop
from torch import nn
from zoo import C, D, V, classify, head

import wplfast

N, T = 4, 8  # N divides T: sizes alone do not tell that positions are no samples


class Model(nn.Module):
    """Adds what ``places(model, tokens)`` looks up to the vectors of tokens [N, T]."""

    def __init__(self, places):
        super().__init__()
        self.tokens, self.table, self.head = nn.Embedding(V, D), nn.Embedding(4 * T, D), head()
        self.places = places

    def forward(self, tokens, scale=1.0):
        return self.head(torch.tanh(scale * self.tokens(tokens) + self.places(self, tokens)).sum(1))


def model_of(places):
    torch.manual_seed(0)
    return Model(places).double()


def batches(*sizes):
    return [(torch.randint(0, V, (n, t)), torch.randint(0, C, (n,))) for n, t in sizes]


def learnt(m, x):
    return m.table(torch.arange(x.shape[1]))


def in_one_row(m, x):
    return m.table(torch.arange(2, x.shape[1] + 2)[None])


def of_each_sample(m, x):
    return m.table(torch.arange(len(x)))[:, None]


def two_of_each_sample(m, x):
    return m.table(torch.arange(2 * len(x))).view(len(x), 2, D).sum(1, keepdim=True)


def of_one_task(m, x):
    return m.table(torch.tensor([3]))


def doubled_in_place(m, x):
    return m.table(torch.arange(x.shape[1])).mul_(2.0)


PLACES = {place.__name__: place for place in (learnt, in_one_row, of_one_task, doubled_in_place)}
#: Here a sample's place in the batch is among its data, so that none can be run alone.
BY_SAMPLE = {place.__name__: place for place in (of_each_sample, two_of_each_sample)}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("sizes", [[(N, T)] * 2, [(T, T), (N, T)], [(1, T), (N, T), (3, 5)], [(N, N), (N, T)]], ids=str)
def test_positions_give_the_fisher_of_the_loop(name, sizes):
    model, data = model_of(PLACES[name]), batches(*sizes)
    found = wplfast.fisher_diagonal(model, data, classify)
    assert_close(found, fisher_loop(model, data, classify), 1e-11, 1e-12)


def apart(model, data):
    """Square the gradients of each loss of each batch, as it is."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad(loss, parameters, retain_graph=True) for x, y in data for loss in classify(model(x), y)
    ]
    return {name: sum(g[i].square() for g in grads) / len(grads) for i, name in enumerate(names)}


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_a_row_for_each_sample_is_no_position(name):
    model, data = model_of(BY_SAMPLE[name]), batches((N, T))
    found = wplfast.fisher_diagonal(model, data, classify, independent=True)
    assert_close(found, apart(model, data), 1e-11, 1e-12)


@pytest.mark.parametrize(
    "pack", [lambda x: x, lambda x: (x,), lambda x: {"tokens": x, "scale": 1.0}], ids=["tensor", "tuple", "dict"]
)
def test_positions_cost_no_second_run_of_the_first_batch(pack):
    model, runs = model_of(learnt), []
    model.head.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    ((x, y),) = batches((N, T))
    report = wplfast.fisher_diagonal(model, [(pack(x), y)], classify).report
    assert report.passes_per_batch == 2, "one pass measures and verifies, another one collects"
    assert runs.count(N) == 1, "parts of the batch run besides, and are smaller"


@pytest.mark.parametrize("sizes", [[(N, T), (N, T), (2, 5)], [(T, T), (N, T), (T, N)]], ids=str)
@pytest.mark.parametrize("name", PLACES | BY_SAMPLE)
def test_an_accumulator_is_not_told_the_size_of_the_batch(name, sizes):
    """It sees losses after the forward pass: what is no size of earlier data is taken for positions all the same."""
    model, data = model_of((PLACES | BY_SAMPLE)[name]), batches(*sizes)
    expected = apart(model, data)
    with wplfast.FisherAccumulator(model) as accumulator:
        for x, y in data:
            accumulator.backward(classify(model(x), y))
        found = accumulator.result()
    assert_close(found, expected, 1e-11, 1e-12)
    if name in ("learnt", "in_one_row") and sizes[0] == (N, T):
        assert "one by one" not in found.report.rules["table.weight"]


@pytest.mark.parametrize("labels", [[0, 1], [1, 0], [0, 1, 2], [0, 2, 1], [2, 0, 1, 1]], ids=str)
def test_labels_that_count_up_are_no_positions(labels):
    """The samples of trees enter as indices one by one, so that no data tell the size of the batch."""

    class Trees(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf, self.both, self.head = nn.Embedding(10, 6), nn.Linear(12, 6), nn.Linear(6, 3)

        def node(self, tree):
            if isinstance(tree, int):
                return self.leaf(torch.tensor(tree))
            return torch.tanh(self.both(torch.cat([self.node(part) for part in tree])))

        def forward(self, trees):
            return self.head(torch.stack([self.node(tree) for tree in trees]))

    model, trees = Trees().double(), [((1, 2), 3), (4, (5, 1)), (3, 3), (8, 9)][: len(labels)]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for tree, label in zip(trees, labels, strict=True):
        loss = wplfast.losses.cross_entropy(model([tree]), torch.tensor([label]))
        for total, gradient in zip(
            expected.values(), torch.autograd.grad(loss.sum(), [*model.parameters()]), strict=True
        ):
            total += gradient.square() / len(labels)
    batch = trees, torch.tensor(labels)
    found = wplfast.fisher_diagonal(
        model, [batch], wplfast.losses.cross_entropy, unpack=lambda batch: ((batch[0],), batch[1])
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-14)
