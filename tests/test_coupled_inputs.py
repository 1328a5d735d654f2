"""Samples that are coupled before a parameter sees them: none is accepted, whichever samples the others act on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wplfast
from wplfast.errors import CoupledSamplesError, VerificationError
from wplfast.losses import cross_entropy

REFUSED = (CoupledSamplesError, VerificationError)


class After(nn.Module):
    """Two layers on a function of the batch."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.function(x))))


COUPLED = {
    "divided by the maximum": lambda x: x / x.abs().max(),
    "minus the minimum": lambda x: x - x.min(),
    "centred": lambda x: x - x.mean(0),
    "minus the median": lambda x: x - x.median(0).values,
    "the neighbour's": lambda x: x + 0.5 * x.roll(1, 0),
    "the next one's": lambda x: torch.cat([x[:-1] + x[1:], x[-1:]]),
    "the one before": lambda x: torch.cat([x[:1], x[1:] + x[:-1]]),
    "the first one's": lambda x: x + x[:1],
    "the last one's": lambda x: x + x[-1:],
    "divided by the norm": lambda x: x / x.norm(),
}


@pytest.mark.parametrize("n", [2, 3, 5, 8, 33])
@pytest.mark.parametrize("form", COUPLED)
def test_functions_of_the_batch(form: str, n: int) -> None:
    batch = torch.randn(n, 6).double(), torch.randint(3, (n,))
    with pytest.raises(REFUSED):
        wplfast.fisher_diagonal(After(COUPLED[form]).double(), [batch], cross_entropy)


def test_a_maximum_that_most_samples_reach() -> None:
    """Only the samples that do not reach it have other losses alone."""
    x, bright = torch.rand(64, 6), torch.rand(64) < 0.6
    x[bright, 0], x[~bright] = 1.0, 0.3 * x[~bright]
    x[-1, 0] = 1.0
    with pytest.raises(REFUSED):
        wplfast.fisher_diagonal(After(lambda x: x / x.max()), [(x, torch.randint(3, (64,)))], cross_entropy)


def test_a_place_in_the_batch_is_no_other_sample() -> None:
    """Losses that depend on where a sample lies are its own; the report says what could not be told."""
    for n in (2, 3, 5, 8):
        places = torch.arange(1.0, 9).unsqueeze(1).double()
        model = After(lambda x, places=places: x * places[: len(x)]).double()
        batch = torch.randn(n, 6).double(), torch.randint(3, (n,))
        found = wplfast.fisher_diagonal(model, [batch], cross_entropy)
        assert found.report.unchecked == ("a sample's loss depends on its place in the batch",)


class Graphs(nn.Module):
    """Sums over the nodes of graphs, whose features are centred over all nodes or not."""

    def __init__(self, is_centred: bool) -> None:
        super().__init__()
        self.first, self.last, self.is_centred = nn.Linear(2, 3), nn.Linear(3, 2), is_centred

    def forward(self, x, graph):
        h = self.first(x)
        h = torch.tanh(h - h.mean(0) if self.is_centred else h)
        return self.last(h.new_zeros(int(graph.max()) + 1, 3).index_add(0, graph, h))


@pytest.mark.parametrize("verify", [True, "always", False])
def test_only_the_labels_can_be_cut(verify: bool | str) -> None:
    graph = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    batch = (torch.randn(9, 2).double(), graph), torch.tensor([0, 1, 0])
    with pytest.raises(CoupledSamplesError, match="samples are coupled at linear in first"):
        wplfast.fisher_diagonal(Graphs(True).double(), [batch], cross_entropy, verify=verify)
    found = wplfast.fisher_diagonal(Graphs(False).double(), [batch], cross_entropy, verify=verify)
    assert len(found.report.unchecked) == (1 if verify else 0)


class Towers(nn.Module):
    """Similarities of images and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(5, 4), nn.Linear(6, 4)

    def forward(self, x, t):
        return 5 * F.normalize(self.images(x), dim=-1) @ F.normalize(self.texts(t), dim=-1).t()


@pytest.mark.parametrize("sizes", [[2], [3], [4], [8, 8], [6, 5]], ids=str)
def test_in_batch_negatives(sizes: list[int]) -> None:
    data = [((torch.randn(n, 5).double(), torch.randn(n, 6).double()), torch.arange(n)) for n in sizes]
    with pytest.raises(CoupledSamplesError):
        wplfast.fisher_diagonal(Towers().double(), data, cross_entropy)


def test_labels_that_happen_to_number_the_samples() -> None:
    """Positions are a table that all samples share, though there are as many as samples, and labels count up."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.last = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, ids, places):
            return self.last((self.words(ids) + self.places(places)).tanh().sum(1))

    batch = (torch.randint(9, (4, 4)), torch.tensor([2, 0, 3, 1])), torch.arange(4)
    wplfast.fisher_diagonal(Positions().double(), [batch], cross_entropy)


def regression(n):
    """Outputs about 2000, of which hardly anything is left in the loss: rounding is large there."""
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    with torch.no_grad():
        model[-1].weight.fill_(60.0)
        x = torch.randn(n, 20)
        return model, (x, model(x) + 0.2 * torch.randn(n, 1))


def sines(n):
    """A network of sines whose weights are too large: it amplifies rounding."""

    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    layers = [nn.Linear(2 if k == 0 else 32, 32) for k in range(6)]
    with torch.no_grad():
        for k, layer in enumerate(layers):
            layer.weight.uniform_(-1, 1).mul_(60.0 if k == 0 else 4 * (6 / 32) ** 0.5)
    model = nn.Sequential(*(part for layer in layers for part in (layer, Sine())), nn.Linear(32, 1))
    return model, (torch.rand(n, 2) * 2 - 1, torch.rand(n, 1))


@pytest.mark.parametrize("n", [2, 3, 4, 6, 13])
@pytest.mark.parametrize("make", [regression, sines])
def test_rounding_that_is_amplified_couples_nobody(make, n: int) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, batch = make(n)
        fisher = wplfast.fisher_diagonal(model, [batch], lambda o, y: (o - y).square().sum(1))
        assert fisher.report.unchecked == ()
