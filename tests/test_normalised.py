"""Weights divided by their norm, or with their mean taken off: exact, and without a gradient for each sample."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn
from torch.nn.utils import parametrizations

import wplfast
from wplfast.capture.collect import derived, squares

D, H, C = 6, 5, 4


class Layer(nn.Module):
    """A linear layer with a weight that is computed from one."""

    def __init__(self, make, *shape):
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.randn(*shape or (H, D))), make
        self.inner, self.head = nn.Linear(D, D), nn.Linear((shape or (H,))[0], C)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(self.inner(x), self.make(self.weight))))


class Twice(Layer):
    """A layer whose weight serves two products."""

    def forward(self, x):
        weight = self.make(self.weight)
        return self.head(torch.tanh(F.linear(torch.tanh(F.linear(self.inner(x), weight)) @ weight, weight)))


class Conv(nn.Module):
    """A convolution with a weight that is computed from one."""

    def __init__(self, make, conv):
        super().__init__()
        self.conv, self.make, self.head = conv, make, nn.Linear(conv.out_channels, C)

    def forward(self, x):
        x = x.view(len(x), -1, 2, 6).expand(-1, 4, 2, 6) * torch.arange(1.0, 5).view(4, 1, 1)
        conv = self.conv
        if conv.transposed:
            y = F.conv_transpose2d(x, self.make(conv.weight), None, conv.stride, conv.padding, 1, conv.groups)
        else:
            y = F.conv2d(x, self.make(conv.weight), None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return self.head(torch.tanh(y).mean((2, 3)))


class Dora(nn.Module):
    """A low-rank update whose rows are normalised, with a length of their own."""

    def __init__(self, dim, rank):
        super().__init__()
        self.dim = dim
        self.base, self.up, self.down = nn.Linear(D, H), nn.Linear(rank, H, bias=False), nn.Linear(D, rank, bias=False)
        self.length, self.head = nn.Parameter(torch.rand(H, 1) + 0.5), nn.Linear(H, C)

    def forward(self, x):
        weight = self.base.weight + 0.5 * (self.up.weight @ self.down.weight)
        weight = self.length * (weight / weight.norm(dim=self.dim, keepdim=True))
        return self.head(torch.tanh(F.linear(x, weight, self.base.bias)))


class Table(nn.Module):
    """Rows of a normalised table."""

    def __init__(self, make):
        super().__init__()
        self.table, self.make, self.head = nn.Embedding(9, H), make, nn.Linear(H, C)

    def forward(self, x):
        tokens = (x * 10).long() % 9
        return self.head(torch.tanh(F.embedding(tokens, self.make(self.table.weight)).sum(-2)))


def normed(module, *args, **kwargs):
    return parametrizations.weight_norm(module, *args, **kwargs)


def standardised(w):
    dims = tuple(range(1, w.dim()))
    return (w - w.mean(dims, keepdim=True)) / (w.var(dims, keepdim=True, unbiased=False) + 1e-5).sqrt()


#: Weights of a linear layer, from one of theirs.
FORMS = {
    "normalize": lambda w: F.normalize(w, dim=1),
    "normalize of columns": lambda w: F.normalize(w, dim=0),
    "normalize, default": F.normalize,
    "over the norm": lambda w: w / w.norm(dim=1, keepdim=True),
    "over the norm, no dimension kept": lambda w: 3 * w / w.norm(dim=1).unsqueeze(1),
    "over the norm, dimension put back": lambda w: w / w.norm(dim=1)[:, None],
    "over the norm of columns, dimension put back": lambda w: w / w.norm(dim=0)[None],
    "over the norm, expanded": lambda w: w / w.norm(dim=1, keepdim=True).expand_as(w),
    "over the norm of all, expanded": lambda w: w / w.norm().expand(*w.shape),
    "over the norm of all": lambda w: w / w.norm(),
    "over linalg's norm": lambda w: w / torch.linalg.norm(w),
    "over linalg's norms": lambda w: w / torch.linalg.vector_norm(w, dim=1, keepdim=True),
    "over the largest singular value": lambda w: w / torch.linalg.matrix_norm(w, 2),
    "over a root": lambda w: w / w.pow(2).sum(1, keepdim=True).sqrt(),
    "by a reciprocal root": lambda w: w * (w.square().mean(1, keepdim=True) + 1e-6).rsqrt(),
    "over the mean size": lambda w: w / w.abs().mean(),
    "over the largest": lambda w: w / w.abs().amax(1, keepdim=True),
    "centred": lambda w: w - w.mean(1, keepdim=True),
    "centred, all": lambda w: (w - w.mean()) / w.std(),
    "standardised": standardised,
    "softmax": lambda w: torch.softmax(w, 1),
    "softmax of columns": lambda w: w.softmax(0),
    "logarithm of softmax": lambda w: F.log_softmax(w, dim=-1),
    "normalize of the transpose": lambda w: F.normalize(w.t(), dim=0).t(),
}
NOT_APART = {"normalize of the transpose", "softmax of columns"}  # another form; too little left
N_ROWS = 7


def data(*shape):
    return [(torch.rand(n, *shape, D), torch.randint(0, C, (n,))) for n in (N_ROWS, N_ROWS, 3)]


def classify(outputs, targets):
    outputs = outputs if outputs.dim() == 2 else outputs.sum(1)
    return F.cross_entropy(outputs, targets, reduction="none")


def check(model, batches, fast=True):
    """Compare with the loop, with weights and the mean gradient too."""
    model = model.double()
    batches = [(x.double(), y) for x, y in batches]
    slow = mock.Mock(side_effect=AssertionError("materialised")) if fast else squares._materialised
    with mock.patch.object(squares, "_materialised", slow):
        found = wplfast.fisher_diagonal(model, batches, classify)
        weighed = [(x, y, torch.rand(len(y)).double()) for x, y in batches]
        of_weights = wplfast.fisher_diagonal(model, weighed, classify, with_grad=True)
    assert_close(found, fisher_loop(model, batches, classify), 1e-9, 1e-11)
    names, parameters = zip(*model.named_parameters(), strict=True)
    total, plain, mass = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters], 0.0
    for x, y, weights in weighed:
        for n in range(len(y)):
            grads = torch.autograd.grad(classify(model(x[n : n + 1]), y[n : n + 1]).sum(), parameters)
            mass += float(weights[n])
            for i, g in enumerate(grads):
                total[i] += weights[n] * g.square()
                plain[i] += weights[n] * g
    assert_close(of_weights, {name: t / mass for name, t in zip(names, total, strict=True)}, 1e-9, 1e-11)
    assert_close(of_weights.mean_grad, {name: t / mass for name, t in zip(names, plain, strict=True)}, 1e-9, 1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (3,), (N_ROWS,)], ids=["rows", "T = 3", "T = N"])
def test_weights_of_a_linear_layer(form, shape):
    torch.manual_seed(0)
    check(Layer(FORMS[form]), data(*shape), form not in NOT_APART)


@pytest.mark.parametrize("form", ["normalize", "over the norm of all", "standardised"])
def test_a_weight_that_serves_several_products(form):
    torch.manual_seed(0)
    check(Twice(FORMS[form], H, D), data(), fast=False)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_of_a_linear_layer(dim):
    torch.manual_seed(0)
    model = nn.Sequential(normed(nn.Linear(D, H), dim=dim), nn.Tanh(), normed(nn.Linear(H, C), dim=dim))
    check(model, data(3))


CONVS = {
    "plain": lambda: nn.Conv2d(4, H, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False),
    "depthwise, strided": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
    "dilated": lambda: nn.Conv2d(4, H, (1, 3), dilation=(1, 2), bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, H, 2, stride=2, bias=False),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
}
OVER_ALL = {
    "weight norm": lambda w: torch._weight_norm(w, w.detach().norm(2, (1, 2, 3), keepdim=True) + 1, 0),
    "normalize": lambda w: F.normalize(w, dim=(1, 2, 3)),
    "over the norm of all": lambda w: w / w.norm(),
    "standardised": standardised,
}


@pytest.mark.parametrize("form", OVER_ALL)
@pytest.mark.parametrize("conv", CONVS)
def test_kernels_of_convolutions(conv, form):
    torch.manual_seed(0)
    check(Conv(OVER_ALL[form], CONVS[conv]()), data(2), fast=form != "weight norm")


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool], ids=str)
def test_kernels_with_masks(conv, dtype):
    torch.manual_seed(0)
    model = Conv(lambda w: model.mask * w, CONVS[conv]())
    model.register_buffer("mask", (model.conv.weight.detach() > 0).to(dtype))
    check(model, data(2))


def test_weight_norm_of_convolutions():
    torch.manual_seed(0)
    convs = [normed(nn.Conv1d(2, 4, 3, padding=1)), nn.Tanh(), normed(nn.ConvTranspose1d(4, 3, 2, stride=2))]
    check(nn.Sequential(*convs, nn.Flatten(), normed(nn.Linear(3 * 2 * D, C))), data(2))


@pytest.mark.parametrize("form", ["normalize", "over the norm of all", "over the mean size"])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one token", "three"])
def test_tables(form, shape):
    torch.manual_seed(0)
    check(Table(FORMS[form]), data(*shape))


@pytest.mark.parametrize("dim", [0, 1, (0, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_update_with_a_norm(dim, rank):
    torch.manual_seed(0)
    together = mock.Mock(side_effect=AssertionError("not told apart")) if rank == 1 else squares._together
    with mock.patch.object(squares, "_together", together):
        check(Dora(dim, rank), data(3), fast=False)


@pytest.mark.parametrize("apply", [parametrizations.spectral_norm, nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_norms_of_pytorch(apply):
    torch.manual_seed(0)
    model = nn.Sequential(apply(nn.Linear(D, H)), nn.Tanh(), apply(nn.Linear(H, C))).eval()
    check(model, data(3))


@pytest.mark.parametrize("apply", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_an_accumulator_knows_copies_of_buffers(apply):
    """Spectral norm copies its vectors in every call; there may be as many samples as they have entries."""
    torch.manual_seed(0)
    model = nn.Sequential(apply(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, C)).double().eval()
    batches = [(torch.randn(n, D).double(), torch.randint(0, C, (n,))) for n in (D, D, 3)]
    with wplfast.FisherAccumulator(model) as accumulator:
        for x, y in batches:
            accumulator.backward(classify(model(x), y))
        found = accumulator.result()
    assert_close(found, fisher_loop(model, batches, classify), 1e-9, 1e-11)
    assert not any("one by one" in rules for rules in found.report.rules.values())


def test_samples_that_equal_a_buffer_are_samples_all_the_same():
    torch.manual_seed(0)
    model = Layer(FORMS["normalize"]).double()
    batches = [(torch.ones(D, D).double(), torch.randint(0, C, (D,))) for _ in range(2)]
    model.register_buffer("ones", torch.ones(D, D).double())
    assert_close(wplfast.fisher_diagonal(model, batches, classify), fisher_loop(model, batches, classify), 1e-9, 1e-11)


def test_a_row_of_zeros_is_below_the_least_norm():
    torch.manual_seed(0)
    model = Layer(FORMS["normalize"])
    with torch.no_grad():
        model.weight[1] = 0
        model.weight[2] *= 1e-13
    check(model, data(), fast=False)


def test_what_cancels_is_materialised():
    """A gradient along the weight has nothing left: with one input, all of it."""
    torch.manual_seed(0)
    model = Layer(lambda w: F.normalize(w, dim=1), H, D)
    with torch.no_grad():
        model.weight[:] = torch.ones(D) + 1e-3 * torch.randn(H, D)
        model.inner.weight.zero_()
        model.inner.bias.fill_(1.0)
    batches = data()
    made = mock.Mock(side_effect=squares._materialised)
    with mock.patch.object(squares, "_materialised", made):
        single = wplfast.fisher_diagonal(copy.deepcopy(model), batches, classify)
    assert made.called
    check(copy.deepcopy(model), batches, fast=False)
    exact = fisher_loop(model.double(), [(x.double(), y) for x, y in batches], classify)
    assert float((single["weight"] - exact["weight"]).norm() / exact["weight"].norm()) < 1e-2
    assert (single["weight"] >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_single_precision(form):
    torch.manual_seed(0)
    model, batches = Layer(FORMS[form]), data(3)
    single = wplfast.fisher_diagonal(copy.deepcopy(model), batches, classify)
    exact = fisher_loop(model.double(), [(x.double(), y) for x, y in batches], classify)
    for name, found in single.items():
        assert float((found - exact[name]).norm() / exact[name].norm()) < 2e-6
        assert (found >= 0).all()


class Read(nn.Module):
    """A matrix that is contracted along both of its axes, or spread along both."""

    def __init__(self, make, read):
        super().__init__()
        self.weight, self.gain, self.head = (
            nn.Parameter(torch.randn(3, D)),
            nn.Parameter(torch.rand(3, 1)),
            nn.Linear(1, C),
        )
        self.make, self.read = make, read

    def forward(self, x):
        return self.head(
            torch.tanh(self.read(x, self.make(self.weight) * self.gain)).reshape(len(x), -1).sum(1, keepdim=True)
        )


READS = {
    "of all": lambda x, w: torch.einsum("nij,ij->n", x, w),
    "of all, by tensordot": lambda x, w: torch.tensordot(x, w, 2),
    "of all, for each channel": lambda x, w: torch.einsum(
        "ncij,ij->nc", x.unsqueeze(1) * x.new_tensor([1, 2.0]).view(2, 1, 1), w
    ),
    "spread": lambda x, w: torch.einsum("n,ij->nij", x.sum((1, 2)), w),
    "spread for each step": lambda x, w: torch.einsum("nt,ij->ntij", x.sum(2), w),
    "rows, and all": lambda x, w: torch.einsum("nij,ij->n", x, w) * F.linear(x, w).sum((1, 2)),
}


@pytest.mark.parametrize("form", ["normalize", "over the norm of all", "softmax", "standardised"])
@pytest.mark.parametrize("read", READS)
def test_matrices_that_are_read_as_a_whole(read, form):
    torch.manual_seed(0)
    check(Read(FORMS[form], READS[read]), data(3), fast=False)


@pytest.mark.parametrize("power", [-16, -13, 0, 12, 16])
def test_what_cancels_is_seen_at_any_scale(power):
    """Squares of squares leave the range of single precision."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(lambda w: w - w.mean(1, keepdim=True)))
    batches = [(1000 + torch.randn(16, D), torch.randint(0, C, (16,))) for _ in range(2)]
    model[0].inner = nn.Identity()
    single = wplfast.fisher_diagonal(model, batches, lambda o, t: classify(o / 1000, t) * 10.0**power)
    exact = fisher_loop(model, batches, lambda o, t: classify(o / 1000, t) * 10.0**power)
    found, expected = single["0.weight"].double() / 10.0 ** (2 * power), exact["0.weight"] / 10.0 ** (2 * power)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


REPEATED = {
    "orthonormalised": lambda w: 1.5 * w - 0.5 * (w @ w.t()) @ w,
    "centred and over the norm": lambda w: (w - w.mean(1, keepdim=True)) / w.norm(dim=1, keepdim=True),
    "residual": lambda w: w + 0.1 * torch.tanh(w),
    "gated": lambda w: w * torch.sigmoid(w),
    "scaled steps": lambda w: w + 0.3 * torch.tanh(2 * w),
}


@pytest.mark.parametrize("form", REPEATED)
def test_steps_that_enter_several_others_are_gone_through_once(form, monkeypatch):
    torch.manual_seed(0)
    steps, through = 12, derived._through
    calls = []
    monkeypatch.setattr(derived, "_through", lambda use, call: calls.append(call) or through(use, call))

    def make(w):
        for _ in range(steps):
            w = REPEATED[form](w / 3)
        return w

    model, batches = Layer(make).double(), [(x.double(), y) for x, y in data()[:1]]
    found = wplfast.fisher_diagonal(model, batches, classify)
    assert len(calls) < 1000, "the ways through the steps are more than 2^12"
    assert_close(found, fisher_loop(model, batches, classify), 1e-8, 1e-10)


def test_an_embedding_that_a_network_makes(monkeypatch):
    """Of many parameters: whether they can be told apart is asked of each step once."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.head = nn.Parameter(torch.randn(1, D)), nn.Linear(D, C)
            self.steps = nn.ParameterList([nn.Parameter(torch.randn(D, D) / D) for _ in range(16)])

        def forward(self, x):
            embedding = self.start
            for step in self.steps:
                embedding = embedding + torch.tanh(embedding @ step)
            return self.head(torch.tanh(self.head.weight.new_ones(D) * x * embedding))

    torch.manual_seed(0)
    model, batches = Made().double(), [(x.double(), y) for x, y in data()[:1]]
    through, calls = derived._through, []
    monkeypatch.setattr(derived, "_through", lambda use, call: calls.append(call) or through(use, call))
    assert_close(wplfast.fisher_diagonal(model, batches, classify), fisher_loop(model, batches, classify), 1e-8, 1e-10)
    assert len(calls) < 1000


class Gain(torch.autograd.Function):
    """A product that no interception sees."""

    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx, gradient):
        x, gain = ctx.saved_tensors
        return gradient * gain, (gradient * x).sum_to_size(gain.shape)


NOISE = {
    "normalize": lambda h: F.normalize(h, dim=1),
    "over the largest": lambda h: h / h.abs().amax(1, keepdim=True),
    "layer norm": lambda h: F.layer_norm(h, h.shape[1:], eps=0.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", NOISE)
def test_a_gradient_that_is_zero_but_for_rounding_is_no_coupling(norm, dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.inner, self.head = nn.Parameter(torch.tensor([1.5])), nn.Linear(D, H), nn.Linear(H, C)

        def forward(self, x):
            return self.head(NOISE[norm](Gain.apply(self.inner(x), self.gain)))

    torch.manual_seed(0)
    model, batches = Model().to(dtype), [(x.to(dtype), y) for x, y in data()]
    found = wplfast.fisher_diagonal(model, batches, classify)
    assert float(found["gain"]) < 1e-9
    assert "one by one" in found.report.rules["gain"]
