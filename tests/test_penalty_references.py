"""Anchors, parameters that change under a penalty, and their ``.grad``: the contract sentence by sentence."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from penalty_cases import STALE, anchored, grads_of, move, needs_cpp, plain, random_fisher, run_python, set_to, trunk
from torch import Tensor, nn

import wplfast
from wplfast.errors import NameMismatchError, NonFiniteError, WplfastError

# ---- anchors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_parameters_are_no_anchor(bad):
    module = trunk()
    wpl = anchored(module)
    with torch.no_grad():
        module[0].bias[1] = bad
    with pytest.raises(NonFiniteError, match=r"0\.bias"):
        wpl.consolidate(random_fisher(module))


@pytest.mark.parametrize("names", [[], ()])
def test_an_empty_active_set_is_zero_or_a_clear_error(names):
    wpl = anchored(trunk())
    try:
        assert wpl(active=names).item() == 0
    except (ValueError, NameMismatchError) as error:
        assert "active" in str(error)  # noqa: PT017


def drifting(dtype, steps, fisher_dtype=None, n=4000):
    """K consolidations along a random walk; return value and gradient with their float64 counterparts."""
    theta = nn.Parameter(torch.randn(n).to(dtype))
    wpl = wplfast.WeightPlasticityLoss({"theta": theta}, alpha=1.0, fisher_dtype=fisher_dtype)
    anchors = []
    for _ in range(steps):
        fisher = torch.rand(n) ** 4
        fisher[::10] = 0
        anchors.append((theta.detach().double(), fisher.double()))
        wpl.consolidate({"theta": fisher})
        with torch.no_grad():
            theta.add_(0.02 * torch.randn(n))
    p = theta.detach().double()
    exact = sum((f * (p - hat) ** 2).sum() for hat, f in anchors) / 2
    gradient = sum(f * (p - hat) for hat, f in anchors)
    value = wpl()
    value.backward()
    assert theta.grad[::10].abs().max() == 0
    wpl.alpha = 0.5
    assert wpl.n_anchors == steps
    return (
        abs(value.item() - exact.item()) / exact.item(),
        ((theta.grad.double() - gradient).norm() / gradient.norm()).item(),
        ((theta.grad.double() - gradient.to(dtype).double()).norm() / gradient.norm()).item(),
    )


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fifty_anchors_keep_their_accuracy(dtype, steps):
    value, gradient, beyond_storage = drifting(dtype, steps)
    assert value <= 1e-6
    if dtype == torch.float32:
        assert gradient <= 1e-5
    else:  # a gradient in 8 or 11 bits is off by its rounding; what is more than that is ours
        assert beyond_storage <= torch.finfo(dtype).eps / 16


@pytest.mark.parametrize(("steps", "value_bound", "gradient_bound"), [(1, 5e-4, 3e-3), (50, 1e-2, 3e-2)])
def test_a_fisher_in_bfloat16(steps, value_bound, gradient_bound):
    """One rounding is 2^-8 at most, and averages out in the value; fifty of them pile up where F has grown large."""
    value, gradient, _ = drifting(torch.float32, steps, torch.bfloat16)
    assert value <= value_bound
    assert gradient <= gradient_bound


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 4_300_001), (torch.float64, 2_200_003)], ids=str)
def test_gradients_beyond_the_cache(dtype, n):
    """From 16 MiB on they are written around the cache; odd sizes, so that vectors end in the middle."""
    thetas = [nn.Parameter(torch.randn(size).to(dtype)) for size in (3, n, 0, 17, 5001)]
    wpl = wplfast.WeightPlasticityLoss([(f"p{i}", p) for i, p in enumerate(thetas)], alpha=2.0, l2=0.5)
    wpl.consolidate({f"p{i}": torch.rand(p.shape) for i, p in enumerate(thetas)})
    hats = [p.detach().clone() for p in thetas]
    with torch.no_grad():
        for p in thetas:
            p.add_(torch.randn_like(p))
    for _ in range(2):  # into fresh memory, and into the same again
        found = torch.autograd.grad(wpl(), thetas)
        for i, (g, p, hat) in enumerate(zip(found, thetas, hats, strict=True)):
            torch.testing.assert_close(
                g, (2 * wpl.fisher[f"p{i}"] * (p - hat) + 0.5 * p).detach(), rtol=1e-5, atol=1e-6
            )
        del found


def test_a_running_fisher_in_bfloat16_arrives():
    theta = nn.Parameter(torch.zeros(4))
    wpl = wplfast.WeightPlasticityLoss({"theta": theta}, fisher_dtype=torch.bfloat16)
    wpl.consolidate({"theta": torch.ones(4)})
    with pytest.raises(ValueError, match="would not move far"):
        wpl.update({"theta": torch.full((4,), 0.7)}, rate=0.01)
    for _ in range(300):
        wpl.update({"theta": torch.full((4,), 0.7)}, rate=0.1)
    assert float(wpl.fisher["theta"][0]) == pytest.approx(0.7, rel=0.05)


# ---- before the first anchor -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_l2_term_alone_is_wide(dtype):
    theta = nn.Parameter(torch.full((1 << 18,), 0.9, dtype=dtype))
    value = wplfast.WeightPlasticityLoss({"theta": theta}, l2=1.0)()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float((theta.double() ** 2).sum()) / 2, rel=1e-6)


# ---- parameters that change under its feet -----------------------------------------------------------------


@pytest.mark.parametrize("change", STALE.values(), ids=STALE)
@pytest.mark.parametrize("names", [None, ["2.weight", "0.bias"]], ids=["all", "active"])
def test_exchanged_memory_is_followed_on_every_path(change, names):
    module = trunk()
    wpl = anchored(module)
    wpl(active=names)
    wpl.add_grad_(active=names)
    module.zero_grad()
    change(module)
    gc.collect()
    move(module, 0.5)
    dtype = module[0].weight.dtype
    chosen = (
        dict(module.named_parameters()) if names is None else {n: dict(module.named_parameters())[n] for n in names}
    )
    hats = {n: h.to(dtype) for n, h in wpl.theta_hat.items()}
    exact = sum((wpl.fisher[n].double() * (p.double() - hats[n].double()) ** 2).sum() for n, p in chosen.items())
    value = wpl(active=names)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    value.backward()
    by_autograd = {n: p.grad.clone() for n, p in chosen.items()}
    module.zero_grad()
    wpl.add_grad_(active=names)
    for name, p in chosen.items():
        assert torch.equal(p.grad, by_autograd[name])
        assert p.grad.abs().max() > 0


def test_swapped_tensors_are_followed():
    module = trunk()
    wpl = anchored(module)
    wpl.add_grad_()
    module.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    move(module)
    assert wpl().dtype == torch.float64
    assert wpl().item() == pytest.approx(plain(module, wpl).item(), rel=1e-6)


REPLACE = {
    "assign": lambda m: m.load_state_dict({n: p + 1 for n, p in m.state_dict().items()}, assign=True),
    "setattr": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() + 1)),
    "to_empty": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("replace", REPLACE.values(), ids=REPLACE)
def test_replaced_parameters_are_followed_or_an_error(replace):
    """A penalty that was given the module could see it; one given tensors cannot."""
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    wpl.consolidate(random_fisher(module))
    replace(module)
    try:
        value = wpl()
    except WplfastError:
        return
    assert value.device.type == "meta" or value.item() > 0


def test_rebind_follows_replaced_parameters():
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    wpl.consolidate(random_fisher(module))
    REPLACE["assign"](module)
    wpl.rebind(module)
    assert wpl().item() == pytest.approx(plain(module, wpl, 1.0).item(), rel=1e-5)


@needs_cpp
@pytest.mark.parametrize(
    "call",
    [
        pytest.param("with torch.device('meta'): wpl()"),
        pytest.param(
            "wpl.add_grad_()\n    with torch.device('meta'): wpl.add_grad_()",
        ),
        pytest.param(
            "theta.untyped_storage().resize_(0); wpl()",
        ),
        "theta.data = torch.empty(0); wpl()",
        "wpl(); theta.grad = torch.zeros(9); theta.grad.untyped_storage().resize_(0); wpl.add_grad_()",
    ],
)
def test_nothing_crashes_the_process(call):
    """A right value and a Python exception are both fine; a signal is not."""
    code = f"""
import torch, wplfast
theta = torch.zeros(9, requires_grad=True)
wpl = wplfast.WeightPlasticityLoss({{"theta": theta}})
wpl.consolidate({{"theta": torch.ones(9)}})
try:
    {call}
except Exception as error:
    print(type(error).__name__, error)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_parameters_on_meta():
    """No numbers, no anchors: an error that says so."""
    wpl = wplfast.WeightPlasticityLoss(nn.Linear(3, 2, device="meta"))
    with pytest.raises((NotImplementedError, ValueError), match="meta"):
        wpl.consolidate({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert wpl.n_anchors == 0


def test_a_plain_subclass_of_tensor():
    class Marked(Tensor):
        pass

    theta = torch.zeros(4).as_subclass(Marked).requires_grad_()
    wpl = wplfast.WeightPlasticityLoss({"theta": theta})
    wpl.consolidate({"theta": torch.ones(4)})
    set_to(theta, 2.0)
    assert wpl().item() == 8.0
    wpl().backward()
    wpl.add_grad_()
    assert theta.grad.tolist() == [4.0] * 4


# ---- .grad -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [0, 1, 2, 3])
def test_add_grad_allocates_what_is_missing(present):
    module = trunk()
    wpl = anchored(module)
    expected = grads_of(wpl, module)
    starts = []
    for i, p in enumerate(module.parameters()):
        p.grad = torch.randn_like(p) if i < present else None
        starts.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    owned = [p.grad for p in module.parameters()]
    wpl.add_grad_()
    for p, grad, start, e in zip(module.parameters(), owned, starts, expected, strict=True):
        assert grad is None or p.grad is grad
        torch.testing.assert_close(p.grad, start + e)


@pytest.mark.not_rehearsed("sparse tensors")
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_bad_grad_changes_no_other(dtypes):
    first, second = (nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes)
    wpl = wplfast.WeightPlasticityLoss({"first": first, "second": second})
    wpl.consolidate({"first": torch.ones(3), "second": torch.ones(3)})
    set_to(first, 1.0)
    second.grad = torch.zeros(3, dtype=dtypes[1]).to_sparse()
    with pytest.raises(ValueError, match="grad must be dense"):
        wpl.add_grad_()
    assert first.grad is None


@needs_cpp
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_gradients_that_overlap_are_an_error(overlap):
    memory = torch.ones(20)
    theta = {"first": nn.Parameter(torch.zeros(10)), "second": nn.Parameter(torch.zeros(10))}
    wpl = wplfast.WeightPlasticityLoss(theta)
    wpl.consolidate({name: torch.ones(10) for name in theta})
    theta["first"].grad, theta["second"].grad = memory[:10], memory[10 - overlap : 20 - overlap]
    set_to(theta["first"], 1.0)
    if overlap == 0:
        wpl.add_grad_()
        assert torch.equal(memory, torch.cat([torch.full((10,), 2.0), torch.ones(10)]))
        return
    with pytest.raises(ValueError, match="must not overlap"):
        wpl.add_grad_()
    assert torch.equal(memory, torch.ones(20))


def test_mixed_dtypes_on_every_path():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(2, 2).bfloat16())
    wpl = anchored(module)
    exact = plain(module.double(), wpl)
    module[0].float()
    module[2].bfloat16()
    value = wpl()
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    value.backward()
    by_autograd = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    assert wpl.add_grad_().item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), by_autograd, strict=True))


def test_grad_scaler_and_autocast(autocast_kind):
    module = trunk()
    wpl = anchored(module)
    x = torch.randn(6, 5)

    def gradients(scaler) -> list[Tensor]:
        module.zero_grad()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        with torch.autocast(autocast_kind, torch.bfloat16):
            penalty = wpl()
            loss = module(x).square().mean() + penalty
        assert penalty.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return [p.grad.clone() for p in module.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaled = gradients(torch.amp.GradScaler(autocast_kind, init_scale=2.0**16))
        plain_gradients = gradients(torch.amp.GradScaler(autocast_kind, init_scale=1.0))
    assert wpl().item() == pytest.approx(plain(module, wpl).item(), rel=1e-6)
    for got, want in zip(scaled, plain_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)  # bfloat16 products scale exactly, sums hardly


def test_a_loss_scale_saves_small_gradients_in_float16():
    theta = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    wpl = wplfast.WeightPlasticityLoss({"theta": theta})
    wpl.consolidate({"theta": torch.full((8,), 1e-6)})
    set_to(theta, 0.01)
    (2.0**16 * wpl()).backward()
    torch.testing.assert_close(theta.grad.double(), torch.full((8,), 2.0**16 * 1e-8).double(), rtol=2e-3, atol=0.0)
