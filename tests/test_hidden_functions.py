"""Functions that build a graph of their own, behind parameters that a pass freezes: they have no backward pass then."""

from __future__ import annotations

import pytest
import torch
from nested_cases import Checkpoint, KeptGraph, accumulated, diagonal, rows
from oracle import assert_close, fisher_loop
from torch import nn
from zoo import D, Lambda, classify, head

import wplfast
from wplfast.errors import WplfastError


class Given(torch.autograd.Function):
    """Takes the parameters as arguments, and returns their gradients."""

    @staticmethod
    def forward(ctx, x, run, *parameters):
        with torch.enable_grad():
            ctx.inputs = x.detach().requires_grad_(), *parameters
            ctx.y = run(ctx.inputs[0])
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, gradient):
        x, *others = torch.autograd.grad(ctx.y, ctx.inputs, gradient, retain_graph=True)
        return x, None, *others


class SetUp(torch.autograd.Function):
    """Keeps its graph with the function that it runs. Its forward pass has no context, and rebinds its argument."""

    @staticmethod
    def forward(run, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            run.graph = x, run(x)
        return run.graph[1].detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.x, ctx.y = inputs[0].graph

    @staticmethod
    def backward(ctx, gradient):
        ctx.x.grad = None
        ctx.y.backward(gradient, retain_graph=True)
        return None, ctx.x.grad


class Decorated(KeptGraph):
    """Another function stands before its forward pass."""

    forward = torch.amp.custom_fwd(KeptGraph.forward, device_type="cpu")


FORWARDS = {
    "own graph": lambda m, h: KeptGraph.apply(lambda z: torch.tanh(m.b(z)), h),
    "used outside too": lambda m, h: m.b(KeptGraph.apply(lambda z: torch.tanh(m.b(z)), h)),
    "checkpoint, used outside too": lambda m, h: m.b(Checkpoint.apply(lambda z: torch.tanh(m.b(z)), h)),
    "in another one": lambda m, h: KeptGraph.apply(lambda z: KeptGraph.apply(torch.tanh, m.b(z)), h),
    "of a derived matrix": lambda m, h: KeptGraph.apply(lambda z: torch.tanh(z @ (2 * m.b.weight) + m.b.bias), h),
    "context set up later": lambda m, h: SetUp.apply(lambda z: torch.tanh(m.b(z)), h),
    "decorated": lambda m, h: Decorated.apply(lambda z: torch.tanh(m.b(z)), h),
    "given": lambda m, h: Given.apply(h, lambda z: torch.tanh(m.b(z)), *m.b.parameters()),
}


def build(name):
    def forward(m, x):
        h = FORWARDS[name](m, torch.tanh(m.a(x)))
        return m.head(h)

    return Lambda(forward, a=nn.Linear(D, D), b=nn.Linear(D, D), head=head()).double()


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("part", ["b.", ("b.", "head")])
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_before_a_function_is_frozen_for_the_pass(name, part, verify):
    torch.manual_seed(0)
    model, data = build(name), rows([4, 3, 4])
    params = {n: p for n, p in model.named_parameters() if n.startswith(part)}
    expected = {n: f for n, f in fisher_loop(model, data, classify).items() if n in params}
    model.zero_grad()
    assert_close(diagonal(model, data, verify, params), expected, 1e-10, 1e-11)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    if name == "given":  # its output requires grad all the same
        assert_close(accumulated(model, data, verify, params), expected, 1e-10, 1e-11)
    else:
        with pytest.raises(WplfastError, match=r"'b.weight', 'b.bias' got no gradient in a Function|'b.weight' got no"):
            accumulated(model, data, verify, params)


def test_a_function_that_comes_in_a_later_batch():
    torch.manual_seed(1)
    model = build("own graph")
    with wplfast.FisherAccumulator(model, {n: p for n, p in model.named_parameters() if n[0] != "a"}) as acc:
        (x, y), *_ = rows([4])
        acc.backward(classify(model.head(model.b(torch.tanh(model.a(x)))), y))
        with pytest.raises(WplfastError, match="got no gradient in a Function"):
            acc.backward(classify(model(x), y))


def test_what_its_owner_froze_stays_so():
    torch.manual_seed(2)
    model, data = build("own graph"), rows([4])
    model.a.requires_grad_(False)
    fisher = diagonal(model, data, True)
    assert not fisher["b.weight"].any()  # as PyTorch leaves it
    assert fisher["head.weight"].any()
