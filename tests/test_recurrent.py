"""RNNs seen through: the linear calls against the fused functions, and their Fisher against the one-sample loop."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop, without_cudnn
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from zoo import Lambda

import wplfast
from wplfast.capture.trace import recurrent

D, H, C = 5, 6, 3

KINDS = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "lstm, projected": (nn.LSTM, {"proj_size": 4}),
}


def build(kind, **options):
    cls, more = KINDS[kind]
    return cls(D, H, **options, **more).double()


class Ordinary:
    """Stands for an interception: every parameter is watched, and gradients go where autograd sends them."""

    reorders = False

    def tap_result(self, func, args, like, moves):
        result = func(args[0].detach(), *args[1:])
        return like + (result - result.detach())


@pytest.fixture
def seen_through(monkeypatch):
    """Return a function that runs a fused function by way of linear calls."""
    monkeypatch.setattr(recurrent, "is_watched", lambda t: isinstance(t, nn.Parameter))

    def run(func, *args):
        result = recurrent.run_as_linear_calls(Ordinary(), func, args, {})
        assert result is not NotImplemented
        return result

    return run


def outcome(run, args, inputs, weights, seed=0):
    """Results of a function and the gradients of a random projection of all of them."""
    torch.manual_seed(seed)
    results = run(*args)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        directions = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in results]
    loss = sum((r * direction.to(r.device)).sum() for r, direction in zip(results, directions, strict=True))
    return [*results, *torch.autograd.grad(loss, [*inputs, *weights])]


def assert_same(func, seen_through, args, inputs, weights):
    with without_cudnn():
        native = outcome(func, args, inputs, weights)
    ours = outcome(lambda *a: seen_through(func, *a), args, inputs, weights)
    for one, other in zip(ours, native, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def states(rnn, n):
    """Random initial states that require grad."""
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    sizes = (rnn.proj_size or H, H) if isinstance(rnn, nn.LSTM) else (H,)
    return [torch.randn(layers, n, size, dtype=torch.float64, requires_grad=True) for size in sizes]


def options_of(rnn):
    return rnn.bias, rnn.num_layers, rnn.dropout, rnn.training, rnn.bidirectional


FLAGS = list(itertools.product([1, 2], [False, True], [False, True], [False, True]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "both", "batch_first", "bias"), FLAGS)
def test_sequences(kind, layers, both, batch_first, bias, seen_through):
    rnn = build(kind, num_layers=layers, bidirectional=both, batch_first=batch_first, bias=bias)
    x = torch.randn(4, 3, D, dtype=torch.float64, requires_grad=True)
    hx = states(rnn, 4 if batch_first else 3)
    args = (x, hx if len(hx) > 1 else hx[0], rnn._flat_weights, *options_of(rnn), batch_first)
    func = getattr(torch, rnn.mode.lower())
    assert_same(func, seen_through, args, [x, *hx], list(rnn.parameters()))


@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [2, 5, 1, 5], [4, 4, 4, 4], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "both", "bias"), [(1, False, True), (2, True, True), (2, False, False)])
def test_packed_sequences(kind, layers, both, bias, lengths, seen_through):
    rnn = build(kind, num_layers=layers, bidirectional=both, bias=bias)
    padded = torch.randn(max(lengths), 4, D, dtype=torch.float64)
    x, sizes = pack_padded_sequence(padded, lengths, enforce_sorted=False)[:2]
    x, hx = x.requires_grad_(), states(rnn, 4)
    args = (x, sizes, hx if len(hx) > 1 else hx[0], rnn._flat_weights, *options_of(rnn))
    func = getattr(torch, rnn.mode.lower())
    assert_same(func, seen_through, args, [x, *hx], list(rnn.parameters()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_what_the_fused_function_draws(kind, packed, seen_through):
    rnn = build(kind, num_layers=3, bidirectional=True, dropout=0.4)
    x, hx = torch.randn(5, 3, D, dtype=torch.float64, requires_grad=True), states(rnn, 3)
    rest = (hx if len(hx) > 1 else hx[0], rnn._flat_weights, *options_of(rnn))
    if packed:
        data, sizes = pack_padded_sequence(x.detach(), [5, 4, 2])[:2]
        x = data.requires_grad_()
        args = (x, sizes, *rest)
    else:
        args = (x, *rest, False)
    assert_same(getattr(torch, rnn.mode.lower()), seen_through, args, [x, *hx], list(rnn.parameters()))


CELLS = {
    "rnn_tanh_cell": (nn.RNNCell, {}),
    "rnn_relu_cell": (nn.RNNCell, {"nonlinearity": "relu"}),
    "gru_cell": (nn.GRUCell, {}),
    "lstm_cell": (nn.LSTMCell, {}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, bias, seen_through):
    cls, options = CELLS[name]
    cell = cls(D, H, bias=bias, **options).double()
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(4, H, dtype=torch.float64, requires_grad=True) for _ in range(2 if name == "lstm_cell" else 1)]
    weights = [cell.weight_ih, cell.weight_hh, *([cell.bias_ih, cell.bias_hh] if bias else [])]
    args = (x, hx if len(hx) > 1 else hx[0], *weights)
    assert_same(getattr(torch, name), seen_through, args, [x, *hx], weights)


def classify(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def check(model, data, axes=(0, 0), rules="linear"):
    """Compare the Fisher with the loop's, and what served the parameters of the RNN."""
    fisher = wplfast.fisher_diagonal(model.eval(), data, classify)
    assert_close(fisher, fisher_loop(model, data, classify, axes=axes), rtol=1e-11, model_rtol=1e-12)
    for name, served in fisher.report.rules.items():
        if name.startswith("rnn"):
            assert rules is None or set(served) == {rules}, (name, served)
    return fisher


def last_and_states(m, x):
    out, states = m.rnn(x)
    states = states if isinstance(states, tuple) else (states,)
    pooled = out.mean(1 if m.rnn.batch_first else 0)
    return m.head(torch.cat([pooled, *(s.sum(0) for s in states)], -1))


def model_of(kind, forward=last_and_states, **options):
    rnn = build(kind, **options)
    out = (rnn.proj_size if kind.startswith("lstm") and rnn.proj_size else H) * (2 if rnn.bidirectional else 1)
    of_states = {"lstm": 2 * H, "lstm, projected": rnn.proj_size + H}.get(kind, H)
    return Lambda(forward, rnn=rnn, head=nn.Linear(out + of_states, C)).double()


def batches(sizes, batch_first=True):
    shape = (lambda n, t: (n, t, D)) if batch_first else (lambda n, t: (t, n, D))
    return [(torch.randn(shape(n, t), dtype=torch.float64), torch.randint(0, C, (n,))) for n, t in sizes]


@pytest.mark.parametrize(
    "sizes", [[(5, 3), (5, 3), (2, 3)], [(4, 4), (4, 4), (3, 4)], [(1, 4), (3, 5), (4, 7)]], ids=str
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_that_of_the_loop(kind, batch_first, sizes):
    model = model_of(kind, num_layers=2, bidirectional=kind != "gru", batch_first=batch_first)
    check(model, batches(sizes, batch_first), axes=(0 if batch_first else 1, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_without_biases_and_with_frozen_weights(kind):
    model = model_of(kind, bias=False, batch_first=True)
    model.rnn.weight_ih_l0.requires_grad_(False)
    check(model, batches([(4, 4), (3, 4)]))


class Packed(nn.Module):
    """Inputs [N, T, D + 1]; the last column holds the lengths."""

    def __init__(self, kind, enforce_sorted, embed, through, **options):
        super().__init__()
        self.inner = nn.Linear(D, D) if embed else nn.Identity()
        self.rnn = build(kind, **options)
        self.head = nn.Linear(2 * H if options.get("bidirectional") else H, C)
        self.sorted, self.through = enforce_sorted, through

    def forward(self, x):
        lengths = x[:, 0, -1].long().cpu()
        packed = pack_padded_sequence(self.inner(x[..., :-1]), lengths, batch_first=True, enforce_sorted=self.sorted)
        out, states = self.rnn(packed)
        assert isinstance(out, PackedSequence)
        h = states[0] if isinstance(states, tuple) else states
        if self.through == "outputs":
            out = pad_packed_sequence(out, batch_first=True)[0].sum(1)
            return self.head(torch.tanh(out))
        return self.head(torch.cat([*h], -1))


def with_lengths(lengths, t):
    x = torch.randn(len(lengths), t, D + 1, dtype=torch.float64)
    x[:, :, -1] = torch.tensor(lengths).unsqueeze(1)
    return x, torch.randint(0, C, (len(lengths),))


#: The second batch has as many rows as full length would give, so that its shape fits the first one's layout.
LENGTHS = {
    "sorted": (True, [[4, 4, 4], [6, 4, 2], [5, 1]]),
    "unsorted": (False, [[2, 5, 3, 5], [4, 4, 4, 4], [1, 6, 6, 3], [3, 5]]),
    "equal, then not": (False, [[4, 4, 4], [2, 6, 4], [3, 3, 6]]),
}


@pytest.mark.parametrize("through", ["outputs", "last state"])
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_fisher_of_packed_sequences(kind, lengths, embed, through):
    enforce_sorted, batches = lengths
    model = Packed(kind, enforce_sorted, embed, through, bidirectional=through == "outputs").double()
    check(model, [with_lengths(one, max(one)) for one in batches])
