"""WeightPlasticityLoss: values and gradients, ``.grad``, alpha, active sets, arguments that are refused."""

from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from penalty_cases import (
    anchored,
    copied,
    enter,
    expected,
    gradients,
    grads_of,
    needs_cpp,
    plain,
    random_fisher,
    set_to,
    trunk,
)
from torch import Tensor, nn

import wplfast
from wplfast.errors import NameMismatchError

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *NARROW]


@pytest.fixture
def moved():
    """A module that moved away from its anchor, the penalty, and the anchor as numbers."""
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1)
    return module, wpl, enter(wpl, module)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(dtype, fisher_dtype):
    """The value is wide whatever the parameters are; F in bfloat16 is off by its rounding, and by nothing else."""
    module = trunk(dtype)
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1, fisher_dtype=fisher_dtype)
    hat, fisher = enter(wpl, module, by=0.3)
    kept = torch.float64 if dtype == torch.float64 else fisher_dtype
    assert {f.dtype for f in wpl.fisher.values()} == {kept}
    exact, rounded = (expected(module, [(hat, f)], 3.0, 0.1) for f in (fisher, wpl.fisher))
    value = wpl()
    assert value.dim() == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(exact.item(), rel=2**-8 if kept == torch.bfloat16 else 1e-6)
    assert value.item() == pytest.approx(rounded.item(), rel=1e-6)
    wanted = gradients(module, rounded)
    for add in (value.backward, wpl.add_grad_):
        add()
        for name, p in module.named_parameters():
            rtol = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(p.grad, wanted[name].to(dtype), rtol=rtol, atol=1e-6, msg=name)
        module.zero_grad()


def test_mixed_dtypes_on_every_path():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(2, 2).bfloat16())
    wpl = anchored(module)
    exact = plain(module, wpl).item()
    value = wpl()
    assert value.item() == pytest.approx(exact, rel=1e-6)
    by_autograd = grads_of(lambda: value, module)
    assert wpl.add_grad_().item() == pytest.approx(exact, rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), by_autograd, strict=True))


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
            wanted = (2 * wpl.fisher[f"p{i}"] * (p - hat) + 0.5 * p).detach()
            torch.testing.assert_close(g, wanted, rtol=1e-5, atol=1e-6)
        del found


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_before_the_first_anchor_there_is_the_l2_term_alone(dtype):
    module = trunk(dtype)
    module.long = nn.Parameter(torch.full((1 << 18,), 0.9, dtype=dtype))  # whose sum is beyond float16
    assert wplfast.WeightPlasticityLoss(module)().item() == 0.0
    wpl = wplfast.WeightPlasticityLoss(module, l2=0.5)
    assert wpl().dtype == torch.float32
    assert wpl().item() == pytest.approx(expected(module, [], l2=0.5).item(), rel=1e-6)
    wpl.add_grad_()
    for p in module.parameters():
        torch.testing.assert_close(p.grad, 0.5 * p.detach())


def test_upstream_gradients_and_a_retained_graph(moved):
    module, wpl, anchor = moved
    wanted = gradients(module, expected(module, [anchor], 3.0, 0.1))
    value = wpl()
    for factor, so_far in ((7.0, 7.0), (1.0, 8.0)):
        (factor * value).backward(retain_graph=factor != 1)
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.grad, so_far * wanted[name].float())


def test_grad_scaler_and_autocast(autocast_kind):
    module = trunk()
    wpl = anchored(module)
    x = torch.randn(6, 7, 5)

    def unscaled(init_scale) -> list[Tensor]:
        scaler = torch.amp.GradScaler(autocast_kind, init_scale=init_scale)
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
        scaled, ordinary = unscaled(2.0**16), unscaled(1.0)
    assert wpl().item() == pytest.approx(plain(module, wpl).item(), rel=1e-6)
    for got, want in zip(scaled, ordinary, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)  # bfloat16 products scale exactly, sums hardly


def test_a_loss_scale_saves_small_gradients_in_float16():
    theta = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    wpl = wplfast.WeightPlasticityLoss({"theta": theta})
    wpl.consolidate({"theta": torch.full((8,), 1e-6)})
    set_to(theta, 0.01)
    (2.0**16 * wpl()).backward()
    torch.testing.assert_close(theta.grad.double(), torch.full((8,), 2.0**16 * 1e-8).double(), rtol=2e-3, atol=0.0)


# ---- .grad -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["in order", "transposed"])
@pytest.mark.parametrize("scale", [1.0, 2.0, "tensor"])
@pytest.mark.parametrize("present", [0, 1, 2, 3, 5])
def test_add_grad_adds_to_what_is_there_and_allocates_what_is_missing(moved, present, scale, order):
    module, wpl, anchor = moved
    exact = expected(module, [anchor], 3.0, 0.1)
    wanted = gradients(module, exact)
    for p in list(module.parameters())[:present]:
        p.grad = torch.randn_like(p)
        if order == "transposed":
            p.grad = torch.randn(p.shape[::-1]).permute(*range(p.dim())[::-1])
    owned = {n: p.grad for n, p in module.named_parameters()}
    starts = {n: torch.zeros(()) if grad is None else grad.clone() for n, grad in owned.items()}
    value = wpl.add_grad_(scale=torch.tensor(0.5) if scale == "tensor" else scale)
    assert not value.requires_grad
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    for n, p in module.named_parameters():
        assert owned[n] is None or p.grad is owned[n]
        torch.testing.assert_close(p.grad, starts[n] + (0.5 if scale == "tensor" else scale) * wanted[n].float())


def test_add_grad_leaves_frozen_parameters_alone(moved):
    module, wpl, anchor = moved
    module[0].weight.requires_grad_(False)
    value = wpl.add_grad_()
    assert module[0].weight.grad is None
    assert module[0].bias.grad is not None
    assert value.item() == pytest.approx(expected(module, [anchor], 3.0, 0.1).item(), rel=1e-6)


@pytest.mark.not_rehearsed("sparse tensors")
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_bad_grad_changes_no_other(dtypes):
    first, second = (nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes)
    wpl = wplfast.WeightPlasticityLoss({"first": first, "second": second})
    wpl.consolidate({"first": torch.ones(3), "second": torch.ones(3)})
    set_to(first, 1.0)
    second.grad = torch.zeros(3, dtype=dtypes[1]).to_sparse()
    with pytest.raises(ValueError, match=r"\.grad must be dense"):
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


# ---- alpha and active sets ---------------------------------------------------------------------------------


def test_alpha_by_prefix_and_in_place(moved):
    module, wpl, anchor = moved

    def assert_value_with(alpha) -> None:
        assert wpl().item() == pytest.approx(expected(module, [anchor], alpha, 0.1).item(), rel=1e-6)

    assert_value_with(3.0)
    wpl.alpha.mul_(2)
    assert_value_with(6.0)
    wpl.alpha = {"": 1.0, "0.": 2.0, "0.bias": 5.0}
    assert_value_with({"0.weight": 2.0, "0.bias": 5.0, "2.weight": 1.0, "2.bias": 1.0, "3.weight": 1.0})
    wpl.alpha = {"": 4.0}
    assert_value_with(4.0)
    with pytest.raises(ValueError, match="no prefix for"):
        wpl.alpha = {"0.": 1.0}
    with pytest.raises(ValueError, match="not negative, got -1"):
        wpl.alpha = -1.0
    assert_value_with(4.0)


@pytest.mark.parametrize("value", [-3.0, float("nan"), float("inf"), 1j], ids=str)
@pytest.mark.parametrize("form", [torch.tensor, lambda x: {"": torch.tensor(x)}], ids=["tensor", "by prefix"])
def test_a_tensor_is_checked_as_a_float_is(moved, value, form):
    module, wpl, _ = moved
    before = wpl.alpha.clone()
    match = "must be real" if isinstance(value, complex) else f"finite and not negative, got {value}"
    with pytest.raises(ValueError, match=match):
        wplfast.WeightPlasticityLoss(module, form(value))
    with pytest.raises(ValueError, match=match):
        wpl.alpha = form(value)
    assert torch.equal(wpl.alpha, before)
    wpl.alpha = form(0.0)
    wpl.alpha.fill_(1.0)  # what is written to it is not looked at


def test_active_set(moved):
    module, wpl, anchor = moved
    names = ["2.weight", "0.bias"]
    exact = expected(module, [anchor], 3.0, 0.1, names)
    assert wpl(active=names).item() == pytest.approx(exact.item(), rel=1e-6)
    handle = wpl.subset(names)
    assert handle().item() == pytest.approx(exact.item(), rel=1e-6)
    assert [(name, id(p)) for name, p in handle] == [(name, id(module.get_parameter(name))) for name in names]
    handle.add_grad_()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == set(names)
    before = copied(wpl.fisher)
    wpl.consolidate(random_fisher(module), active=names)
    assert {n for n, f in wpl.fisher.items() if not torch.equal(f, before[n])} == set(names)
    with pytest.raises(NameMismatchError, match=r"nope"):
        wpl(active=["nope"])
    with pytest.raises(TypeError, match="sequence of names"):
        wpl(active="0.bias")


@pytest.mark.parametrize("names", [[], ()])
def test_an_empty_active_set_is_zero_or_a_clear_error(names):
    wpl = anchored(trunk())
    try:
        assert wpl(active=names).item() == 0
    except (ValueError, NameMismatchError) as error:
        assert "active" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "form", [iter, set, lambda names: dict.fromkeys(names).keys()], ids=["iterator", "set", "keys"]
)
def test_names_in_any_iterable(moved, form):
    module, wpl, _ = moved
    names = ["2.weight", "0.bias"]
    exact = wpl(active=names).item()
    assert wpl(active=form(names)).item() == pytest.approx(exact, rel=1e-6)
    assert wpl.subset(form(names))().item() == pytest.approx(exact, rel=1e-6)
    assert wpl.add_grad_(active=form(names)).item() == pytest.approx(exact, rel=1e-6)
    assert {n for n, p in module.named_parameters() if p.grad is not None} == set(names)
    before = copied(wpl.fisher)
    wpl.consolidate(random_fisher(module), active=form(names))
    assert {n for n, f in wpl.fisher.items() if not torch.equal(f, before[n])} == set(names)
    assert wpl(active=form([])).item() == 0


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([1], "strings, got an entry of int"),
        (("0.bias", ["0.bias"]), "strings, got an entry of list"),
        ([torch.ones(2)], "strings, got an entry of Tensor"),
        (1, "sequence of names, got int"),
        (nn.Linear(2, 2), "sequence of names, got Linear"),
    ],
)
@pytest.mark.parametrize("use", ["call", "add_grad_", "subset", "consolidate"])
def test_names_that_are_none(moved, names, match, use):
    module, wpl, _ = moved
    calls = {
        "call": lambda: wpl(active=names),
        "add_grad_": lambda: wpl.add_grad_(active=names),
        "subset": lambda: wpl.subset(names),
        "consolidate": lambda: wpl.consolidate(random_fisher(module), active=names),
    }
    with pytest.raises(TypeError, match=match):
        calls[use]()


def test_l2_can_be_read():
    assert wplfast.WeightPlasticityLoss(trunk(), l2=0.25).l2 == 0.25


# ---- arguments that are refused ----------------------------------------------------------------------------


def test_bad_parameters():
    zeros = torch.zeros(3)
    w = zeros.clone().requires_grad_()
    bad = [
        (zeros, TypeError, "must be a Module, a mapping or"),
        ("0.*", TypeError, r"pairs, got '0\.\*': names choose nothing, pass the part of the model itself, such as"),
        (["a", "b"], TypeError, r"an entry of str, 'a': .*\{n: p for n, p in model\.named_parameters\(\) if"),
        (trunk().parameters(), TypeError, r"Parameter, without a name: .* or model\.named_parameters\(\)"),
        ([zeros], TypeError, "an entry of Tensor, without a name"),
        ([trunk()], TypeError, "an entry of Sequential, a module: pass a module as it is, not in a list"),
        ([1], TypeError, "got an entry of int$"),
        ({}, ValueError, "empty"),
        ([("a", w), ("b", w)], ValueError, "same tensor"),
        ([("a", zeros), ("a", torch.zeros(3))], ValueError, "occurs twice"),
        ({"a": w * 2}, ValueError, "leaf"),
        ({"a": zeros.to(torch.int64)}, ValueError, "floating point"),
        (nn.LazyLinear(2), ValueError, r"params\['weight'\] has no shape yet.* run one batch through the model first"),
    ]
    for parameters, error, match in bad:
        with pytest.raises(error, match=match):
            wplfast.WeightPlasticityLoss(parameters)
    with pytest.raises(ValueError, match="l2 must be finite"):
        wplfast.WeightPlasticityLoss({"a": zeros}, l2=-1.0)
    with pytest.raises(ValueError, match=r"fisher_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        wplfast.WeightPlasticityLoss({"a": zeros}, fisher_dtype=torch.float16)


@pytest.mark.parametrize("alpha", ["1", b"1", None, [1.0], {"": "1"}], ids=repr)
def test_an_alpha_that_is_no_number(alpha):
    kind = "str" if isinstance(alpha, dict) else type(alpha).__name__
    with pytest.raises(TypeError, match=rf"alpha must be a number, or \{{prefix: number\}}, got {kind}: "):
        wplfast.WeightPlasticityLoss(trunk(), alpha=alpha)
    wpl = wplfast.WeightPlasticityLoss(trunk(), alpha=2)
    with pytest.raises(TypeError, match=f"got {kind}: "):
        wpl.alpha = alpha
    assert wpl.alpha == 2


@pytest.mark.parametrize("alpha", [np.float32(2), np.array(2), Fraction(2), True + 1, {"": np.int64(2)}], ids=repr)
def test_an_alpha_that_is_a_number_of_another_kind(alpha):
    assert bool((wplfast.WeightPlasticityLoss(trunk(), alpha=alpha).alpha == 2).all())


def test_swapped_arguments():
    module = trunk()
    order = r"alpha must be a number, .* got a module, Sequential: the order is WeightPlasticityLoss\(model, alpha\)"
    with pytest.raises(TypeError, match=f"{order}$"):
        wplfast.WeightPlasticityLoss(1000.0, module)
    with pytest.raises(TypeError, match=rf"{order}, and pass the Fisher to its consolidate\(fisher\)$"):
        wplfast.WeightPlasticityLoss(wplfast.Fisher.zeros(module), module)


def test_functional_checks_its_arguments(device):
    w, zeros = torch.zeros(3, requires_grad=True), torch.zeros(3)
    bad = [
        ([], [zeros], 1.0, "theta_hat must hold 1"),
        ([zeros], [torch.zeros(2)], 1.0, r"fisher\[0\] must be float32\[3\]"),
        ([zeros], [zeros.double()], 1.0, rf"fisher\[0\] must be float32\[3\] on {device}, got float64\[3\]"),
        ([zeros.to("meta")], [zeros], 1.0, rf"theta_hat\[0\] must be float32\[3\] on {device}, got .* on meta"),
        ([zeros], [zeros], torch.zeros(2), "0-d tensor"),
        ([zeros], [zeros], torch.tensor(1j), "must be real, got a tensor of torch.complex64"),
    ]
    for theta_hat, fisher, alpha, match in bad:
        with pytest.raises(ValueError, match=match):
            wplfast.functional.wpl_penalty([w], theta_hat, fisher, alpha)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (torch.eye(2, 3).to_sparse(), r"sparse_coo torch.float32\[2, 3\]"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), r"torch.float8_e4m3fn\[2, 3\]"),
        (torch.ones(2, 3, device="meta"), r"torch.float32\[2, 3\] on meta"),
        (torch.ones(2, 3) + 1j, r"torch.complex64\[2, 3\]"),
        (torch.ones(3, 2), r"torch.float32\[3, 2\]"),
        ([1.0], "list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("what", ["fisher", "theta_hat"])
def test_a_fisher_or_an_anchor_that_cannot_be_computed_with(bad, got, what, device):
    wpl, good = wplfast.WeightPlasticityLoss({"w": torch.ones(2, 3, requires_grad=True)}), {"w": torch.ones(2, 3)}
    given = {"fisher": good, "theta_hat": good} | {what: {"w": bad}}
    with pytest.raises(ValueError, match=rf"{what}\['w'\] must be dense, floating point .* in memory.*, got {got}"):
        wpl.consolidate(**given)
    assert wpl.n_anchors == 0
