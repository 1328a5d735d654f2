"""Models whose own code takes derivatives: in its forward pass, in Functions' backward passes, in hooks."""

from __future__ import annotations

import torch
from nested_cases import Checkpoint, KeptGraph
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import D, Lambda, head, par


class CheckpointOfParameters(torch.autograd.Function):
    """Asks for the gradients of the parameters that it was given: that of guided diffusion does."""

    @staticmethod
    def forward(ctx, run, x, *parameters):
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(y, [x, *ctx.parameters], gradient, allow_unused=True)


class WithParameters(torch.autograd.Function):
    """Recomputes, and is given the parameters beside the input."""

    @staticmethod
    def forward(ctx, run, parameters, x):
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)


class BackwardTo(WithParameters):
    """Names what gradients are to accumulate in."""

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient, inputs=[x, *ctx.parameters])
        return None, None, x.grad


class Reversible(torch.autograd.Function):
    """Reconstructs its inputs, then goes backward through f and g."""

    @staticmethod
    def forward(ctx, f, g, x):
        a, b = x.chunk(2, -1)
        with torch.no_grad():
            u = a + f(b)
            v = b + g(u)
        ctx.f, ctx.g = f, g
        y = torch.cat([u, v], -1)
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        u, v = ctx.saved_tensors[0].chunk(2, -1)
        of_u, of_v = gradient.chunk(2, -1)
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            of_g = ctx.g(u)
        of_g.backward(of_v)
        b = (v - of_g).detach().requires_grad_()
        with torch.enable_grad():
            of_f = ctx.f(b)
        of_f.backward(of_u + u.grad)
        return None, None, torch.cat([of_u + u.grad, of_v + b.grad], -1)


class Conjugate(WithParameters):
    """Accumulates into .grad itself."""

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        of_x, *found = torch.autograd.grad(y, [x, *ctx.parameters], gradient)
        for p, g in zip(ctx.parameters, found, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        return None, None, of_x


def block(m, h):
    return torch.tanh(m.b(h)) + m.pos


def reentrant(run, *inputs):
    return checkpoint(run, *inputs, use_reentrant=True)


def plain(run, *inputs):
    return checkpoint(run, *inputs, use_reentrant=False)


def tokens(x):
    return (x[:, :3] * 3).long().abs() % 7


CHECKPOINTS = {
    "one layer": lambda m, x: m.head(Checkpoint.apply(m.b, m.a(x))),
    "several outputs": lambda m, x: m.head(
        torch.stack(Checkpoint.apply(lambda h: (torch.tanh(m.b(h)), m.c(h) + m.pos), m.a(x))).prod(0)
    ),
    "several inputs": lambda m, x: m.head(
        Checkpoint.apply(lambda h, k: torch.tanh(m.b(h) * k) + k @ m.b.weight, m.a(x), m.c(x))
    ),
    "nested": lambda m, x: m.head(Checkpoint.apply(lambda h: m.c(Checkpoint.apply(lambda k: block(m, k), h)), m.a(x))),
    "inside a checkpoint": lambda m, x: m.head(plain(lambda h: Checkpoint.apply(m.b, torch.tanh(m.c(h))), m.a(x))),
    "inside a reentrant one": lambda m, x: m.head(
        reentrant(lambda h: Checkpoint.apply(m.b, torch.tanh(m.c(h))), m.a(x))
    ),
    "around a checkpoint": lambda m, x: m.head(
        Checkpoint.apply(lambda h: plain(lambda k: block(m, k), m.c(h)), m.a(x))
    ),
    "around a reentrant one": lambda m, x: m.head(
        Checkpoint.apply(lambda h: reentrant(lambda k: block(m, k), m.c(h)), m.a(x))
    ),
    "used outside too": lambda m, x: m.head(Checkpoint.apply(lambda h: block(m, h), torch.tanh(m.b(m.a(x))))),
    "twice": lambda m, x: m.head(Checkpoint.apply(m.b, torch.tanh(Checkpoint.apply(m.b, m.a(x))))),
    "reentrant": lambda m, x: m.head(reentrant(lambda h: block(m, h), torch.tanh(m.a(x)))),
    "reentrant, behind an embedding": lambda m, x: m.head(reentrant(lambda h: block(m, h), m.emb(tokens(x))).mean(1)),
    "reentrant, tokens inside": lambda m, x: m.head(
        reentrant(lambda t, h: torch.tanh(m.b(m.emb(t))) + h.unsqueeze(1), tokens(x), m.a(x)).mean(1)
    ),
    "reentrant, without gradient": lambda m, x: m.head(torch.tanh(m.a(reentrant(lambda h: block(m, h), x)))),
    "given parameters": lambda m, x: m.head(
        CheckpointOfParameters.apply(lambda h: block(m, h), m.a(x), *m.b.parameters(), m.pos)
    ),
    "given parameters, views of them inside": lambda m, x: m.head(
        CheckpointOfParameters.apply(lambda h: torch.tanh(h @ m.b.weight.t()) + m.pos, m.a(x), m.b.weight, m.pos)
    ),
    "given parameters with other uses": lambda m, x: m.head(
        m.b(CheckpointOfParameters.apply(lambda h: block(m, h), m.a(x), m.b.weight, m.b.bias, m.pos))
    ),
    "backward to inputs": lambda m, x: m.head(
        BackwardTo.apply(lambda h: torch.tanh(h @ m.b.weight.t() + m.pos), [m.b.weight, m.pos], m.a(x))
    ),
    "accumulates itself": lambda m, x: m.head(Conjugate.apply(m.b, list(m.b.parameters()), m.a(x))),
    "a graph of its own": lambda m, x: m.head(KeptGraph.apply(lambda h: block(m, h), m.a(x))),
    "reversible": lambda m, x: m.head(
        Reversible.apply(m.left, lambda u: torch.tanh(m.right(u)), Reversible.apply(m.right, m.left, m.a(x)))
    ),
}


def fixed_point(m, x, in_hook):
    """A deep equilibrium model: z = tanh(b(z)/4 + a(x)), its gradient from a linear system that a hook solves."""
    x = m.a(x)

    def step(z, given=x):
        return torch.tanh(m.b(z) / 4 + given)

    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(60):
            z = step(z)
    z = step(z)
    start = z.detach().clone().requires_grad_()
    after, given = None if in_hook else step(start), x.detach()

    def solve(gradient):
        with torch.enable_grad():
            once = step(start, given) if after is None else after
        found = gradient
        for _ in range(60):
            found = torch.autograd.grad(once, start, found, retain_graph=True)[0] + gradient
        return found

    if z.requires_grad:
        z.register_hook(solve)
    return m.head(z)


def attacked(m, x, by_backward):
    """An adversarial example, made in the forward pass."""
    start = x.detach().clone().requires_grad_()
    loss = torch.tanh(m.a(start)).square().sum()
    if by_backward:
        loss.backward()
        m.zero_grad()
        step = start.grad
    else:
        (step,) = torch.autograd.grad(loss, start)
    return m.head(torch.tanh(m.a(x + 0.1 * step.sign())))


def adapted(m, x, views):
    """First-order MAML: each sample is a task; its inner step is a constant to the outer loss."""
    outputs = []
    for task in x.split(1):
        weight = m.b.weight.t() * 1.5 if views else m.b.weight
        inner = torch.tanh(task @ weight + m.b.bias).square().sum()
        steps = torch.autograd.grad(inner, [weight, m.b.bias])
        weight, bias = weight - 0.1 * steps[0], m.b.bias - 0.1 * steps[1]
        outputs.append(m.head(torch.tanh(task @ weight + bias)))
    return torch.cat(outputs)


def adjoint(m, x):
    """An ordinary differential equation, whose Function integrates the gradients of its parameters backwards."""

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, start, *parameters):
            with torch.no_grad():
                states = [start]
                for _ in range(3):
                    states.append(states[-1] + 0.1 * torch.tanh(m.b(states[-1])))
            ctx.states, ctx.parameters = states, parameters
            return states[-1]

        @staticmethod
        def backward(ctx, gradient):
            total = [torch.zeros_like(p) for p in ctx.parameters]
            for state in reversed(ctx.states[:-1]):
                with torch.enable_grad():
                    state = state.detach().requires_grad_()
                    change = torch.tanh(m.b(state))
                    of_state, *found = torch.autograd.grad(change, (state, *ctx.parameters), 0.1 * gradient)
                gradient = gradient + of_state
                total = [t + f for t, f in zip(total, found, strict=True)]
            return gradient, *total

    return m.head(Solve.apply(m.a(x), *m.b.parameters()))


def observed(m, x, how):
    """A hook that takes derivatives along another graph of the same layers, without accumulating them."""
    other = torch.ones(3, D, dtype=x.dtype, requires_grad=True)
    hidden = torch.tanh(m.a(x))
    outputs = m.head(torch.tanh(m.b(hidden)))
    probe, total = torch.tanh(m.b(other)).square().sum(), outputs.sum()

    def hook(gradient):
        if how == "made in the forward pass":
            torch.autograd.grad(probe, other, retain_graph=True)
            return
        if how == "the model's own":
            torch.autograd.grad(total, hidden, gradient.sum(), retain_graph=True)
            return
        with torch.enable_grad():
            loss = torch.tanh(m.b(other)).square().sum()
        if how == "of inputs":
            torch.autograd.grad(loss, other)
        elif how == "of parameters":
            assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(m.b.parameters())))
        elif how == "backward to inputs":
            loss.backward(inputs=[other])

    if outputs.requires_grad:
        watched = outputs if how != "the model's own" else outputs.clone()
        watched.register_hook(hook)
        return watched
    return outputs


def penalised(m, x):
    """The gradient of a function of parameters alone, in the forward pass."""
    (step,) = torch.autograd.grad(m.pos.square().sum() + (2 * m.pos).sum(), m.pos)
    return m.head(torch.tanh(m.a(x)) * (1 + step.sum()))


def with_jacobian(m, x, vectorize):
    """A Jacobian in the forward pass."""
    jacobian = torch.autograd.functional.jacobian
    return m.head(torch.tanh(m.a(x) + jacobian(lambda z: torch.tanh(m.a(z)).sum(0), x, vectorize=vectorize).sum(0)))


def many_levels(m, x):
    """More levels than one thread of autograd's engine takes."""

    def nest(levels, h):
        return Checkpoint.apply(lambda k: nest(levels - 1, k), h) if levels else torch.tanh(m.b(h))

    return m.head(nest(65, m.a(x)))


DERIVATIVES = {
    "jacobian": lambda m, x: with_jacobian(m, x, vectorize=False),
    "jacobian, vectorized": lambda m, x: with_jacobian(m, x, vectorize=True),
    "many levels": many_levels,
    "fixed point": lambda m, x: fixed_point(m, x, in_hook=False),
    "fixed point, run again in the hook": lambda m, x: fixed_point(m, x, in_hook=True),
    "adversarial, grad": lambda m, x: attacked(m, x, by_backward=False),
    "adversarial, backward": lambda m, x: attacked(m, x, by_backward=True),
    "maml": lambda m, x: adapted(m, x, views=False),
    "maml, of what was computed from parameters": lambda m, x: adapted(m, x, views=True),
    "adjoint": adjoint,
    "of parameters alone": penalised,
    **{
        f"hook, {how}": (lambda m, x, how=how: observed(m, x, how))
        for how in (
            "of inputs", "of parameters", "backward to inputs", "made in the forward pass", "the model's own"
        )
    },
}  # fmt: skip


def build(forward):
    """A small model in float64."""
    children = {name: nn.Linear(D, D) for name in ("a", "b", "c")}
    halves = {name: nn.Linear(D // 2, D // 2) for name in ("left", "right")}
    return Lambda(forward, **children, **halves, emb=nn.Embedding(7, D), pos=par(D), head=head()).double().eval()
