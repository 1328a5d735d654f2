"""Kinds of calls that were served one sample at a time: against the one-sample loop in float64, and by a fast rule."""

from __future__ import annotations

import os
import random
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import fisher_loop
from slow_kinds import K, check, complex_of, complex_par, rows_of
from torch import nn
from zoo import C, D, Lambda, par

import wplfast
from wplfast.capture.rules import vectorised

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


#: How many of them; more are worth their time after a change of what serves products.
EQUATIONS = int(os.environ.get("WPLFAST_TEST_EQUATIONS", "24"))


@pytest.mark.parametrize("seed", range(EQUATIONS))
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
