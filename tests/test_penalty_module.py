"""What a penalty adds to its module, copies, pickles, state and files: the contract sentence by sentence."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from penalty_cases import anchored, copied, move, plain, random_fisher, same_state, set_to, trunk
from torch import nn

import wplfast
from wplfast.errors import NameMismatchError, StaleParameterError


@pytest.fixture
def module():
    return trunk()


# ---- a module that owns nothing ----------------------------------------------------------------------------


def test_as_a_submodule_it_adds_its_anchors_once_and_nothing_else(module):
    names = list(module.state_dict())
    module.wpl = anchored(module, anchors=2)
    assert [n for n, _ in module.named_parameters()] == names
    assert list(module.wpl.parameters()) == []
    assert list(module.buffers()) == []
    kinds = ("fisher", "theta_hat", "offset", "constant")
    expected = {"wpl.version", "wpl.n_anchors", *(f"wpl.{kind}.{name}" for kind in kinds for name in names)}
    assert set(module.state_dict()) == {*names, *expected}
    twin = trunk()
    twin.wpl = wplfast.WeightPlasticityLoss(twin, alpha=9.0)
    twin.load_state_dict(module.state_dict())
    assert float(twin.wpl.alpha) == 9.0  # a setting, not state
    twin.wpl.alpha = 2.0
    assert twin.wpl().item() == module.wpl().item()


def test_two_names_of_one_shared_parameter_are_one():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    assert list(anchored(module).fisher) == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moving_it_never_changes_the_dtype_of_the_fisher(module, dtype):
    wpl = anchored(module, fisher_dtype=dtype)
    module.wpl = wpl
    before, value = copied(wpl.fisher), wpl().item()
    for change in (wpl.half, lambda: wpl.to(torch.float64), module.half, module.bfloat16):
        change()
        assert wpl().item() == value or change in (module.half, module.bfloat16)
        assert all(f.dtype == dtype and torch.equal(f, before[n]) for n, f in wpl.fisher.items())


def test_deepcopy_alone_keeps_the_parameters_and_parts_the_anchors_and_hooks(module):
    wpl, calls = anchored(module, anchors=2), []
    wpl.alpha = {"": 1.0, "0.": 3.0}
    twin = copy.deepcopy(wpl)
    assert twin().item() == wpl().item()
    twin().backward()
    assert module[0].weight.grad is not None
    value = wpl().item()
    twin.alpha = 0.0
    twin.register_forward_hook(lambda *_: calls.append(1))
    twin.consolidate(random_fisher(module), anchor="replace")
    assert wpl().item() == value
    assert not calls
    wpl.reset()
    assert twin.n_anchors == 1


class Model(nn.Module):
    """Layers and a penalty about them, in some order or one within the other."""

    def __init__(self, order):
        super().__init__()
        layers = trunk()
        parts = {"layers": layers, "penalty": anchored(layers)}
        for name in order:
            setattr(self, name, parts[name])
        if "penalty" not in order:
            layers.penalty = parts["penalty"]


@pytest.mark.parametrize("order", [("layers",), ("layers", "penalty"), ("penalty", "layers")], ids=str)
def test_deepcopy_with_the_model_follows_the_copy(order):
    def penalty_of(model):
        return next(m for m in model.modules() if isinstance(m, wplfast.WeightPlasticityLoss))

    model = Model(order)
    wpl = penalty_of(model)
    before = wpl().item()
    twins = [copy.deepcopy(model)]
    twins.append(copy.deepcopy(twins[0]))  # before the first is used
    for twin in twins:
        move(twin.layers, 1.0)
        value = penalty_of(twin)()
        assert value.item() == pytest.approx(plain(twin.layers, wpl).item(), rel=1e-5)
        assert value.item() != before
        penalty_of(twin).add_grad_()
        assert all(p.grad is not None for p in twin.layers.parameters())
    assert wpl().item() == before
    assert all(p.grad is None for p in model.layers.parameters())


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


def test_state_dict_round_trip(module):
    wpl, other = anchored(module, anchors=2), wplfast.WeightPlasticityLoss(module, alpha=2.0)
    other.load_state_dict(wpl.state_dict())
    assert same_state(wpl, other)
    assert other().item() == wpl().item()
    assert other.n_anchors == 2
    other.load_state_dict(wplfast.WeightPlasticityLoss(module).state_dict())
    assert other.n_anchors == 0
    assert other().item() == 0


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
    wpl, other = (wplfast.WeightPlasticityLoss({"theta": theta}) for _ in range(2))
    wpl.consolidate({"theta": torch.full((3,), 1e60, dtype=torch.float64)})
    other.load_state_dict(wpl.state_dict())
    other.consolidate({"theta": torch.ones(3)})


def filled(value):
    def fill(state):
        state["fisher.0.bias"][0] = value

    return fill


BAD_STATES = {
    "shape": (lambda state: state.update({"fisher.0.weight": torch.zeros(3)}), "must have shape"),
    "missing": (lambda state: state.pop("theta_hat.0.bias"), "Missing key"),
    "unknown": (lambda state: state.update({"fisher.unknown": torch.zeros(3)}), "Unexpected key"),
    "version": (lambda state: state.update(version=torch.full_like(state["version"], 99)), "version"),
    "nan": (filled(float("nan")), "must be finite"),
    "inf": (filled(float("inf")), "must be finite"),
    "negative": (filled(-1.0), "must be finite"),
}


@pytest.mark.parametrize(("spoil", "match"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_changes_nothing(module, spoil, match):
    wpl = anchored(module, anchors=2)
    value, before = wpl().item(), copied(wpl.state_dict())
    state = copied(before)
    spoil(state)
    with pytest.raises(RuntimeError, match=match):
        wpl.load_state_dict(state)
    assert same_state(wpl, before)
    assert wpl().item() == value


def test_files(module, tmp_path):
    wpl, other = anchored(module, anchors=2), wplfast.WeightPlasticityLoss(module)
    wpl.save(tmp_path / "wpl.safetensors")
    other.load(tmp_path / "wpl.safetensors")
    assert same_state(wpl, other)
    whole = (tmp_path / "wpl.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-10])
    (tmp_path / "foreign").write_bytes(b"not a tensor file at all")
    wplfast.Fisher(random_fisher(module), 3).save(tmp_path / "fisher")
    for name in ("cut", "foreign", "fisher"):
        with pytest.raises(ValueError, match=r"must be a wplfast penalty file|not a whole safetensors file"):
            other.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "none")
    assert same_state(wpl, other)
    strange = wplfast.WeightPlasticityLoss(nn.Linear(2, 2))
    with pytest.raises(NameMismatchError, match="missing"):
        strange.load(tmp_path / "wpl.safetensors")


def test_reset(module):
    wpl = anchored(module)
    wpl.reset()
    assert wpl.n_anchors == 0
    assert wpl.fisher == {}
