"""Every way in which a per-sample Fisher goes wrong, against the one-sample loop in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close, fisher_loop
from rehearsal import rehearsable
from zoo import CASES

import wplfast

NAMES = rehearsable(CASES, {"complex weights": "Fourier transforms", "sparse embedding": "sparse tensors"})


def batches(case, sizes):
    """Batches of the given (N, T), at least one of which is short."""
    return [(case.inputs(n, t), case.targets(n, t)) for n, t in sizes]


@pytest.mark.parametrize("sizes", [[(5, 4), (5, 4), (3, 4)], [(4, 4), (2, 4)], [(1, 4), (3, 4), (6, 6)]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fisher_is_that_of_the_loop(name, sizes):
    torch.manual_seed(hash_of(name))
    case = CASES[name]
    model = case.build()
    model(case.inputs(2, 4))  # materialise lazy modules
    model = model.double().eval()
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in batches(case, sizes)]
    fisher = wplfast.fisher_diagonal(model, data, case.loss)
    assert_close(fisher, fisher_loop(model, data, case.loss, axes=case.axes), rtol=1e-11, model_rtol=1e-12)
    if case.rules:
        assert any(case.rules in rules for rules in fisher.report.rules.values()), fisher.report.rules


#: One batch cannot tell an accumulator that these do not depend on the samples; fisher_diagonal runs one alone.
UNDECIDED = {"in place on a fresh tensor"}


@pytest.mark.parametrize("sizes", [[(5, 4), (3, 4)], [(4, 4), (2, 4)]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_in_a_loop_of_ones_own(name, sizes):
    torch.manual_seed(hash_of(name))
    case = CASES[name]
    model = case.build()
    model(case.inputs(2, 4))
    model = model.double().eval()
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in batches(case, sizes)]
    with wplfast.FisherAccumulator(model, independent=True if name in UNDECIDED else None) as acc:
        for x, y in data:
            acc.backward(case.loss(model(x), y))
    assert_close(acc.result(), fisher_loop(model, data, case.loss, axes=case.axes), rtol=1e-11, model_rtol=1e-12)


@pytest.mark.parametrize("name", sorted(UNDECIDED))
def test_what_one_batch_cannot_tell_is_an_error(name):
    torch.manual_seed(hash_of(name))
    case = CASES[name]
    model, (x, y) = case.build().eval(), (case.inputs(4, 4), case.targets(4, 4))
    with (
        wplfast.FisherAccumulator(model) as acc,
        pytest.raises(wplfast.errors.CoupledSamplesError, match="independent=True"),
    ):
        acc.backward(case.loss(model(x), y))


def hash_of(name):
    """A seed that does not change between runs."""
    return sum(map(ord, name))


def test_batch_norm_of_one_sample_with_gradients_of_other_strides():
    """PyTorch's own gradient of its weight and bias is wrong there (2.13, CPU): it must not be what decides."""

    class Places(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = torch.nn.BatchNorm2d(16), torch.nn.Linear(16, 3)

        def forward(self, x):
            return torch.tanh(self.head(self.norm(x).flatten(2).transpose(1, 2).tanh())).sum(1)

    model = Places().double().eval()
    model.norm.running_mean.normal_()
    data = [(torch.randn(1, 16, 8, 8).double(), torch.tensor([2]))]
    twice = [(x.repeat(2, 1, 1, 1), y.repeat(2)) for x, y in data]
    loss = wplfast.losses.cross_entropy
    found, expected = (wplfast.fisher_diagonal(model, given, loss) for given in (data, twice))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1]], ids=str)
def test_what_lies_below_batch_norm_of_one_sample(sizes, is_frozen):
    """PyTorch errs at the strides of tokens made of an image, if these are not as in an ordinary backward pass."""

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.tokens = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return torch.tanh(self.tokens(self.norm(self.stem(x)).flatten(2).transpose(1, 2))).mean(1)

    model, loss = Tokens().double().eval(), wplfast.losses.cross_entropy
    model.norm.requires_grad_(not is_frozen)
    x, y = torch.randn(sum(sizes), 3, 8, 8).double(), torch.randint(3, (sum(sizes),))
    found = wplfast.fisher_diagonal(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), loss)
    whole = wplfast.fisher_diagonal(model, [(x, y)], loss)
    assert_close(found, fisher_loop(model, [(x, y)], loss), rtol=1e-10, model_rtol=1e-10)
    assert_close(whole, {name: f.double() for name, f in found.items()}, rtol=1e-10, model_rtol=1e-10)


@pytest.mark.parametrize("kind", ["all", "no bias", "frozen bias"])
def test_group_norm_of_channels_last(kind):
    """PyTorch's backward pass dies there if the input's gradient is not asked for (2.13, CPU)."""

    class Norm(torch.nn.GroupNorm):
        def forward(self, x):
            return torch.nn.functional.group_norm(x, 4, self.weight, None if kind == "no bias" else self.bias)

    parts = [torch.nn.Conv2d(3, 8, 3), Norm(4, 8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 3)]
    model, loss = torch.nn.Sequential(*parts).double(), wplfast.losses.cross_entropy
    model[1].bias.requires_grad_(kind == "all")
    x, y = torch.randn(4, 3, 8, 8).double().to(memory_format=torch.channels_last), torch.randint(3, (4,))
    assert_close(wplfast.fisher_diagonal(model, [(x, y)], loss), fisher_loop(model, [(x, y)], loss), 1e-10, 1e-10)
