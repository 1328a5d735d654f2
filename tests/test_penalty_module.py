"""Names, what a penalty adds to its module, state: the contract sentence by sentence."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from penalty_cases import anchored, move, plain, random_fisher, set_to, trunk
from torch import nn

import wplfast
from wplfast.errors import NameMismatchError, StaleParameterError

# ---- names -------------------------------------------------------------------------------------------------


def test_names_by_identity_come_before_names_as_written():
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    fisher = wplfast.Fisher(
        {"a": torch.full((3,), 1.0), "b": torch.full((3,), 2.0)}, 1, parameters={"a": first, "b": second}
    )
    wpl = wplfast.WeightPlasticityLoss({"b": first, "a": second})  # the other way round
    wpl.consolidate(fisher)
    assert float(wpl.fisher["b"][0]) == 1.0
    assert float(wpl.fisher["a"][0]) == 2.0


def test_after_a_load_names_count(tmp_path):
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    fisher = wplfast.Fisher({"a": torch.ones(3), "b": torch.full((3,), 2.0)}, 1, parameters={"a": first, "b": second})
    fisher.save(tmp_path / "fisher")
    wpl = wplfast.WeightPlasticityLoss({"b": first, "a": second})
    wpl.consolidate(wplfast.Fisher.load(tmp_path / "fisher"))
    assert float(wpl.fisher["b"][0]) == 2.0


def test_one_entry_is_not_taken_for_two_parameters():
    known, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    fisher = wplfast.Fisher({"0.weight": torch.ones(3)}, 1, parameters={"0.weight": known})
    wpl = wplfast.WeightPlasticityLoss({"0.weight": new, "1.weight": known})
    with pytest.raises(NameMismatchError):
        wpl.consolidate(fisher)


def test_a_missing_name_lists_both_sides_and_a_prefix():
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    longer = {f"encoder.{n}": f for n, f in random_fisher(module).items()}
    with pytest.raises(NameMismatchError) as caught:
        wpl.consolidate(longer)
    message = str(caught.value)
    assert "'0.weight'" in message
    assert "'encoder.0.weight'" in message
    assert "prefix='encoder.'" in message
    with pytest.raises(NameMismatchError, match=r"lacks 1 of 4 names: \['2.bias'\]; it has \['0.weight'"):
        wpl.consolidate({n: f for n, f in random_fisher(module).items() if n != "2.bias"})
    assert wpl.n_anchors == 0


@pytest.mark.parametrize("call", ["fisher", "theta_hat", "active", "rebind"])
def test_no_overlap_is_an_error(call):
    module = trunk()
    wpl = anchored(module)
    foreign = {f"other{n}": torch.ones(1) for n in range(3)}
    before = wpl().item()
    calls = {
        "fisher": lambda: wpl.consolidate(foreign),
        "theta_hat": lambda: wpl.consolidate(random_fisher(module), theta_hat=foreign),
        "active": lambda: wpl(active=list(foreign)),
        "rebind": lambda: wpl.rebind(foreign, missing="drop"),
    }
    with pytest.raises(NameMismatchError):
        calls[call]()
    assert wpl().item() == before


def test_any_mapping_will_do():
    module = trunk()
    fisher = random_fisher(module)
    expected = wplfast.WeightPlasticityLoss(module)
    expected.consolidate(fisher)
    wpl = wplfast.WeightPlasticityLoss(module)
    wpl.consolidate(OrderedDict(reversed(fisher.items())), theta_hat=module.state_dict())
    assert all(torch.equal(wpl.fisher[n], f) for n, f in expected.fisher.items())
    assert all(torch.equal(wpl.theta_hat[n], f) for n, f in expected.theta_hat.items())


def test_two_names_of_one_shared_parameter_are_one():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    wpl = anchored(module)
    assert list(wpl.fisher) == ["0.weight"]
    with pytest.raises(ValueError, match="same tensor"):
        wplfast.WeightPlasticityLoss({"x": module[0].weight, "y": module[1].weight})


# ---- a module that owns nothing ----------------------------------------------------------------------------


def test_as_a_submodule_it_adds_its_anchors_once_and_nothing_else():
    module = trunk()
    names = list(module.state_dict())
    module.wpl = anchored(module, anchors=2)
    assert [n for n, _ in module.named_parameters()] == names
    assert list(module.wpl.parameters()) == []
    assert list(module.buffers()) == []
    kinds = ("fisher", "theta_hat", "offset")
    expected = {f"wpl.{kind}.{name}" for kind in kinds for name in names} | {
        *(f"wpl.constant.{name}" for name in names),
        "wpl.version",
        "wpl.n_anchors",
    }
    assert set(module.state_dict()) == {*names, *expected}
    twin = trunk()
    twin.wpl = wplfast.WeightPlasticityLoss(twin, alpha=9.0)
    twin.load_state_dict(module.state_dict())
    assert float(twin.wpl.alpha) == 9.0  # a setting, not state
    twin.wpl.alpha = 2.0
    assert twin.wpl().item() == module.wpl().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moving_it_never_changes_the_dtype_of_the_fisher(dtype):
    module = trunk()
    wpl = anchored(module, fisher_dtype=dtype)
    module.wpl = wpl
    before = {n: f.clone() for n, f in wpl.fisher.items()}
    for change in (lambda: wpl.half(), lambda: wpl.to(torch.float64), lambda: module.half(), lambda: module.bfloat16()):
        change()
        wpl()
        assert all(f.dtype == dtype and torch.equal(f, before[n]) for n, f in wpl.fisher.items())


def test_deepcopy_alone_keeps_the_parameters_and_parts_the_anchors():
    module = trunk()
    wpl = anchored(module, anchors=2)
    wpl.alpha = {"": 1.0, "0.": 3.0}
    twin = copy.deepcopy(wpl)
    assert twin().item() == wpl().item()
    twin().backward()
    assert module[0].weight.grad is not None
    value = wpl().item()
    twin.alpha = 0.0
    twin.consolidate(random_fisher(module), anchor="replace")
    assert wpl().item() == value
    wpl.reset()
    assert twin.n_anchors == 1


def test_deepcopy_with_the_model():
    module = trunk()
    module.wpl = anchored(module)
    twin = copy.deepcopy(module)
    move(twin)
    assert twin.wpl().item() == pytest.approx(plain(twin, module.wpl).item(), rel=1e-5)
    twin.wpl.add_grad_()
    assert twin[0].weight.grad is not None
    assert module[0].weight.grad is None


def test_deepcopy_with_the_model_whatever_comes_first():
    shared = trunk()
    model = nn.ModuleDict({"wpl": anchored(shared), "shared": shared})
    twin = copy.deepcopy(model)
    before = twin["wpl"]().item()
    move(twin["shared"], 1.0)
    assert twin["wpl"]().item() != before


def test_deepcopy_parts_hooks():
    wpl, calls = anchored(trunk()), []
    copy.deepcopy(wpl).register_forward_hook(lambda *_: calls.append(1))
    wpl()
    assert not calls


def test_pickle_keeps_names_not_tensors():
    module = nn.Sequential(nn.Linear(5, 7))
    wpl = anchored(module)
    marked = torch.full_like(module[0].weight, 12345.0)
    with torch.no_grad():
        module[0].weight.copy_(marked)
    blob = pickle.dumps(wpl)
    assert marked.cpu().numpy().tobytes() not in blob
    again = pickle.loads(blob)
    for call in (
        again,
        again.add_grad_,
        lambda: again.consolidate(random_fisher(module)),
        lambda: again.subset(["0.bias"])(),
    ):
        with pytest.raises(StaleParameterError, match="rebind"):
            call()
    again.rebind(module)
    assert again().item() == wpl().item()
    again.consolidate(again.fisher)  # addresses of the other process mean nothing here
    assert again.n_anchors == 2


# ---- state -------------------------------------------------------------------------------------------------


def test_a_state_is_matched_by_name_whatever_the_order():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    wpl = wplfast.WeightPlasticityLoss([("a", a), ("b", b)])
    wpl.consolidate({"a": torch.ones(3), "b": torch.ones(3)})
    set_to(a, 1.0)
    wpl.consolidate({"a": torch.ones(3), "b": torch.ones(3)})
    other = wplfast.WeightPlasticityLoss([("b", b), ("a", a)])
    other.load_state_dict(wpl.state_dict())
    assert other(active=["a"]).item() == wpl(active=["a"]).item()


def test_a_large_fisher_in_float64_can_be_loaded_and_added_to():
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    wpl = wplfast.WeightPlasticityLoss({"theta": theta})
    wpl.consolidate({"theta": torch.full((3,), 1e60, dtype=torch.float64)})
    other = wplfast.WeightPlasticityLoss({"theta": theta})
    other.load_state_dict(wpl.state_dict())
    other.consolidate({"theta": torch.ones(3)})


def test_a_state_of_another_version_is_refused():
    wpl = anchored(trunk())
    state = dict(wpl.state_dict())
    assert "version" in state
    state["version"] = torch.tensor(99)
    with pytest.raises(RuntimeError, match="version"):
        wpl.load_state_dict(state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_state_with_bad_numbers_is_refused(bad):
    wpl = anchored(trunk(), anchors=2)
    value, state = wpl().item(), {k: v.clone() for k, v in wpl.state_dict().items()}
    state["fisher.0.bias"][0] = bad
    with pytest.raises(RuntimeError, match="must be finite"):
        wpl.load_state_dict(state)
    assert wpl().item() == value
