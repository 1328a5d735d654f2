"""Weights with a batch axis: against the one-sample loop, by a fast rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slow_kinds import E, K, check, rows_of
from torch import nn
from zoo import C, D, Lambda, par

import wplfast


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
