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
from wplfast.capture.collect import squares

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
