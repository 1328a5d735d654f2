"""What an ``autograd.Function`` makes of parameters (masks, signs), times other parameters: samples are not coupled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn

import wplfast
from wplfast.errors import CoupledSamplesError
from wplfast.losses import cross_entropy


class Mask(torch.autograd.Function):
    """1 where a score is positive, straight through."""

    @staticmethod
    def forward(ctx, score):
        return (score > 0).to(score.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class Sign(torch.autograd.Function):
    """The sign, straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class TimesMean(torch.autograd.Function):
    """A parameter times the mean of the batch's data."""

    @staticmethod
    def forward(ctx, parameter, x):
        ctx.mean = x.mean()
        return parameter * ctx.mean

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.mean, None


class Model(nn.Module):
    """Parameters, and a function that uses them."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run, self.head = run, nn.Linear(5, 3)
        self.w, self.score, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((5, 7), (5, 7), (5,)))

    def forward(self, x):
        return self.head(self.run(self, x).tanh())


FREE = {
    "mask": lambda m, x: F.linear(x, m.w * Mask.apply(m.score), m.b),
    "scaled sign": lambda m, x: F.linear(x, m.w.abs().mean(1, keepdim=True) * Sign.apply(m.w), m.b),
    "further on": lambda m, x: F.linear(x, (m.w * Mask.apply(m.score)).tanh() + m.w, m.b),
    "of what was computed": lambda m, x: F.linear(x, m.w * Mask.apply(m.score.abs() - 0.5), m.b),
    "two": lambda m, x: F.linear(x, m.w * Mask.apply(m.score) * Sign.apply(m.w), m.b),
    "product": lambda m, x: x @ (m.w * Mask.apply(m.score)).t() + m.b,
    "of a bias": lambda m, x: F.linear(x, m.w) + m.b * Mask.apply(m.score[:, 0]),
    "twice": lambda m, x: sum(F.linear(x * k, m.w * Mask.apply(m.score), m.b).relu() for k in (1, 2)),
}
COUPLED = {
    "data in the Function": lambda m, x: F.linear(x, m.w * TimesMean.apply(m.score, x), m.b),
    "data beside it": lambda m, x: F.linear(x, m.w * (Mask.apply(m.score) + x.mean()), m.b),
}


def batches(sizes):
    return [(torch.randn(n, 7).double(), torch.randint(3, (n,))) for n in sizes]


def accumulated(model, data):
    with wplfast.FisherAccumulator(model) as accumulator:
        for x, y in data:
            accumulator.backward(cross_entropy(model(x), y))
        return accumulator.result()


@pytest.mark.parametrize("sizes", [[5, 5, 3], [4, 4, 4], [7], [1, 3]], ids=str)
@pytest.mark.parametrize("form", FREE)
def test_masks_and_signs_of_parameters(form: str, sizes: list[int]) -> None:
    model, data = Model(FREE[form]).double(), batches(sizes)
    expected = fisher_loop(model, data, cross_entropy)
    for options in ({}, {"independent": True}):
        found = wplfast.fisher_diagonal(model, data, cross_entropy, **options)
        assert_close(found, expected, rtol=1e-9, model_rtol=1e-9)
        assert found.report.unchecked == ()


@pytest.mark.parametrize("form", FREE)
def test_an_accumulator_goes_by_sizes_and_says_so(form: str) -> None:
    model, data = Model(FREE[form]).double(), batches([4, 4, 3])
    found = accumulated(model, data)
    assert_close(found, fisher_loop(model, data, cross_entropy), rtol=1e-9, model_rtol=1e-9)
    assert "taken to be the same for all samples" in found.report.unchecked[0]


@pytest.mark.parametrize("sizes", [[5, 5, 3], [4, 4, 4], [7], [1, 3]], ids=str)
@pytest.mark.parametrize("form", COUPLED)
def test_statistics_of_the_batch_beside_them(form: str, sizes: list[int]) -> None:
    model, data = Model(COUPLED[form]).double(), batches(sizes)
    for way in (accumulated, lambda model, data: wplfast.fisher_diagonal(model, data, cross_entropy)):
        with pytest.raises(CoupledSamplesError, match="samples are coupled at mul"):
            way(model, data)
