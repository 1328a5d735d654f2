"""The penalty under ``torch.func``: vmap wherever it stands, forward over reverse, batches of incoming gradients."""

from __future__ import annotations

import pytest
import torch
from penalty_cases import anchored, expected, grads_of, move, random_fisher, trunk, values

import wplfast

ALPHA, L2 = 2.0, 0.3
MEMBERS = 4


@pytest.fixture
def columns():
    """Anchors and Fishers of two parameters, the first of which is transposed in memory."""
    torch.manual_seed(0)
    shapes = [(3, 2), (5,)]
    hat = [torch.randn(s, dtype=torch.float64) for s in shapes]
    hat[0] = hat[0].t().contiguous().t()
    return hat, [torch.rand(s, dtype=torch.float64) for s in shapes]


@pytest.fixture
def penalties(columns):
    """The penalty, and its definition."""
    hat, fisher = columns

    def definition(*theta):
        pairs = zip(theta, hat, fisher, strict=True)
        return sum(ALPHA / 2 * (f * (t - h) ** 2).sum() + L2 / 2 * (t**2).sum() for t, h, f in pairs)

    return lambda *theta: wplfast.functional.wpl_penalty(theta, hat, fisher, ALPHA, l2=L2), definition


def members() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(MEMBERS, 3, 2, dtype=torch.float64), torch.randn(MEMBERS, 5, dtype=torch.float64)


def same(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_an_ensemble_is_what_its_members_are(penalties, grad_enabled):
    penalty, definition = penalties
    thetas = members()
    with torch.set_grad_enabled(grad_enabled):
        same(torch.func.vmap(penalty)(*thetas), torch.func.vmap(definition)(*thetas))
        alone = torch.stack([penalty(*pair) for pair in zip(*thetas, strict=True)])
        same(torch.func.vmap(penalty)(*thetas), alone)
        last = tuple(t.movedim(0, -1) for t in thetas)
        same(torch.func.vmap(penalty, in_dims=-1)(*last), alone)


@pytest.mark.parametrize("argument", ["theta_hat", "fisher", "alpha", "l2"])
def test_any_argument_may_be_batched(columns, argument):
    hat, fisher = columns
    theta = [torch.randn_like(h) for h in hat]
    batch = members()
    many = {"theta_hat": batch, "fisher": tuple(t.abs() for t in batch)}.get(argument, torch.rand(MEMBERS).double())

    def penalty(part):
        given = {"theta_hat": hat, "fisher": fisher, "alpha": ALPHA, "l2": L2} | {argument: part}
        l2 = given.pop("l2")
        return wplfast.functional.wpl_penalty(theta, *given.values(), l2=l2)

    single = [tuple(t[i] for t in many) if isinstance(many, tuple) else many[i] for i in range(MEMBERS)]
    same(torch.func.vmap(penalty)(many), torch.stack([penalty(part) for part in single]))


TRANSFORMS = {
    "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1))),
    "vmap(vmap)": lambda f: torch.func.vmap(torch.func.vmap(f)),
    "vmap(hessian)": lambda f: torch.func.vmap(torch.func.hessian(f, argnums=(0, 1))),
    "grad(vmap)": lambda f: torch.func.grad(lambda *t: torch.func.vmap(f)(*t).square().sum(), argnums=(0, 1)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1)),
    "hessian": lambda f: torch.func.hessian(f, argnums=(0, 1)),
    "jacrev(jacrev)": lambda f: torch.func.jacrev(torch.func.jacrev(f, argnums=(0, 1)), argnums=(0, 1)),
    "jacfwd(jacfwd)": lambda f: torch.func.jacfwd(torch.func.jacfwd(f, argnums=(0, 1)), argnums=(0, 1)),
    "jacrev(jacfwd)": lambda f: torch.func.jacrev(torch.func.jacfwd(f, argnums=(0, 1)), argnums=(0, 1)),
    "jvp(grad)": lambda f: lambda *t: torch.func.jvp(torch.func.grad(f, argnums=(0, 1)), t, t),
    "jacobian": lambda f: lambda *t: torch.autograd.functional.jacobian(f, t, vectorize=True, strategy="forward-mode"),
    "hessian of autograd": lambda f: lambda *t: torch.autograd.functional.hessian(f, t, vectorize=True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore")
def test_a_transform_gives_what_it_gives_of_the_definition(penalties, name):
    thetas = members()
    if name == "vmap(vmap)":
        thetas = tuple(t.expand(2, *t.shape) * torch.tensor([1.0, 2.0]).view(-1, *[1] * t.dim()) for t in thetas)
    elif "vmap" not in name:
        thetas = thetas[0][0].t().contiguous().t(), thetas[1][0]
    found, wanted = (TRANSFORMS[name](function)(*thetas) for function in penalties)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_are_batched_in_a_wide_type(dtype):
    theta, hat = torch.randn(MEMBERS, 2000).to(dtype), torch.randn(2000).to(dtype)
    fisher = torch.rand(2000)

    def penalty(t):
        return wplfast.functional.wpl_penalty([t], [hat], [fisher], ALPHA)

    found = torch.func.vmap(penalty)(theta)
    wanted = (fisher.double() * (theta.double() - hat.double()) ** 2).sum(1) * ALPHA / 2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    gradient = torch.func.vmap(torch.func.grad(penalty))(theta)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, torch.stack([torch.func.grad(penalty)(t) for t in theta]))


def test_under_vmap_arguments_are_checked_as_ever():
    theta, zeros = torch.randn(MEMBERS, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"fisher\[0\] must be float32\[3\]"):
        torch.func.vmap(lambda t: wplfast.functional.wpl_penalty([t], [zeros], [torch.zeros(2)], 1.0))(theta)


@pytest.mark.parametrize("alpha", [ALPHA, {"": ALPHA, "0.": 5.0}], ids=["one alpha", "by prefix"])
def test_the_module_inside_a_vmap(alpha):
    module = trunk(torch.float64)
    wpl = anchored(module, anchors=2, alpha=alpha, l2=L2)
    factors = torch.arange(1.0, 4.0, dtype=torch.float64)
    same(torch.func.vmap(lambda x: x * wpl())(factors), factors * wpl().detach())
    handle = wpl.subset(["0.weight", "2.bias"])
    same(torch.func.vmap(lambda x: x * handle())(factors), factors * handle().detach())
    wanted = [6 * g for g in grads_of(wpl, module)]
    same(grads_of(lambda: torch.func.vmap(lambda x: x * wpl())(factors).sum(), module), wanted)


def test_the_module_under_per_sample_gradients():
    module, head = trunk(), torch.randn(2, 2)
    wpl = anchored(module)

    def loss(weight, x):
        return (weight @ x).square().sum() + wpl()

    x = torch.randn(MEMBERS, 2)
    found, value = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0))(head, x)
    torch.testing.assert_close(found, 2 * torch.einsum("ij,nj,nk->nik", head, x, x))
    torch.testing.assert_close(value, (x @ head.t()).square().sum(1) + wpl().detach())


# ---- several incoming gradients at once --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_several_incoming_gradients_at_once(dtype, how):
    module = trunk(dtype)
    module[0].weight.data = module[0].weight.data.t().contiguous().t()
    hats, fisher = values(module), random_fisher(module)
    wpl = wplfast.WeightPlasticityLoss(module, ALPHA, l2=L2)
    wpl.consolidate(fisher)
    move(module)
    parameters = list(module.parameters())
    task = sum(p.float().square().sum() for p in parameters)
    losses = torch.stack([task + wpl(), 3 * wpl()])
    rows = torch.eye(2, dtype=losses.dtype)
    if how == "vmap":
        found = torch.func.vmap(lambda row: torch.autograd.grad(losses, parameters, row, retain_graph=True))(rows)
    else:
        found = torch.autograd.grad(losses, parameters, rows, is_grads_batched=True)
    exact = torch.autograd.grad(expected(module, [(hats, fisher)], ALPHA, L2), parameters)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for p, both, one in zip(parameters, found, exact, strict=True):
        for got, want in zip(both.double(), (2 * p.double() + one.double(), 3 * one.double()), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_several_incoming_gradients_of_the_function_and_a_second_derivative(columns):
    hat, fisher = columns
    theta = [torch.randn_like(h).requires_grad_() for h in hat]
    value = wplfast.functional.wpl_penalty(theta, hat, fisher, ALPHA, l2=L2)
    found = torch.autograd.grad(value.expand(2), theta, torch.eye(2).double() * 3, True, is_grads_batched=True)
    (one,) = torch.autograd.grad(value, theta[1], create_graph=True)
    same(found[1], (3 * one).expand(2, -1))
    (hessian,) = torch.autograd.grad(one, theta[1], torch.eye(5).double(), is_grads_batched=True)
    same(hessian, torch.diag(ALPHA * fisher[1] + L2))


def test_a_float16_parameter_that_changed_is_an_error_for_batches_too():
    theta = torch.ones(3, dtype=torch.float16, requires_grad=True)
    wpl = wplfast.WeightPlasticityLoss({"w": theta})
    wpl.consolidate({"w": torch.ones(3)})
    value = wpl()
    with torch.no_grad():
        theta.add_(1)
    with pytest.raises(RuntimeError, match="changed between"):
        torch.autograd.grad(value.expand(2), theta, torch.eye(2), is_grads_batched=True)
