"""Models whose own code takes derivatives: in its forward pass, in Functions' backward passes, in hooks."""

from __future__ import annotations

import warnings

import pytest
import torch
from nested_cases import Checkpoint, KeptGraph, accumulated, diagonal, rows
from oracle import assert_close, fisher_loop
from pairwise import pairwise
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import C, D, Lambda, classify, head, par

import wplfast
from wplfast.errors import CoupledSamplesError, WplfastError

SIZES = [[3, 3, 2], [1, 4, 4], [17, 2]]


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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("name", "sizes", "verify"),
    [*pairwise({**CHECKPOINTS, **DERIVATIVES}, SIZES, [True, False]), ("nested", [17, 17], True)],
    ids=str,
)
def test_derivatives_inside_of_the_model(name, sizes, verify):
    model, data = build({**CHECKPOINTS, **DERIVATIVES}[name]), rows(sizes)
    expected = fisher_loop(model, data, classify)
    model.zero_grad()
    assert_close(diagonal(model, data, verify), expected, 1e-10, 1e-11)
    assert_close(accumulated(model, data, verify), expected, 1e-10, 1e-11)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["one layer", "several outputs", "inside a reentrant one", "reentrant", "reversible"])
@pytest.mark.parametrize("verify", [True, False])
def test_all_before_a_checkpoint_is_frozen_for_the_pass(name, verify):
    """The checkpoint's inputs require no grad then, and PyTorch gives its parameters none."""
    model, data = build(CHECKPOINTS[name]), rows([5, 3])
    params = {n: p for n, p in model.named_parameters() if not n.startswith(("a.", "emb"))}
    expected = {n: f for n, f in fisher_loop(model, data, classify).items() if n in params}
    model.zero_grad()
    assert_close(diagonal(model, data, verify, params), expected, 1e-10, 1e-11)
    with pytest.raises(WplfastError, match=r"got no gradient in a Function \(a checkpoint\)"):
        accumulated(model, data, verify, params)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def foreign(in_hook):
    def forward(m, x):
        outputs = m.head(torch.tanh(m.b(torch.tanh(m.a(x)))))
        other = torch.ones(len(x), D, dtype=x.dtype)
        probe = m.b(other).square().sum()

        def hook(gradient):
            with torch.enable_grad():
                loss = m.b(other).square().sum() if in_hook else probe
            loss.backward(retain_graph=True)

        outputs.register_hook(hook)
        return outputs

    return forward


@pytest.mark.parametrize(
    ("sizes", "in_hook", "verify"), pairwise([[1], [5], [4, 4], [16], [17]], [True, False], [True, False]), ids=str
)
def test_a_hook_that_accumulates_something_else_is_an_error(in_hook, sizes, verify):
    for run in (diagonal, accumulated):
        with pytest.raises(WplfastError, match=r"'b\..*' gets a gradient .* that does not come from the losses"):
            run(build(foreign(in_hook)), rows(sizes), verify)


def test_a_hook_that_begins_to_accumulate_later_is_an_error():
    model, data = build(foreign(True)), rows([4, 4, 4])
    before = model._forward_function

    def forward(m, x):
        return m.head(torch.tanh(m.b(torch.tanh(m.a(x))))) if forward.calls < 2 else before(m, x)

    model._forward_function = forward
    forward.calls = 0
    with wplfast.FisherAccumulator(model) as acc:
        for x, y in data[:2]:
            acc.backward(classify(model(x), y))
            forward.calls += 1
        losses = classify(model(data[2][0]), data[2][1])
        with pytest.raises(WplfastError, match="backward"):
            acc.backward(losses)


@pytest.mark.parametrize("verify", [True, False])
def test_an_inner_step_on_the_whole_batch_couples(verify):
    def forward(m, x):
        (step,) = torch.autograd.grad(torch.tanh(m.b(x)).square().sum(), [m.b.weight])
        return m.head(torch.tanh(x @ (m.b.weight - 0.1 * step)))

    for sizes in ([5], [4], [1, 4]):
        for run in (diagonal, accumulated):
            with pytest.raises(CoupledSamplesError):
                run(build(forward), rows(sizes), verify)


def forces(m, x):
    x = x.detach().requires_grad_()
    return m.head(torch.autograd.grad(torch.tanh(m.a(x)).sum(), x, create_graph=True)[0])


def second_order(m, x):
    (step,) = torch.autograd.grad(torch.tanh(m.a(x)).sum(), [m.a.weight], create_graph=True)
    return m.head(x @ (m.a.weight - step))


@pytest.mark.parametrize("forward", [forces, second_order])
@pytest.mark.parametrize("verify", [True, False])
def test_second_derivatives_are_an_error(forward, verify):
    for run in (diagonal, accumulated):
        with pytest.raises(WplfastError, match="second derivative"):
            run(build(forward), rows([4]), verify)


def test_the_grad_of_parameters_is_an_error_in_the_forward_pass():
    def forward(m, x):
        torch.tanh(m.b(x)).sum().backward(inputs=list(m.b.parameters()))
        return m.head(x @ (m.b.weight - 0.1 * m.b.weight.grad))

    with pytest.raises(WplfastError, match=r"use torch\.autograd\.grad"):
        accumulated(build(forward), rows([4]), True)


def test_grad_in_a_pass_is_that_of_pytorch():
    """All that ``torch.autograd.grad`` can be asked for, of parameters, what is computed from them, and data."""

    def outputs(m, x):
        product = m.b.weight * 2
        view = product.t()
        return x, product, view, torch.tanh(x @ view + m.b.bias) @ product, product.square().sum(), m.pos.exp()

    def asked(m, x):
        x, product, view, y, size, unused = outputs(m, x)
        grad = torch.autograd.grad
        options, total = {"retain_graph": True, "allow_unused": True}, y.sum()
        found = [
            grad(y.sum(), [m.b.weight, x, product, view, m.b.bias, unused, m.pos], **options),
            grad([y, size], [m.b.weight, product, view], [torch.ones_like(y), torch.tensor(3.0).to(y)], **options),
            grad(size, m.b.weight, **options),
            grad([y], [m.pos], [y], retain_graph=True, materialize_grads=True),
            grad(unused.sum(), {"pos": m.pos}, retain_graph=True)["pos"],
        ]
        with torch.no_grad():
            found.append(grad(total, [m.b.weight], retain_graph=True))
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            grad(y.sum(), [m.pos], retain_graph=True)
        return found

    model, x = build(lambda m, x: None), torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    expected = asked(model, x)
    with wplfast.FisherAccumulator(model):
        found = asked(model, x)
    torch.testing.assert_close(found, expected)
    with wplfast.FisherAccumulator(model), pytest.raises(WplfastError, match="is_grads_batched"):
        torch.autograd.grad(model.b(x), [model.b.weight], torch.ones(2, 4, D).to(x), is_grads_batched=True)


def test_optimizers_in_hooks_sleep():
    """A hook that steps and clears .grad would hide a gradient that arrives past the taps."""
    model, data = build(CHECKPOINTS["given parameters"]), rows([4])
    expected = fisher_loop(model, data, classify)
    model.zero_grad()
    steps = []

    def step(p):
        steps.append(p)
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    assert_close(wplfast.fisher_diagonal(model, data, classify), expected, 1e-10, 1e-11)
    assert not steps
    model(data[0][0]).sum().backward()
    assert steps
    for handle in handles:
        handle.remove()


def test_order_inside_a_checkpoint_that_changes_from_batch_to_batch():
    """Nothing in the graph behind the losses tells of it."""

    def forward(m, x):
        def run(h, key):
            if bool((key >= 0).all()):
                return torch.tanh(m.b(h))
            order = key.argsort()
            return torch.tanh(m.b(h[order] * 1.0))[order.argsort()]

        return m.head(Checkpoint.apply(lambda h: run(h, x[:, 0]), m.a(x)))

    data = rows([5, 5, 5])
    data[0][0][:, 0].abs_()
    model = build(forward)
    expected = fisher_loop(model, data, classify)
    model.zero_grad()
    for verify in (True, False):
        assert_close(accumulated(model, data, verify), expected, 1e-10, 1e-11)


def test_a_fold_inside_a_checkpoint_that_changes_from_batch_to_batch():
    def forward(m, x):
        def run(h):
            n, t, d = h.shape
            if t % 2:
                return torch.tanh(m.b(h.transpose(0, 1).reshape(t * n, d))).view(t, n, d).transpose(0, 1)
            return torch.tanh(m.b(h.reshape(n * t, d))).view(n, t, d)

        return m.head(Checkpoint.apply(run, m.a(x)).mean(1))

    shapes = [(3, 4), (3, 3), (4, 4), (5, 3), (3, 3)]
    data = [(torch.randn(n, t, D, dtype=torch.float64), torch.randint(0, C, (n,))) for n, t in shapes]
    model = build(forward)
    expected = fisher_loop(model, data, classify)
    model.zero_grad()
    for verify in (True, False):
        assert_close(accumulated(model, data, verify), expected, 1e-10, 1e-11)


def test_nothing_warns():
    model, data = build(CHECKPOINTS["given parameters"]), rows([4, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wplfast.fisher_diagonal(model, data, classify)
