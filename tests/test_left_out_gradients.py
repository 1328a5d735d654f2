"""Gradients that are NaN where no parameter sees them (padding that a look-up leaves out): plain PyTorch drops them."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close, fisher_loop
from torch import nn

import wplfast
from wplfast.errors import NonFiniteError
from wplfast.losses import cross_entropy


def with_norms(x, chosen):
    """Add root mean squares to some rows: the derivative is inf where all of a row is zero, and NaN after the mask."""
    return torch.where(chosen, x + x.square().mean(-1, keepdim=True) ** 0.5, 0.0)


class Words(nn.Module):
    """A table with padding, whose rows are used once or twice, along dimension 0 or 1."""

    def __init__(self, time_first: bool = False, twice: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 3)
        self.time_first, self.twice, self.tied = time_first, twice, tied

    def forward(self, ids):
        ids = ids.t() if self.time_first else ids
        h = with_norms(self.table(ids), ids.unsqueeze(-1) != 0).sum(0 if self.time_first else 1)
        if self.twice:
            h = h + self.table(ids.flip(1)).tanh().sum(1)
        return nn.functional.linear(h, self.table.weight)[:, :3] if self.tied else self.head(h)


class Bags(nn.Module):
    """Bags, of which some are empty but for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(10, 4, padding_idx=0, mode="sum"), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(with_norms(self.table(ids), (ids != 0).any(1, keepdim=True)))


class MaskToken(nn.Module):
    """A token in the places of some entries; where there is none, rows are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, ids):
        masked = (ids > 4).unsqueeze(-1)
        return self.head(with_norms(torch.where(masked, self.token, torch.zeros(4).to(self.token)), masked).sum(1))


class Made(nn.Module):
    """A table that is made of a parameter, with a row of zeros for padding."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form, self.table, self.head = form, nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(with_norms(self.form(self.table)[ids], ids.unsqueeze(-1) != 0).sum(1))


def batches(sizes, padded_from=0):
    found = []
    for number, n in enumerate(sizes):
        ids = torch.randint(1, 10, (n, 5))
        if number >= padded_from:
            ids[0, 1:], ids[-1, :] = 0, torch.tensor([5, 6, 0, 0, 0])
            if n > 2:
                ids[1] = 0
        found.append((ids, torch.randint(3, (n,))))
    return found


MODELS = {
    "once": Words,
    "time first": lambda: Words(time_first=True),
    "twice": lambda: Words(twice=True),
    "tied": lambda: Words(tied=True),
    "bags": Bags,
    "token": MaskToken,
    "joined": lambda: Made(lambda table: torch.cat([torch.zeros(1, 4).to(table), table])),
    "padded": lambda: Made(lambda table: nn.functional.pad(table, (0, 0, 1, 0))),
    "filled": lambda: Made(lambda table: table.masked_fill(torch.arange(10).unsqueeze(1) == 0, 0.0)),
}


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [5, 3], [1, 1], [32, 20]], ids=str)
@pytest.mark.parametrize("padded_from", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_what_reaches_no_parameter_counts_for_nothing(model: str, padded_from: int, sizes: list[int]) -> None:
    net, data = MODELS[model]().double(), batches(sizes, padded_from)
    expected = fisher_loop(net, data, cross_entropy)
    found = wplfast.fisher_diagonal(net, data, cross_entropy)
    with wplfast.FisherAccumulator(net) as accumulator:
        for x, y in data:
            accumulator.backward(cross_entropy(net(x), y))
        alone = accumulator.result()
    assert all(value.isfinite().all() for value in expected.values())
    for fisher in (found, alone):
        assert_close(fisher, expected, rtol=1e-10, model_rtol=1e-10)


@pytest.mark.parametrize("sizes", [[4, 4], [1]], ids=str)
def test_what_reaches_one_is_an_error(sizes: list[int]) -> None:
    class Multiplied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, ids):
            chosen = (ids != 0).unsqueeze(-1)
            return self.head(with_norms(self.table(ids) * chosen, chosen).sum(1))

    data = batches(sizes)
    with pytest.raises(NonFiniteError, match=r"a gradient of 'table\.weight' is NaN or infinite"):
        wplfast.fisher_diagonal(Multiplied().double(), data, cross_entropy)
