"""Embedding bags, and look-ups in tables of any shape: against the one-sample loop, by a fast rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from rehearsal import rehearsable
from slow_kinds import check, rows_of
from torch import nn
from zoo import C, D, Lambda, V, head, par

import wplfast


def fixed_bags(n, size=5):
    return (torch.randint(0, V, (n, size)),), n


def ragged_bags(*sizes, last=False):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return (torch.randint(0, V, (sum(sizes),)), offsets if last else offsets[:-1]), len(sizes)


def one_bag(parts, n):
    """The entries of bag n."""
    indices, offsets = parts[:2]
    ends = [*offsets.tolist(), len(indices)]
    alone = (indices[ends[n] : ends[n + 1]], torch.tensor([0]))
    return (*alone, *(part[ends[n] : ends[n + 1]] for part in parts[2:]))


def one_bag_with_last(parts, n):
    indices, offsets = parts
    first, end = offsets[n], offsets[n + 1]
    return indices[first:end], torch.tensor([0, int(end - first)])


def bag_model(use=lambda m, *x: m.bag(*x), **parts):
    return Lambda(lambda m, *x: m.head(torch.tanh(use(m, *x))), **parts, head=head())


MODES = ["sum", "mean", "max"]
OPTIONS = {"plain": {}, "padding": {"padding_idx": 2}, "last padding": {"padding_idx": -1}, "sparse": {"sparse": True}}


@pytest.mark.parametrize("options", rehearsable(OPTIONS, {"sparse": "sparse tensors"}))
@pytest.mark.parametrize("mode", MODES)
def test_bags(mode, options):
    if mode == "max" and options == "sparse":
        pytest.skip("PyTorch has no sparse gradients of maxima")
    torch.manual_seed(0)
    model = bag_model(bag=nn.EmbeddingBag(V, D, mode=mode, **OPTIONS[options]))
    fisher = check(model, [fixed_bags(5), fixed_bags(5), fixed_bags(3), fixed_bags(1, 7)], rows_of)
    assert fisher.report.rules["bag.weight"] == ("embedding bag",)
    check(model, [ragged_bags(2, 0, 9, 1), ragged_bags(4, 4, 4, 4), ragged_bags(0, 3), ragged_bags(40, 0, 1)], one_bag)


@pytest.mark.parametrize("mode", MODES)
def test_bags_between_offsets(mode):
    torch.manual_seed(1)
    model = bag_model(bag=nn.EmbeddingBag(V, D, mode=mode, include_last_offset=True, padding_idx=0))
    check(model, [ragged_bags(2, 0, 9, 1, last=True), ragged_bags(3, 1, last=True)], one_bag_with_last)


@pytest.mark.parametrize("mode", MODES)
def test_several_bags_of_a_sample(mode, monkeypatch):
    """Rows that a sample's bags share are summed before they are squared, whatever is computed at a time."""
    torch.manual_seed(2)
    model = bag_model(
        lambda m, x: m.bag(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sin(), bag=nn.EmbeddingBag(5, D, mode=mode)
    )
    data = [((torch.randint(0, 5, (n, t, 3)),), n) for n, t in ((4, 4), (3, 2), (1, 4))]
    check(model, data, rows_of)
    for limit in (1, 3 * D, 5 * D):
        monkeypatch.setattr("wplfast.capture.rules.embedding_bag.MAX_ELEMENTS", limit)
        check(model, data, rows_of)


def test_bags_of_samples_in_any_order():
    torch.manual_seed(3)

    def use(m, x):
        rows = x.flatten(0, 1)
        order = rows.sum(1).argsort()
        return (
            torch.zeros(len(rows), D, dtype=m.bag.weight.dtype)
            .index_copy(0, order, m.bag(rows[order]))
            .view(*x.shape[:2], D)
        )

    model = bag_model(use, bag=nn.EmbeddingBag(V, D))
    check(model, [((torch.randint(0, V, (n, 3, 4)),), n) for n in (4, 3)], rows_of)


def test_a_bag_used_twice_and_beside_an_embedding():
    torch.manual_seed(4)
    twice = bag_model(lambda m, x: m.bag(x) * m.bag(x.flip(1)[:, :2]), bag=nn.EmbeddingBag(V, D, mode="sum"))
    check(twice, [fixed_bags(4), fixed_bags(2)], rows_of)
    weighed = bag_model(
        lambda m, x: F.embedding_bag(x, m.w, per_sample_weights=x.to(m.w) / 3, mode="sum") * F.embedding_bag(x, m.w),
        w=par(V, D),
    )
    check(weighed, [fixed_bags(4), fixed_bags(2)], rows_of)
    both = bag_model(lambda m, x: m.bag(x) + F.embedding(x, m.bag.weight).sin().sum(1), bag=nn.EmbeddingBag(V, D))
    check(both, [fixed_bags(4), fixed_bags(2)], rows_of)
    tied = Lambda(lambda m, x: torch.tanh(m.bag(x)) @ m.bag.weight.t(), bag=nn.EmbeddingBag(V, D))
    check(tied, [fixed_bags(4), fixed_bags(2)], rows_of)
    maxima = bag_model(lambda m, x: m.bag(x) * F.embedding_bag(x, m.bag.weight), bag=nn.EmbeddingBag(V, D, mode="max"))
    check(maxima, [fixed_bags(4), fixed_bags(2)], rows_of)


def test_weights_of_entries():
    torch.manual_seed(5)
    bag = nn.EmbeddingBag(V, D, mode="sum", padding_idx=3)
    model = bag_model(bag=bag)
    x, offsets = ragged_bags(3, 0, 5, 2)[0]
    check(model, [((x, offsets, torch.rand(len(x), dtype=torch.float64)), 4)] * 2, one_bag)
    looked_up = bag_model(lambda m, x, o: m.bag(x, o, m.p[x]), bag=bag, p=par(V))
    check(looked_up, [((x, offsets), 4)] * 2, one_bag)
    by_place = bag_model(lambda m, x: m.bag(x, per_sample_weights=m.p.expand(x.shape)), bag=bag, p=par(5))
    check(by_place, [fixed_bags(4), fixed_bags(4), fixed_bags(1)], rows_of)
    bag.requires_grad_(False)
    check(by_place, [fixed_bags(4), fixed_bags(2)], rows_of)
    wide = [((torch.randint(0, V, (n, 3)), torch.rand(n, D)), n) for n in (4, 2)]
    computed = bag_model(lambda m, x, y: m.bag(x, per_sample_weights=m.layer(y)), bag=bag, layer=nn.Linear(D, 3))
    check(computed, wide, rows_of)


def test_bags_by_keyword_and_in_parts():
    torch.manual_seed(6)
    keywords = bag_model(lambda m, x: F.embedding_bag(weight=m.w, input=x, mode="max"), w=par(V, D))
    check(keywords, [fixed_bags(4), fixed_bags(2)], rows_of)
    part = bag_model(lambda m, x: F.embedding_bag(x, m.w[1:]), w=par(V + 1, D))
    check(part, [fixed_bags(4), fixed_bags(2)], rows_of)
    scaled = bag_model(lambda m, x: F.embedding_bag(x.int(), m.w * m.s), w=par(V, D), s=par(1))
    check(scaled, [fixed_bags(4), fixed_bags(2)], rows_of)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_bags_in_float32(mode, weighted):
    torch.manual_seed(8)
    model = bag_model(bag=nn.EmbeddingBag(V, D, mode=mode, padding_idx=1))
    x, y = torch.randint(0, V, (6, 4)), torch.randint(0, C, (6,))
    weights = torch.rand(6, dtype=torch.float64) if weighted else torch.ones(6, dtype=torch.float64)
    fisher = wplfast.fisher_diagonal(model, [(x, y, weights)] * 2, wplfast.losses.cross_entropy)
    parts = [fisher_loop(model, [(x[n : n + 1], y[n : n + 1])], wplfast.losses.cross_entropy) for n in range(6)]
    expected = {k: sum(w * p[k] for w, p in zip(weights, parts, strict=True)) / weights.sum() for k in parts[0]}
    assert_close(fisher, expected)


@pytest.mark.parametrize("shape", [(V,), (V, 1), (V, 2, 3), (V, 2, 3, 2)])
def test_look_ups_in_tables_of_any_shape(shape):
    torch.manual_seed(7)
    model = Lambda(
        lambda m, x: m.head((m.p[x] * torch.ones(1).to(m.p)).sin().flatten(1)), p=par(*shape), head=nn.LazyLinear(C)
    )
    data = [((torch.randint(0, V, (n, 4)),), n) for n in (4, 4, 3, 1)]
    model.double()(*data[0][0])
    assert check(model, data, rows_of).report.rules["p"] == ("embedding",)
    first = Lambda(lambda m, x: (m.p[x.t()].sin() + 1).transpose(0, 1) + m.p[x], p=par(*shape))
    check(first, data, rows_of)
    flat = Lambda(
        lambda m, x: (
            m.p[x.flatten()[x.flatten().argsort()]].sin()[x.flatten().argsort().argsort()].unflatten(0, x.shape)
        ),
        p=par(*shape),
    )
    check(flat, data, rows_of)
