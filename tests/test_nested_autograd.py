"""Models whose own code takes derivatives, against the loop, and what is an error of theirs."""

from __future__ import annotations

import warnings

import pytest
import torch
from nested_cases import Checkpoint, accumulated, diagonal, rows
from nested_models import CHECKPOINTS, DERIVATIVES, build
from oracle import assert_close, fisher_loop
from pairwise import pairwise
from zoo import C, D, classify

import wplfast
from wplfast.capture import watched
from wplfast.errors import CoupledSamplesError, WplfastError

SIZES = [[3, 3, 2], [1, 4, 4], [17, 2]]


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


@pytest.fixture
def older_backward(monkeypatch):
    """Let ``backward`` look at no input's class, as that of PyTorch 2.10, and passes see it all the same."""

    def older(*args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            return watched.BACKWARD(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", watched.seen(older))


@pytest.mark.parametrize("form", [iter, list, lambda parameters: next(iter(parameters))], ids=["iter", "list", "one"])
def test_inputs_of_an_older_backward_come_in_any_form(form, older_backward):
    def forward(m, x):
        y = torch.tanh(m.b(x))
        torch.autograd.backward(y, torch.ones_like(y), inputs=form(m.b.parameters()))
        return m.head(y)

    with pytest.raises(WplfastError, match=r"use torch\.autograd\.grad"):
        accumulated(build(forward), rows([4]), True)
    model = build(forward)
    model(rows([4])[0][0])
    assert model.b.weight.grad is not None


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
        ]
        if torch.__version__ >= "2.13":  # earlier ones take no mappings
            found.append(grad(unused.sum(), {"pos": m.pos}, retain_graph=True)["pos"])
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
