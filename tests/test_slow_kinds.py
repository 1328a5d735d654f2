"""Kinds of calls that were served one sample at a time: against the one-sample loop in float64, and by a fast rule."""

from __future__ import annotations

import random
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from rehearsal import rehearsable
from torch import nn
from zoo import C, D, Lambda, V, head, par

import wplfast
from wplfast.capture.rules import vectorised
from wplfast.capture.watched import map_tensors

EXACT = {"rtol": 1e-11, "model_rtol": 1e-12}


def squares(outputs):
    """One loss a sample: the sum of its squared outputs, and some of their cubes."""
    flat = outputs.flatten(1)
    return flat.square().sum(1) + flat.pow(3).sum(1) / 8


def check(model, batches, single, slow=False, loss=squares, masked=False, **tolerance):
    """Compare a pass over batches with the loop over ``single(batch, n)``, the batch of sample n alone.

    Args:
        model: called with the parts of a batch; copied to float64.
        batches: tuples of tensors and the number of samples of each: (parts, N).
        single: returns the parts for one sample.
        slow: whether the report is to name a slow rule; None: whatever.
        loss: outputs -> losses [N].
        masked: whether a gradient is to be masked to each sample; None: whatever.
        tolerance: of the comparison.
    """
    model = model.double().eval()
    batches = [(map_tensors(lambda t: t.double() if t.is_floating_point() else t, parts), n) for parts, n in batches]
    watched, count = {name: p for name, p in model.named_parameters() if p.requires_grad}, 0
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in watched.items()}
    mean = {name: torch.zeros_like(p) for name, p in watched.items()}
    with wplfast.FisherAccumulator(model, with_grad=True, independent=True) as acc:
        for parts, _ in batches:
            acc.backward(loss(model(*parts)))
    fisher = acc.result()
    for parts, n_samples in batches:
        for n in range(n_samples):
            model.zero_grad()
            loss(model(*single(parts, n))).sum().backward()
            for name, p in watched.items():
                if p.grad is not None:
                    total[name] += p.grad.abs().square()
                    mean[name] += p.grad
            count += 1
    assert_close(fisher, {k: v / count for k, v in total.items()}, **(tolerance or EXACT))
    for name, gradient in mean.items():
        torch.testing.assert_close(fisher.mean_grad[name], gradient / count, rtol=1e-8, atol=1e-9)
    served = {rule for rules in fisher.report.rules.values() for rule in rules}
    assert slow is None or bool(served & {"generic", "one by one"}) == slow, fisher.report.rules
    assert masked is None or ("masked" in served) == masked, fisher.report.rules
    return fisher


def rows_of(parts, n):
    """One sample of tensors that all have the samples along their first dimension."""
    return tuple(part[n : n + 1] for part in parts)


# ---- embedding bags ------------------------------------------------------------------------------------------------


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


# ---- weights with a batch axis ---------------------------------------------------------------------------------------

E, K = 3, 5


def capacity(m, x):
    """Tokens of all samples in the buffers of the experts that they are routed to, which are never full."""
    rows, room = x.flatten(0, 1), x.shape[0] * x.shape[1]
    expert = (rows[:, :E] * 3).argmax(1)
    places = F.one_hot(expert, E).cumsum(0).gather(1, expert.unsqueeze(1)).squeeze(1) - 1
    kept = (places < room).nonzero().squeeze(1)
    buffers = rows.new_zeros(E, room, D).index_put((expert[kept], places[kept]), rows[kept])
    hidden = torch.baddbmm(m.b, buffers, m.w).tanh() if hasattr(m, "b") else torch.bmm(buffers, m.w).tanh()
    return rows.new_zeros(len(rows), K).index_copy(0, kept, hidden[expert[kept], places[kept]]).view(*x.shape[:2], K)


def soft_experts(m, x):
    """Slots that are mixtures of a sample's tokens, and tokens that are mixtures of its slots (soft MoE)."""
    logits = torch.einsum("btd,des->btes", x, m.phi)
    dispatch, combine = logits.softmax(1), logits.flatten(2).softmax(2).view_as(logits)
    slots = torch.einsum("btd,btes->besd", x, dispatch)
    hidden = (torch.einsum("besd,edk->besk", slots, m.w) + m.b).tanh()
    return torch.einsum("besk,btes->btk", hidden, combine)


def grouped(m, x, transposed=False):
    rows = x.flatten(0, 1)
    expert = (rows[:, :E] * 3).argmax(1)
    order = expert.argsort()
    offsets = torch.bincount(expert, minlength=E).cumsum(0).int()
    weight = m.w.transpose(1, 2) if transposed else m.w
    hidden = torch._grouped_mm(rows[order].contiguous(), weight, offs=offsets)
    return torch.zeros(len(rows), hidden.shape[1]).to(hidden).index_copy(0, order, hidden).view(*x.shape[:2], -1)


def heads(x):
    """[N, T, D] as [N, 3, T, D], another one for each."""
    return torch.stack([x, x.flip(1), x.tanh()], 1)


W = {"w": (E, D, K)}
BATCHED = {
    "bmm, samples in rows": (lambda m, x: torch.bmm(heads(x).transpose(0, 1).flatten(1, 2), m.w), W),
    "matmul [N, E, T, D]": (lambda m, x: heads(x) @ m.w, W),
    "matmul of time first": (lambda m, x: (heads(x).permute(2, 1, 0, 3) @ m.w).permute(2, 1, 0, 3), W),
    "one input for all matrices": (lambda m, x: x.unsqueeze(1) @ m.w, W),
    "one vector for all matrices": (lambda m, x: x[:, :1].unsqueeze(1) @ m.w, W),
    "matrices from the left": (lambda m, x: m.w.transpose(1, 2) @ heads(x).transpose(2, 3), W),
    "kept from the left": (lambda m, x: m.w @ heads(x).transpose(2, 3), {"w": (E, K, D)}),
    "__rmatmul__": (lambda m, x: heads(x).transpose(2, 3).__rmatmul__(m.w), {"w": (E, K, D)}),
    "a batch of one": (lambda m, x: heads(x) @ m.w, {"w": (1, D, K)}),
    "two batch axes": (lambda m, x: torch.stack([heads(x), heads(x).sin()], 1) @ m.w, {"w": (2, E, D, K)}),
    "two batch axes, one spread": (lambda m, x: torch.stack([heads(x), heads(x).sin()], 1) @ m.w, {"w": (2, 1, D, K)}),
    "a vector": (lambda m, x: x @ m.w, {"w": (D,)}),
    "a vector from the left": (lambda m, x: m.w @ x.transpose(1, 2), {"w": (D,)}),
    "mv": (lambda m, x: torch.mv(x[:, 0], m.w).unsqueeze(1), {"w": (D,)}),
    "an expanded matrix": (lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), {"w": (1, D, K)}),
    "an unsqueezed and expanded matrix": (
        lambda m, x: torch.bmm(x, m.w.unsqueeze(0).expand(len(x), -1, -1)),
        {"w": (D, K)},
    ),
    "baddbmm": (
        lambda m, x: (
            torch.baddbmm(m.b, heads(x).transpose(0, 1).flatten(1, 2), m.w).unflatten(1, (len(x), -1)).transpose(0, 1)
        ),
        {**W, "b": (E, 1, K)},
    ),
    "baddbmm by keywords": (
        lambda m, x: (
            torch.baddbmm(m.b, batch1=heads(x).transpose(0, 1).flatten(1, 2), batch2=m.w)
            .transpose(0, 1)
            .unflatten(0, (len(x), -1))
        ),
        {**W, "b": (K,)},
    ),
    "used twice": (lambda m, x: heads(x) @ m.w @ m.w.transpose(1, 2) @ m.w, W),
    "used twice, and a slice": (lambda m, x: heads(x) @ m.w + (x @ m.w[1]).unsqueeze(1), W),
    "an expert chosen": (lambda m, x: x @ m.w[1] + x @ m.w[0], W),
    "scaled": (lambda m, x: heads(x) @ (m.w * m.s), {**W, "s": (1,)}),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])).flatten(2), W),
    "tensordot over two": (lambda m, x: torch.tensordot(heads(x), m.w, ([1, 3], [0, 1])), W),
    "tensordot of the last": (lambda m, x: torch.tensordot(heads(x).transpose(1, 2), m.w, 2), W),
    "end,edk->enk": (
        lambda m, x: torch.einsum("end,edk->enk", heads(x).transpose(0, 1).flatten(2), m.w),
        {"w": (E, 4 * D, K)},
    ),
    "ned,edk->nek": (lambda m, x: torch.einsum("ned,edk->nek", heads(x)[:, :, 0], m.w), W),
    "ned,dek->nek": (lambda m, x: torch.einsum("ned,dek->nek", heads(x)[:, :, 0], m.w), {"w": (D, E, K)}),
    "ned,dke->nek": (lambda m, x: torch.einsum("ned,dke->nek", heads(x)[:, :, 0], m.w), {"w": (D, K, E)}),
    "ned,kde->nek": (lambda m, x: torch.einsum("ned,kde->nek", heads(x)[:, :, 0], m.w), {"w": (K, D, E)}),
    "nd,edk->nek": (lambda m, x: torch.einsum("nd,edk->nek", x[:, 0], m.w), W),
    "nd,edk->nk": (lambda m, x: torch.einsum("nd,edk->nk", x[:, 0], m.w), W),
    "ntd,tdk->nk": (lambda m, x: torch.einsum("ntd,edk->nk", heads(x)[:, :, 0].expand(-1, E, -1), m.w), W),
    "ned,edk->nk": (lambda m, x: torch.einsum("ned,edk->nk", heads(x)[:, :, 0], m.w), W),
    "...ed,edk->...ek": (lambda m, x: torch.einsum("...ed,edk->...ek", heads(x).transpose(1, 2), m.w), W),
    "...d,...dk->...k": (lambda m, x: torch.einsum("...d,...dk->...k", heads(x)[:, :, 0], m.w), W),
    "elementwise by letters": (lambda m, x: torch.einsum("ntd,d->ntd", x, m.w), {"w": (D,)}),
    "diagonal matrices by letters": (lambda m, x: torch.einsum("ned,ed->ne", heads(x)[:, :, 0], m.w), {"w": (E, D)}),
    "many matrices": (lambda m, x: x.unsqueeze(1) @ m.w, {"w": (80, D, 2)}),
    "many vectors": (lambda m, x: torch.einsum("nd,ed->ned", x[:, 0], m.w), {"w": (90, D)}),
    "two data tensors": (lambda m, x: torch.einsum("ntd,nted,edk->ntek", x, heads(x).transpose(1, 2).sin(), m.w), W),
    "as a list": (lambda m, x: torch.einsum("ned,edk->nek", [heads(x)[:, :, 0], m.w]), W),
    "soft experts": (soft_experts, {**W, "phi": (D, E, 2), "b": (E, 1, K)}),
    "experts with capacity": (capacity, W),
    "experts with capacity and biases": (capacity, {**W, "b": (E, 1, K)}),
}


def of_batches(use):
    """Bring a result in which samples lie anywhere to one of [N, ...]."""

    def forward(m, x):
        found = use(m, x)
        if found.shape[0] != len(x) or found.shape[0] == E:  # [E, N * T, K]
            found = (
                found.unflatten(1, (len(x), -1)).transpose(0, 1)
                if found.dim() == 3 and found.shape[1] % len(x) == 0
                else found
            )
        return found.tanh().flatten(1)

    return forward


@pytest.mark.parametrize("name", BATCHED)
def test_weights_with_a_batch_axis(name):
    torch.manual_seed(sum(map(ord, name)))
    use, parameters = BATCHED[name]
    model = Lambda(of_batches(use), **{key: par(*shape) for key, shape in parameters.items()})
    data = [((torch.randn(n, 4, D),), n) for n in (5, 5, 4, 2, 1)]
    masked = name in ("experts with capacity and biases",)
    check(model, data, rows_of, masked=masked)


@pytest.mark.cpu_only("grouped products of float32")
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed):
    """float32, which is what grouped products take; rows in the order of the experts, some of which have none."""
    torch.manual_seed(9)
    width = 8
    model = Lambda(
        lambda m, x: m.head(torch.tanh(grouped(m, x, transposed)).mean(1)),
        w=par(E, width, width),
        head=nn.Linear(width, C),
    )
    data = [(torch.randn(n, 4, width), torch.randint(0, C, (n,))) for n in (5, 5, 4, 1)]
    fisher = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
    assert fisher.report.rules["w"] == ("batched matmul",)
    total = torch.zeros_like(model.w, dtype=torch.float64)
    for x, y in data:
        for n in range(len(x)):
            model.zero_grad()
            wplfast.losses.cross_entropy(model(x[n : n + 1]), y[n : n + 1]).sum().backward()
            total += model.w.grad.double().square()
    torch.testing.assert_close(fisher["w"].double(), total / 15, rtol=1e-4, atol=1e-9)


def test_samples_of_very_different_numbers_of_rows(monkeypatch):
    """Rows are arranged in several parts, so that the busiest sample does not set the size of all."""
    from wplfast.capture.rules.blocks import _alike

    lengths = [(count, index) for index, count in enumerate([1, 100, 3, 2, 1, 90, 50, 1, 3])]
    parts = list(_alike(lengths, 0))
    assert sorted(index for group, _ in parts for index in group) == list(range(9))
    for group, longest in parts:
        assert longest == max(lengths[index][0] for index in group)
        assert longest * len(group) <= 2 * sum(lengths[index][0] for index in group)
    monkeypatch.setattr("wplfast.capture.rules.blocks.WORTH_A_PART", 0)
    for name in ("experts with capacity", "experts with capacity and biases"):
        test_weights_with_a_batch_axis(name)


# ---- calls without a rule --------------------------------------------------------------------------------------------


GENERIC = {
    "cdist": (lambda m, x: torch.cdist(x, m.w), {"w": (K, D)}),
    "cdist of flattened rows": (
        lambda m, x: torch.cdist(x.flatten(0, 1), m.w).unflatten(0, x.shape[:2]),
        {"w": (K, D)},
    ),
    "cdist of time first": (lambda m, x: torch.cdist(x.transpose(0, 1), m.w, p=1.5).transpose(0, 1), {"w": (K, D)}),
    "cdist of flattened rows, time first": (
        lambda m, x: torch.cdist(x.transpose(0, 1).flatten(0, 1), m.w).unflatten(0, (x.shape[1], -1)).transpose(0, 1),
        {"w": (K, D)},
    ),
    "prelu": (lambda m, x: F.prelu(x.transpose(1, 2), m.w), {"w": (D,)}),
    "power": (lambda m, x: x.abs() ** m.w, {"w": (D,)}),
    "lerp": (lambda m, x: torch.lerp(x, x.sin(), m.w), {"w": (D,)}),
    "addcmul": (lambda m, x: torch.addcmul(x, x.sin(), m.w), {"w": (4, D)}),
    "addcmul in place": (lambda m, x: x.sin().addcmul_(x, m.w), {"w": (D,)}),
    "two operands": (lambda m, x: torch.addcdiv(m.b, x, m.w.exp()), {"w": (D,), "b": (4, D)}),
    "einsum of two parameters": (lambda m, x: torch.einsum("ntd,dr,rk->ntk", x, m.w, m.b), {"w": (D, 2), "b": (2, K)}),
}


@pytest.mark.parametrize("name", GENERIC)
def test_without_a_rule(name, monkeypatch):
    use, parameters = GENERIC[name]
    data = [((torch.randn(n, 4, D),), n) for n in (5, 5, 4, 2, 1)]
    model = Lambda(lambda m, x: use(m, x).tanh(), **{key: par(*shape) for key, shape in parameters.items()})
    calls = []
    gradients = vectorised.gradients
    monkeypatch.setattr(vectorised, "gradients", lambda *a: calls.append(gradients(*a)) or calls[-1])
    torch.manual_seed(sum(map(ord, name)))
    check(model, data, rows_of, slow=True)
    assert calls
    assert (None in calls) == ("in place" in name)  # for which there is no rule of vmap
    monkeypatch.setattr("wplfast.capture.rules.grad_sample.MAX_ELEMENTS", 2 * model.w.numel())  # a few at a time
    check(model, data, rows_of, slow=True)
    monkeypatch.setattr(vectorised, "gradients", lambda *a: None)  # an operation that cannot be vectorised
    check(model, data, rows_of, slow=True)


@pytest.mark.parametrize("wrong", ["gradients", "outputs"])
def test_vectorised_gradients_are_checked_at_first_use(wrong, monkeypatch):
    """What one by one shows otherwise is not used, and not tried again."""
    torch.manual_seed(10)
    calls, gradients = [], vectorised.gradients
    monkeypatch.setattr(vectorised, "_checked", {})

    def off(*arguments):
        calls.append(wrong)
        found, outputs = gradients(*arguments)
        return ([g * 1.001 for g in found], outputs) if wrong == "gradients" else (found, [y + 1 for y in outputs])

    monkeypatch.setattr(vectorised, "gradients", off)
    model = Lambda(lambda m, x: torch.cdist(x, m.w), w=par(K, D))
    check(model, [((torch.randn(n, 4, D),), n) for n in (5, 5, 4)], rows_of, slow=True)
    assert calls


@pytest.mark.cpu_only("its autocast")
def test_generic_under_autocast():
    torch.manual_seed(11)
    model = Lambda(lambda m, x: torch.addcmul(m.layer(x).float(), x, m.w), layer=nn.Linear(D, D), w=par(D))
    x, y = torch.randn(5, 4, D), torch.zeros(5)

    def loss(outputs, _):
        return outputs.float().flatten(1).square().sum(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        fisher = wplfast.fisher_diagonal(model, [(x, y)], loss)
        expected = fisher_loop(model, [(x, y)], loss, double=False)
    torch.testing.assert_close(fisher["w"].double(), expected["w"], rtol=3e-2, atol=1e-4)


# ---- complex numbers -------------------------------------------------------------------------------------------------


def complex_of(w):
    return torch.view_as_complex(w)


def fourier(m, x, product):
    return torch.fft.irfft(product(torch.fft.rfft(x, dim=1)), n=x.shape[1], dim=1)


COMPLEX = {
    "filter": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w)), {"w": (3, D, 2)}),
    "filter, one for all": (lambda m, x: fourier(m, x, lambda z: complex_of(m.w) * z), {"w": (3, 1, 2)}),
    "filter of a real parameter": (lambda m, x: fourier(m, x, lambda z: z * m.w), {"w": (3, D)}),
    "divided": (lambda m, x: fourier(m, x, lambda z: z / complex_of(m.w)), {"w": (3, D, 2)}),
    "shifted": (lambda m, x: fourier(m, x, lambda z: (z + complex_of(m.w)) * z), {"w": (3, D, 2)}),
    "shifted by a real parameter": (lambda m, x: fourier(m, x, lambda z: (z - m.w) * z), {"w": (3, D)}),
    "conjugated": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w).conj()), {"w": (3, D, 2)}),
    "convolution": (lambda m, x: fourier(m, x, lambda z: z * torch.fft.rfft(m.w, dim=0)), {"w": (4, D)}),
    "mixed channels": (lambda m, x: fourier(m, x, lambda z: z @ complex_of(m.w)), {"w": (D, K, 2)}),
    "mixed channels, each frequency": (
        lambda m, x: fourier(m, x, lambda z: torch.einsum("nfd,fdk->nfk", z, complex_of(m.w))),
        {"w": (3, D, K, 2)},
    ),
    "mixed channels, frequencies last": (
        lambda m, x: fourier(m, x, lambda z: torch.einsum("nif,iof->nof", z.mT, complex_of(m.w)).mT),
        {"w": (D, K, 3, 2)},
    ),
    "mixed channels, real matrix": (
        lambda m, x: fourier(m, x, lambda z: torch.einsum("nfd,dk->nfk", z, m.w.to(z.dtype))),
        {"w": (D, K)},
    ),
    "matmul": (
        lambda m, x: fourier(m, x, lambda z: (z.unsqueeze(2) @ complex_of(m.w)).squeeze(2)),
        {"w": (3, D, K, 2)},
    ),
    "vector": (lambda m, x: (torch.fft.fft(x) @ complex_of(m.w)).abs(), {"w": (D, 2)}),
    "rotation": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * torch.exp(1j * m.w)),
        {"w": (3,)},
    ),
    "made complex": (lambda m, x: torch.complex(x, m.w.expand_as(x)).abs(), {"w": (D,)}),
    "real data": (lambda m, x: torch.view_as_real(x * complex_of(m.w)), {"w": (D, 2)}),
    "a kernel of exponentials": (
        lambda m, x: torch.einsum("ntd,dk->ntk", x.to(torch.complex128), torch.exp(complex_of(m.w))).real,
        {"w": (D, K, 2)},
    ),
    "used twice": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w) * complex_of(m.w)), {"w": (3, D, 2)}),
    "used as both": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w)) * m.w[0, :, 0], {"w": (3, D, 2)}),
    "in other orders": (
        lambda m, x: (complex_of(m.w) @ torch.fft.fft(x).mT).abs().mT,
        {"w": (K, D, 2)},
    ),
}


def shuffled_rows(m, x):
    rows = torch.fft.fft(x).flatten(0, 1)
    order = rows.real.sum(1).argsort()
    w = complex_of(m.w)
    mixed = rows[order] * w + torch.einsum("rd,dk->rk", rows[order], w[0].unsqueeze(1).expand(-1, D) * 1j)
    return torch.zeros_like(rows).index_copy(0, order, mixed).abs().view(*x.shape)


COMPLEX["rows of samples in any order"] = (shuffled_rows, {"w": (1, D, 2)})


@pytest.mark.not_rehearsed("Fourier transforms")
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name):
    torch.manual_seed(sum(map(ord, name)))
    use, parameters = COMPLEX[name]
    model = Lambda(lambda m, x: use(m, x).sin(), **{key: par(*shape) for key, shape in parameters.items()})
    data = [((torch.randn(n, 4, D),), n) for n in (4, 4, 5, 2, 1)]
    check(model, data, rows_of, slow=name == "made complex", masked=None, rtol=1e-10, model_rtol=1e-11)


def complex_par(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.complex128) / 2)


def spectral(m, x):
    """A layer of a Fourier neural operator: the lowest frequencies, mixed; all others are left out."""
    spectrum = torch.fft.rfft(x, dim=1)
    kept = torch.zeros(len(x), spectrum.shape[1], K, dtype=spectrum.dtype)
    kept[:, :2] = torch.einsum("nfi,iof->nfo", spectrum[:, :2], m.w)
    return torch.fft.irfft(kept, n=x.shape[1], dim=1)


COMPLEX_PARAMETERS = {
    "spectral": (spectral, (D, K, 2), False),
    "filter": (lambda m, x: fourier(m, x, lambda z: z * m.w), (3, D), False),
    "part of a filter": (lambda m, x: fourier(m, x, lambda z: z[:, :2] * m.w[1:]), (3, D), False),
    "two parts": (lambda m, x: fourier(m, x, lambda z: z[:, :1] * m.w[:1] + z[:, 1:2] / m.w[1:]), (2, D), False),
    "conjugated": (lambda m, x: fourier(m, x, lambda z: z * m.w.conj() + m.w), (3, D), False),
    "linear": (lambda m, x: F.linear(torch.fft.fft(x), m.w).abs(), (K, D), True),
    "matmul": (lambda m, x: (torch.fft.fft(x) @ m.w).abs(), (D, K), False),
    "its real view": (lambda m, x: x @ torch.view_as_real(m.w)[..., 0] + x @ m.w.imag, (D, K), False),
    "exponentials": (lambda m, x: fourier(m, x, lambda z: z * m.w.exp()), (3, D), False),
    "opaque": (lambda m, x: Squared.apply(m.w) * x, (1, D), True),
}


class Squared(torch.autograd.Function):
    """|w|^2, which no interception sees."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.abs().square()

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return 2 * gradient * w


@pytest.mark.not_rehearsed("Fourier transforms")
@pytest.mark.parametrize("name", COMPLEX_PARAMETERS)
def test_complex_parameters(name):
    """F is |g|^2: the squares of the derivatives by the real and by the imaginary part, added up."""
    torch.manual_seed(sum(map(ord, name)))
    use, shape, slow = COMPLEX_PARAMETERS[name]
    model = Lambda(lambda m, x: use(m, x).sin(), w=complex_par(*shape), b=par(1))
    model = Lambda(lambda m, x: m.inner(x) * m.b, inner=model, b=par(1))
    model.inner.b = None
    data = [((torch.randn(n, 4, D),), n) for n in (4, 4, 5, 1)]
    fisher = check(model, data, rows_of, slow=slow, masked=None, rtol=1e-10, model_rtol=1e-11)
    assert fisher["inner.w"].dtype == torch.float64
    assert fisher["inner.w"].shape == shape


@pytest.mark.not_rehearsed("Fourier transforms")
def test_complex_parameters_in_a_call(tmp_path):
    torch.manual_seed(12)
    model = Lambda(
        lambda m, x: m.head(spectral(m, x).mean(1)),
        w=nn.Parameter(complex_par(D, K, 2).to(torch.complex64)),
        head=nn.Linear(K, C),
    )
    data = [(torch.randn(n, 4, D), torch.randint(0, C, (n,))) for n in (4, 3)]
    fisher = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy, with_grad=True, verify="always")
    assert fisher["w"].dtype == torch.float32
    assert fisher.mean_grad["w"].dtype == torch.complex64
    assert not fisher.report.slow
    wplfast.verify_fisher(model, data[0], wplfast.losses.cross_entropy)
    fisher.save(tmp_path / "f.safetensors")
    torch.testing.assert_close(wplfast.Fisher.load(tmp_path / "f.safetensors")["w"], fisher["w"])
    with pytest.raises(ValueError, match=r"'w'\] must be of a floating point type, got torch.complex64"):
        wplfast.WeightPlasticityLoss(model)


# ---- functions of several parameters ---------------------------------------------------------------------------------

PQ = {"p": (K, 2), "q": (2, D)}
PW = {**PQ, "w": (K, D)}
DERIVED = {
    "low rank": (lambda m: m.p @ m.q, PQ, True),
    "a product of three": (lambda m: torch.mm(m.p, m.r) @ m.q, {**PQ, "r": (2, 2)}, True),
    "an update of low rank": (lambda m: m.w + 0.5 * (m.p @ m.q), PW, True),
    "an update, subtracted": (lambda m: m.w.sub(m.p @ m.q, alpha=2) - m.w / 3, PW, True),
    "a gated update": (lambda m: m.w + m.s * (m.p @ m.q), {**PW, "s": (1,)}, True),
    "a gate without dimensions": (lambda m: (m.p @ m.q) * m.s + m.w, {**PW, "s": ()}, True),
    "a gate of rows": (lambda m: m.s * (m.w + m.p @ m.q), {**PW, "s": (K, 1)}, True),
    "a gate of columns": (lambda m: (m.w + m.p @ m.q) / m.s.exp(), {**PW, "s": (D,)}, False),
    "a squashed gate": (
        lambda m: m.s.sigmoid() * m.w + (1 - m.s.sigmoid()) * m.v, {"s": (), "w": (K, D), "v": (K, D)}, False
    ),
    "a transpose": (lambda m: (m.q.t() @ m.p.T).t() + m.w.neg(), PW, False),
    "a transpose of a product": (lambda m: (m.p @ m.q).T.transpose(0, 1).mT.t(), PQ, True),
    "a square": (lambda m: m.w * m.w, {"w": (K, D)}, True),
    "an elementwise product": (lambda m: m.w * m.v, {"w": (K, D), "v": (K, D)}, True),
    "an elementwise quotient": (lambda m: m.w / m.v.exp(), {"w": (K, D), "v": (K, D)}, True),
    "one over a matrix": (lambda m: 2 / m.w.exp(), {"w": (K, D)}, False),
    "squashed": (lambda m: torch.tanh(m.w) + F.softplus(m.w), {"w": (K, D)}, True),
    "squashed, then masked": (lambda m: torch.tanh(m.w + m.v) * m.keep.buffer, {"w": (K, D), "v": (K, D)}, True),
    "masked": (lambda m: m.w * m.keep.buffer, {"w": (K, D)}, True),
    "masked, of low rank": (lambda m: (m.p @ m.q) * m.keep.buffer, PQ, False),
    "magnitude and direction": (
        lambda m: m.s * (m.w + m.p @ m.q) / (m.w + m.p @ m.q).norm(dim=1, keepdim=True), {**PW, "s": (K, 1)}, False
    ),
    "a part": (lambda m: m.w[:K] + m.p @ m.q, {**PQ, "w": (K + 2, D)}, False),
    "joined": (lambda m: torch.cat([m.p @ m.q, m.w]), {**PQ, "w": (2, D)}, False),
    "one row": (lambda m: (m.w * m.v) @ m.q, {"w": (1, 2), "v": (1, 2), "q": (2, D)}, True),
    "one column": (lambda m: (m.p * m.s) @ m.q, {"p": (K, 1), "s": (K, 1), "q": (1, D)}, True),
}  # fmt: skip


def made_by_all(m):
    """Another use of every parameter."""
    return sum(p.square().sum() for p in m.parameters())


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", (torch.rand(K, D) > 0.4).double())


@pytest.mark.parametrize("name", DERIVED)
def test_functions_of_several_parameters(name, monkeypatch):
    torch.manual_seed(sum(map(ord, name)))
    make, parameters, simple = DERIVED[name]
    made = {key: par(*shape) for key, shape in parameters.items()}
    down = []
    monkeypatch.setattr(vectorised, "backward", lambda *a, of=vectorised.backward: down.append(1) or of(*a))
    model = Lambda(lambda m, x: F.linear(x, make(m)).sin(), **made, keep=Kept())
    data = [((torch.randn(n, 4, D),), n) for n in (4, 4, 5, 2, 1)]
    check(model, data, rows_of, rtol=1e-10, model_rtol=1e-11)
    assert not (simple and down)  # no sample's gradient of the weight is made
    twice = Lambda(lambda m, x: F.linear(x, make(m)).sin() * (x.tanh() @ make(m).t()), **made, keep=Kept())
    check(twice, data, rows_of, rtol=1e-10, model_rtol=1e-11)
    tied = Lambda(lambda m, x: F.linear(x, make(m)).sin() + made_by_all(m) * x.mean((1, 2), True), **made, keep=Kept())
    check(tied, data, rows_of, masked=None, rtol=1e-10, model_rtol=1e-11)


def test_frozen_weight_with_an_update():
    torch.manual_seed(13)
    model = Lambda(lambda m, x: F.linear(x, m.w + m.p @ m.q).sin(), **{k: par(*s) for k, s in PW.items()})
    model.w.requires_grad_(False)
    check(model, [((torch.randn(n, 4, D),), n) for n in (4, 3)], rows_of)
    model.p.data.zero_()  # as LoRA begins
    check(model, [((torch.randn(n, 4, D),), n) for n in (4, 3, 4)], rows_of)


def test_gradients_sent_down_a_graph_are_checked_at_first_use(monkeypatch):
    torch.manual_seed(14)
    monkeypatch.setattr(vectorised, "_checked", {})
    grad = torch.autograd.grad

    def off(*arguments, is_grads_batched=False, **options):
        found = grad(*arguments, is_grads_batched=is_grads_batched, **options)
        return tuple(g if g is None else g * 1.01 for g in found) if is_grads_batched else found

    monkeypatch.setattr(torch.autograd, "grad", off)
    model = Lambda(lambda m, x: F.linear(x, torch.cat([m.p @ m.q, m.w])).sin(), p=par(K, 2), q=par(2, D), w=par(2, D))
    check(model, [((torch.randn(n, 4, D),), n) for n in (5, 4)], rows_of)
    assert False in vectorised._checked.values()


# ---- recurrent layers under autocast ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, layer, packed=False):
        super().__init__()
        self.layer, self.head, self.packed = layer, nn.Linear(2 * D if layer.bidirectional else D, C), packed

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if self.packed:
                lengths = (x[:, :, 0] != 0).sum(1).clamp_min(1)
                x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            found = self.layer(x)[0]
            found = nn.utils.rnn.pad_packed_sequence(found, batch_first=True)[0] if self.packed else found
        self.dtype = found.dtype
        return self.head(found.float().sum(1))


@pytest.mark.cpu_only("its autocast, and what its kernels return")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["plain", "deep"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_under_autocast(kind, options, packed):
    """As near to float32 as bfloat16 is, in the types that the layer itself returns, and by fast rules."""
    torch.manual_seed(15)
    model = Recurrent(kind(D, D, batch_first=True, **options), packed).eval()
    x, y = torch.randn(5, 4, D), torch.randint(0, C, (5,))
    x[1, 2:], x[3, 3:] = 0, 0
    model(x)
    dtype = model.dtype
    fisher = wplfast.fisher_diagonal(model, [(x, y)] * 2, wplfast.losses.cross_entropy)
    assert model.dtype == dtype
    assert not fisher.report.slow
    model.zero_grad()
    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    rough = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(5):
        for found, enabled in ((exact, False), (rough, True)):
            with mock.patch.object(torch, "autocast", partial(torch.autocast, enabled=enabled)):
                wplfast.losses.cross_entropy(model(x[n : n + 1]), y[n : n + 1]).sum().backward()
            for name, p in model.named_parameters():
                found[name] += p.grad.square() / 5
            model.zero_grad()
    for name, expected in exact.items():
        error = (fisher[name] - expected).norm() / expected.norm()
        assert error <= max(2 * (rough[name] - expected).norm() / expected.norm(), 1e-2), name


# ---- equations drawn at random ---------------------------------------------------------------------------------------


def drawn(seed):
    """Draw an equation over letters "abcde" and "n", the samples: its terms, sizes of both factors, and variants."""
    draw = random.Random(seed)
    sizes = {a: draw.choice([1, 2, 3, 4]) for a in "abcde"}
    operand, data = draw.sample("abcde", draw.randint(1, 3)), draw.sample("abcde", draw.randint(0, 3))
    data.insert(draw.randint(0, len(data)), "n")
    shared = sorted(set(operand + data) - {"n"})
    output = draw.sample(shared, draw.randint(0, len(shared)))
    output.insert(draw.randint(0, len(output)), "n")
    single = {a for a in operand if a in data and draw.random() < 0.15}  # broadcast in the operand, or in the data
    of_data = single and draw.random() < 0.5
    shape = [1 if a in single and not of_data else sizes[a] for a in operand]
    others = [1 if a in single and of_data else sizes[a] for a in data if a != "n"]
    return operand, data, output, shape, others, draw.choice(["real", "complex", "view"]), draw.random() < 0.3


@pytest.mark.parametrize("seed", range(60))
def test_equations(seed):
    torch.manual_seed(seed)
    operand, data, output, shape, others, kind, routed = drawn(seed)
    equation = f"{''.join(data)},{''.join(operand)}->{''.join(output)}"
    along = data.index("n"), output.index("n")
    weight = complex_par(*shape) if kind == "complex" else par(*shape, *([2] if kind == "view" else []))

    def forward(m, x):
        order = x.reshape(len(x), -1).sum(1).argsort()
        x = x[order] if routed else x
        z = x.movedim(0, along[0])
        z = z if kind == "real" else z * (1 + 0.5j) + z.sin() * 1j
        y = torch.einsum(equation, z, complex_of(m.w) if kind == "view" else m.w).movedim(along[1], 0)
        y = torch.zeros_like(y).index_copy(0, order, y) if routed else y
        return (y if kind == "real" else torch.view_as_real(y)).reshape(len(x), -1)

    data = [((torch.randn(n, *others),), n) for n in (4, 4, 3, 1)]
    check(Lambda(forward, w=weight), data, rows_of, slow=None, masked=None, rtol=1e-10, model_rtol=1e-11)
