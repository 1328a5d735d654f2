"""Derivatives, inference mode, alpha, ``torch.compile``: the contract sentence by sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from pairwise import pairwise
from penalty_cases import STALE, anchored, expected, grads_of, move, needs_cpp, plain, random_fisher, trunk
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import wplfast

# ---- derivatives -------------------------------------------------------------------------------------------


def penalty_of(hat, fisher, alpha=1.0, l2=0.0):
    return lambda *theta: wplfast.functional.wpl_penalty(theta, hat, fisher, alpha, l2=l2)


def test_second_derivatives_of_several_tensors():
    shapes = [(7, 5), (7,), (3, 7, 2), (), (2, 2)]
    theta, hat = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    penalty = penalty_of(hat, [torch.rand(s, dtype=torch.float64) for s in shapes], 2.0, 0.3)
    followed = [t.clone().requires_grad_() for t in theta]
    assert torch.autograd.gradcheck(penalty, followed)
    assert torch.autograd.gradgradcheck(penalty, followed)
    (wanted,) = torch.autograd.grad(penalty(*followed), followed[0])
    torch.testing.assert_close(torch.func.grad(penalty)(*theta), wanted)


def test_torch_func_grad_and_twice():
    theta, hat, fisher = torch.randn(6), torch.randn(6), torch.rand(6)
    penalty, gradient = penalty_of([hat], [fisher], 3.0, 0.5), 3 * fisher * (theta - hat) + 0.5 * theta
    torch.testing.assert_close(torch.func.grad(penalty)(theta), gradient)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(penalty))(theta), torch.diag(3 * fisher + 0.5))
    _, product = torch.func.vjp(penalty, theta)
    torch.testing.assert_close(product(torch.tensor(2.0))[0], 2 * gradient)


@needs_cpp  # the reference gives dual numbers their due, without meaning to
@pytest.mark.parametrize("how", ["jvp", "dual"])
def test_a_forward_derivative_is_right_or_an_error(how):
    theta, penalty = torch.randn(6), penalty_of([torch.zeros(6)], [torch.ones(6)])
    try:
        if how == "jvp":
            _, tangent = torch.func.jvp(penalty, (theta,), (torch.ones(6),))
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(theta, torch.ones(6))
                tangent = torch.autograd.forward_ad.unpack_dual(penalty(dual)).tangent
    except (NotImplementedError, RuntimeError):
        return
    torch.testing.assert_close(tangent, theta.sum())


def test_a_second_derivative_of_the_module():
    module = trunk(torch.float64)
    wpl = anchored(module, anchors=2, l2=0.25)
    grads = torch.autograd.grad(wpl(), list(module.parameters()), create_graph=True)
    seconds = torch.autograd.grad(sum(g.sum() for g in grads), list(module.parameters()))
    for name, second in zip(wpl.fisher, seconds, strict=True):
        torch.testing.assert_close(second, 2.0 * wpl.fisher[name] + 0.25)


CHANGES = {
    "alpha": lambda wpl, fisher: setattr(wpl, "alpha", 5.0),
    "merge": lambda wpl, fisher: wpl.consolidate(fisher),
    "replace": lambda wpl, fisher: wpl.consolidate(fisher, anchor="replace"),
    "update": lambda wpl, fisher: wpl.update(fisher),
    "reset": lambda wpl, fisher: wpl.reset(),
    "rebind": lambda wpl, fisher: wpl.rebind(trunk()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_first_derivative_belongs_to_its_evaluation_and_a_second_one_after_a_change_is_an_error(change):
    module = trunk()
    wpl = anchored(module)
    wanted, value, fisher = grads_of(wpl, module), wpl(), random_fisher(module)
    CHANGES[change](wpl, fisher)
    if change in ("alpha", "merge", "replace", "update"):
        with pytest.raises(RuntimeError, match="changed between"):
            torch.autograd.grad(value, list(module.parameters()), create_graph=True)
    assert all(map(torch.equal, grads_of(lambda: value, module), wanted))


def test_checkpointing_and_offloading():
    module = trunk()
    wpl = anchored(module)
    wanted = grads_of(wpl, module)
    x = torch.ones(1, requires_grad=True)
    found = grads_of(lambda: checkpoint(lambda x: wpl() * x, x, use_reentrant=False), module)
    assert all(map(torch.equal, found, wanted))
    with torch.autograd.graph.save_on_cpu():
        value = wpl()
    assert all(map(torch.equal, grads_of(lambda: value, module), wanted))


# ---- inference mode ----------------------------------------------------------------------------------------


def test_values_in_inference_mode():
    module = trunk()
    wpl = anchored(module)
    value, exchanged = wpl().item(), module[0].weight.detach().clone()
    with torch.inference_mode():
        assert wpl().item() == value
        module[0].weight.data = exchanged
        assert wpl().item() == value
        wpl.consolidate(random_fisher(module))
    wpl().backward()
    wpl.consolidate(random_fisher(module))
    wpl.alpha = 1.0


@pytest.mark.parametrize("what", ["init", "rebind", "deepcopy", "alpha"])
def test_made_in_inference_mode_used_outside(what):
    module = trunk()
    wpl = anchored(module)
    with torch.inference_mode():
        if what == "init":
            wpl = wplfast.WeightPlasticityLoss(module)
        elif what == "rebind":
            wpl.rebind(module)
        elif what == "deepcopy":
            wpl = copy.deepcopy(wpl)
        else:
            wpl.alpha = {"": 3.0}
    wpl.alpha = {"": 2.0} if what == "alpha" else 2.0
    wpl.consolidate(random_fisher(module))
    wpl().backward()


# ---- torch.compile and the operators -----------------------------------------------------------------------


def test_a_compiled_value_is_one_graph_whatever_alpha_is():
    torch._dynamo.reset()
    module, graphs = trunk(), []
    wpl = anchored(module, l2=0.1)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda: wpl() * 2, fullgraph=True, backend=backend)
    for alpha in (3.0, 5.0, torch.tensor(0.25)):
        wpl.alpha = alpha
        exact = expected(module, [(wpl.theta_hat, wpl.fisher)], float(alpha), 0.1)
        assert double().item() == pytest.approx(2 * exact.item(), rel=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize(("kind", "rule"), [("all", "merge"), ("active", "replace"), ("subset", "update")])
def test_a_compiled_training_step(kind, rule):
    torch._dynamo.reset()
    module = trunk()
    names = ["0.weight", "2.bias"]
    wpl = anchored(module, anchors=2, l2=0.1)
    handle = wpl.subset(names)
    penalty = {"all": wpl, "active": lambda: wpl(active=names), "subset": handle}[kind]
    penalty()
    x, graphs = torch.randn(4, 7, 5), []
    compiler = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return compiler(graph, inputs)

    def loss() -> Tensor:
        return module(x).square().mean() + 3 * penalty()

    step = torch.compile(loss, fullgraph=True, backend=backend)

    def check() -> None:
        move(module)
        for got, want in zip(grads_of(step, module), grads_of(loss, module), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step(), loss())

    check()
    first = len(graphs)
    for alpha in (3.0, torch.tensor(0.25)):
        wpl.alpha = alpha
        check()
    assert len(graphs) == first
    for _ in range(2):  # at once after it: no evaluation in between
        CHANGES[rule](wpl, random_fisher(module))
        check()


def test_a_compiled_add_grad():
    torch._dynamo.reset()
    module = trunk()
    wpl = anchored(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    expected = [1 + g for g in grads_of(wpl, module)]
    value = torch.compile(lambda: wpl.add_grad_(), fullgraph=True, backend="aot_eager")()
    assert value.item() == pytest.approx(plain(module, wpl).item(), rel=1e-6)
    for p, e in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_a_compiled_step_of_changed_parameters_is_never_wrong():
    for change in ("float64", "p.data", "load_state_dict"):
        torch._dynamo.reset()
        module = trunk()
        wpl = anchored(module)
        step = torch.compile(lambda: wpl(), fullgraph=True, backend="aot_eager")  # noqa: B023
        step()
        STALE[change](module)
        move(module, 0.5)
        try:
            value = step()
        except Exception as error:  # dynamo wraps it
            assert "theta_hat" in str(error)  # noqa: PT017
            value = None
        if value is not None:
            assert value.item() == pytest.approx(wpl().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "fisher_dtype", "one_alpha", "offsets"),
    pairwise([torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16], [True, False], [True, False]),
    ids=str,
)
def test_opcheck(dtype, fisher_dtype, one_alpha, offsets):
    shapes = [(5, 3), (), (0,), (17,)]
    theta, hat = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
    fisher, offset = [torch.rand(s).to(fisher_dtype) for s in shapes], [torch.randn(s) for s in shapes]
    ops = torch.ops.wplfast
    alpha = torch.tensor(2.0).double() if one_alpha else torch.rand(4).double()
    columns = (theta, hat, offset if offsets else [], fisher, alpha, torch.tensor(0.1).double())
    torch.library.opcheck(ops.penalty.default, columns)
    torch.library.opcheck(ops.penalty_with_grad.default, columns)
    grads = [torch.randn(s).to(dtype) for s in shapes]
    torch.library.opcheck(ops.penalty_add_grad_.default, (grads, *columns, torch.tensor(0.5).double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_scaling(dtype):
    ops = torch.ops.wplfast
    for factor in (1.0, 3.0):
        torch.library.opcheck(ops.scale_unless_one_.default, (torch.randn(33).to(dtype), torch.tensor(factor)))
