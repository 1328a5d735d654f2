"""Parameters that change, are replaced, grow or vanish under a penalty that refers to them."""

from __future__ import annotations

import gc

import pytest
import torch
from penalty_cases import STALE, anchored, enter, expected, move, needs_cpp, plain, set_to, trunk
from processes import run_python
from torch import Tensor, nn

import wplfast
from wplfast.errors import NameMismatchError, StaleParameterError


@pytest.fixture
def moved():
    """A module that moved away from its anchor, the penalty, and the anchor as numbers."""
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1)
    return module, wpl, enter(wpl, module)


# ---- memory that is exchanged ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", STALE.values(), ids=STALE)
@pytest.mark.parametrize("names", [None, ["2.weight", "0.bias"]], ids=["all", "active"])
def test_exchanged_memory_is_followed_on_every_path(change, names):
    module, l2 = trunk(), 0.1 if names is None else 0.0
    wpl = anchored(module, l2=l2)
    wpl(active=names)
    wpl.add_grad_(active=names)
    module.zero_grad()
    change(module)
    gc.collect()
    move(module, 0.5)
    chosen = {n: p for n, p in module.named_parameters() if names is None or n in names}
    hats = {n: hat.to(module[0].weight.dtype) for n, hat in wpl.theta_hat.items()}
    exact = expected(module, [(hats, wpl.fisher)], 2.0, l2, names)
    value = wpl(active=names)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    value.backward()
    by_autograd = {n: p.grad.clone() for n, p in chosen.items()}
    module.zero_grad()
    exact.backward()
    for n, p in chosen.items():
        rtol = 4 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(by_autograd[n], p.grad, rtol=rtol, atol=1e-5, msg=n)
        assert p.grad.abs().max() > 0
    module.zero_grad()
    wpl.add_grad_(active=names)
    assert all(torch.equal(p.grad, by_autograd[n]) for n, p in chosen.items())
    assert {f.dtype for f in wpl.fisher.values()} <= {torch.float32, torch.float64}


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


def test_a_changed_shape_is_an_error(moved):
    module, wpl, _ = moved
    module[0].weight.data = torch.zeros(9, 5)
    with pytest.raises(StaleParameterError, match=r"'0.weight' had shape \[7, 5\].* now has \[9, 5\]"):
        wpl()


@needs_cpp
@pytest.mark.parametrize(
    "call",
    [
        "with torch.device('meta'): wpl()",
        "wpl.add_grad_()\n    with torch.device('meta'): wpl.add_grad_()",
        "theta.untyped_storage().resize_(0); wpl()",
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
    assert result.returncode == 0, result.output[-2000:]


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


# ---- parameters that are replaced --------------------------------------------------------------------------

REPLACEMENTS = {
    "a parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(7, 5))),
    "a layer": lambda m: m.__setitem__(0, nn.Linear(5, 7)),
    "a layer, now without bias": lambda m: m.__setitem__(0, nn.Linear(5, 7, bias=False)),
    "assign": lambda m: m.load_state_dict({n: p + 1 for n, p in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("use", ["call", "add_grad_", "subset", "consolidate"])
@pytest.mark.parametrize("replace", [*REPLACEMENTS, "meta"])
def test_a_replaced_parameter_is_an_error_until_rebound(moved, replace, use):
    module, wpl, anchor = moved
    handle = wpl.subset(["0.weight"])
    uses = {"call": wpl, "add_grad_": wpl.add_grad_, "subset": handle, "consolidate": lambda: wpl.consolidate({})}
    REPLACEMENTS.get(replace, lambda m: m.to("meta"))(module)
    with pytest.raises(StaleParameterError, match=r"holds another tensor as '0.weight' .* call rebind"):
        uses[use]()
    if replace == "meta":
        return
    wpl.rebind(module, missing="drop")
    assert wpl().item() == pytest.approx(expected(module, [anchor], 3.0, 0.1).item(), rel=1e-5)
    assert all(p.grad is None for p in module.parameters())
    wpl.add_grad_()
    assert all(p.grad is not None for p in module.parameters())


def test_rebind_checks_names_and_shapes(moved):
    _, wpl, _ = moved
    with pytest.raises(NameMismatchError, match="lacks"):
        wpl.rebind(nn.Linear(5, 7))
    for smaller in (nn.Linear(5, 6), nn.Linear(4, 7), nn.Bilinear(5, 1, 7)):
        other = trunk()
        other[0] = smaller
        with pytest.raises(ValueError, match=r"must have at least its anchor's shape \[7, 5\], got"):
            wpl.rebind(other)


@pytest.mark.parametrize("several", [False, True], ids=["one anchor", "three anchors"])
def test_rebind_to_a_model_that_grew(several):
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    wpl = anchored(module, anchors=3 if several else 1, alpha={"": 1.0, "1.": 2.0})
    before = wpl().item()
    head = nn.Linear(6, 5)  # two new classes
    with torch.no_grad():
        head.weight[:3], head.bias[:3] = module[1].weight, module[1].bias
    module[1] = head
    wpl.rebind(module)
    assert wpl().item() == pytest.approx(before, rel=1e-6)
    with torch.no_grad():
        head.weight[3:] += 1.0
    assert wpl().item() == pytest.approx(before, rel=1e-6)
    wpl.add_grad_()
    assert head.weight.grad[:3].abs().min() > 0
    assert head.weight.grad[3:].abs().max() == 0
    enter(wpl, module)
    assert wpl.fisher["1.weight"][3:].min() > 0


def test_rebind_can_drop_what_vanished(moved):
    module, wpl, anchor = moved
    wpl.alpha = {"": 3.0, "3.": 9.0}
    names = ["0.weight", "0.bias", "3.weight"]
    rest = {n: p for n, p in module.named_parameters() if n in names}
    exact = expected(module, [anchor], {n: 9.0 if n == "3.weight" else 3.0 for n in names}, 0.1, names).item()
    gone = wpl.subset(["2.weight"])
    with pytest.raises(NameMismatchError, match="lacks 2 of 5 names"):
        wpl.rebind(rest)
    wpl.rebind(rest, missing="drop")
    for use in (gone, gone.add_grad_, lambda: dict(gone)):
        with pytest.raises(NameMismatchError, match=r"2\.weight"):
            use()
    with pytest.raises(NameMismatchError, match="lacks 3 of 3"):
        wpl.rebind({"other": torch.zeros(2)}, missing="drop")
    with pytest.raises(ValueError, match="missing must be"):
        wpl.rebind(rest, missing="ignore")
    assert wpl().item() == pytest.approx(exact, rel=1e-6)
    assert list(wpl.fisher) == names
