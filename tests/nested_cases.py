"""Functions with derivatives of their own, and Fishers of models that use them: what files of tests share."""

from __future__ import annotations

import torch
from zoo import C, D, classify

import wplfast


class Checkpoint(torch.autograd.Function):
    """Recomputes, and calls torch.autograd.backward: unsloth's, DeepSpeed's, fairscale's and Megatron's do."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return run(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        torch.autograd.backward(outputs if isinstance(outputs, tuple) else (outputs,), grads)
        return None, *(x.grad for x in inputs)


class KeptGraph(torch.autograd.Function):
    """Builds a graph of its own in the forward pass, and sends gradients through it, which accumulate in parameters."""

    @staticmethod
    def forward(ctx, run, x):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = run(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.x.grad = None
        ctx.y.backward(gradient, retain_graph=True)
        return None, ctx.x.grad


class Product(torch.autograd.Function):
    """x @ w, which nothing sees from outside."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w.t(), x.t() @ gradient


def rows(sizes):
    return [(torch.randn(n, D, dtype=torch.float64), torch.randint(0, C, (n,))) for n in sizes]


def diagonal(model, data, verify, params=None):
    return wplfast.fisher_diagonal(model, data, classify, params=params, verify=verify)


def accumulated(model, data, verify, params=None):
    with wplfast.FisherAccumulator(model, params, verify=verify) as acc:
        for x, y in data:
            acc.backward(classify(model(x), y))
    return acc.result()
