"""Files and states that fit in part, and Fishers that bring their anchors along."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from penalty_cases import anchored, copied, enter, expected, move, random_fisher, same_state, trunk, values
from safetensors.torch import load_file, save_file
from torch import nn

import wplfast
from wplfast.errors import NameMismatchError, NonFiniteError, StaleParameterError

NOTHING = "nothing fits the penalty"


def model(classes=3, extra=False):
    parts = {"body": nn.Linear(4, 5), "head": nn.Linear(5, classes)}
    return nn.ModuleDict(parts | ({"extra": nn.Linear(5, 1)} if extra else {}))


def by_file(wpl, other, folder):
    wpl.save(folder / "wpl")
    return other.load(folder / "wpl", strict=False)


def by_state(wpl, other, folder):
    return other.load_state_dict(wpl.state_dict(), strict=False)


def by_a_models_state(wpl, other, folder):
    """As submodules of models whose own parameters have other names."""
    first, second = nn.Module(), nn.Module()
    first.wpl, second.wpl = wpl, other
    first.weight, second.weight = (nn.Parameter(torch.ones(2)) for _ in range(2))
    keys = second.load_state_dict(first.state_dict(), strict=False)
    assert all(key.startswith("wpl.") for column in keys for key in column)
    return type(keys)(*([key.removeprefix("wpl.") for key in column] for column in keys))


ways = pytest.mark.parametrize("load", [by_file, by_state, by_a_models_state])
many = pytest.mark.parametrize("several", [1, 3], ids=["one anchor", "three anchors"])


def entered(module, several, **settings):
    """A penalty with some anchors, and these as numbers."""
    wpl = wplfast.WeightPlasticityLoss(module, alpha=2.0, **settings)
    return wpl, [enter(wpl, module) for _ in range(several)]


def corner(column, larger):
    """Put old entries into larger zeros."""
    found = {}
    for name, p in larger.named_parameters():
        if name in column:
            found[name] = torch.zeros(p.shape, dtype=torch.float64)
            found[name][tuple(slice(0, n) for n in column[name].shape)] = column[name].double()
    return found


# ---- what fits -------------------------------------------------------------------------------------------------------


@ways
@many
def test_a_grown_head_takes_its_old_rows_and_leaves_the_new_ones_free(load, several, tmp_path):
    wpl, anchors = entered(model(), several)
    larger = model(classes=5)
    other = wplfast.WeightPlasticityLoss(larger, alpha=2.0, l2=0.1)
    keys = load(wpl, other, tmp_path)
    assert keys == ([], [])
    assert other.n_anchors == several
    anchors = [(corner(hat, larger), corner(f, larger)) for hat, f in anchors]
    assert other().item() == pytest.approx(expected(larger, anchors, 2.0, 0.1).item(), rel=1e-5)
    assert not other.fisher["head.weight"][3:].any()
    assert torch.equal(other.theta_hat["head.weight"][3:], larger["head"].weight[3:])
    last = enter(other, larger)  # the new rows join
    assert other().item() == pytest.approx(expected(larger, [*anchors, last], 2.0, 0.1).item(), rel=1e-5)


@ways
@many
@pytest.mark.parametrize("own", [0, 2], ids=["fresh", "with anchors of its own"])
def test_names_on_one_side_alone_are_returned_and_keep_what_they_have(load, several, own, tmp_path):
    saved, here = model(extra=True), nn.ModuleDict({"body": nn.Linear(4, 5), "head": nn.Linear(5, 3)})
    here["last"] = nn.Linear(2, 2)
    wpl, anchors = entered(saved, several)
    other, before = entered(here, own)
    keys = load(wpl, other, tmp_path)
    kinds = ["fisher", "theta_hat", "constant", *(["offset"] if several > 1 else [])]
    assert set(keys.missing_keys) == {f"{kind}.last.{n}" for kind in kinds for n in ("weight", "bias")}
    assert set(keys.unexpected_keys) == {f"{kind}.extra.{n}" for kind in kinds for n in ("weight", "bias")}
    assert other.n_anchors == max(own, several)
    common = [f"{part}.{n}" for part in ("body", "head") for n in ("weight", "bias")]
    kept = expected(here, before, names=["last.weight", "last.bias"])
    assert other().item() == pytest.approx((expected(here, anchors, names=common) + kept).item(), rel=1e-5)
    other.consolidate(random_fisher(here))
    assert len(other.fisher) == 6


@ways
def test_a_shape_that_does_not_fit_is_returned_on_both_sides(load, tmp_path):
    wpl, anchors = entered(model(classes=5), 2)
    here = model(classes=3)  # smaller: whose rows are gone?
    other = wplfast.WeightPlasticityLoss(here, alpha=2.0)
    keys = load(wpl, other, tmp_path)
    misfits = {f"{kind}.head.{n}" for kind in ("fisher", "theta_hat", "offset") for n in ("weight", "bias")}
    assert set(keys.missing_keys) == misfits
    assert misfits <= set(keys.unexpected_keys)
    names = ["body.weight", "body.bias"]
    assert other().item() == pytest.approx(expected(here, anchors, names=names).item(), rel=1e-5)
    with pytest.raises(RuntimeError, match=r"must have shape \[3, 5\], got \[5, 5\]"):
        other.load_state_dict(wpl.state_dict())


def test_a_strict_load_of_what_grew_says_how_to_load_it(tmp_path):
    wpl, other = anchored(model()), wplfast.WeightPlasticityLoss(model(classes=5))
    wpl.save(tmp_path / "wpl")
    with pytest.raises(ValueError, match=r"shape \[5, 5\], got \[3, 5\]; strict=False loads these entries"):
        other.load(tmp_path / "wpl")
    assert other.n_anchors == 0


def test_parameters_of_which_a_state_lacks_a_part_are_left_out():
    module = model()
    wpl, _ = entered(module, 2)
    state = copied(wpl.state_dict())
    del state["theta_hat.head.bias"], state["offset.body.bias"]
    state["fisher.head.weight"] = state["fisher.head.weight"][:2]  # other shapes within one parameter
    other = wplfast.WeightPlasticityLoss(module)
    keys = other.load_state_dict(state, strict=False)
    assert {"theta_hat.head.bias", "offset.body.bias", "fisher.head.weight"} <= set(keys.missing_keys)
    assert {"fisher.head.bias", "constant.body.bias", "fisher.head.weight"} <= set(keys.unexpected_keys)
    assert [name for name, f in other.fisher.items() if f.any()] == ["body.weight"]


# ---- nothing that fits -----------------------------------------------------------------------------------------------


def test_a_file_of_which_nothing_fits_is_an_error(tmp_path):
    wpl, other = anchored(model()), anchored(trunk())
    wpl.save(tmp_path / "wpl")
    before = copied(other.state_dict())
    with pytest.raises(NameMismatchError, match=r"strict=False loads what fits"):
        other.load(tmp_path / "wpl")
    with pytest.raises(NameMismatchError, match=r"wpl: nothing fits: missing \['constant.0.bias'"):
        other.load(tmp_path / "wpl", strict=False)
    assert same_state(other, before)
    assert wpl.load(tmp_path / "wpl") == ([], [])


@pytest.mark.parametrize("own", [0, 1], ids=["fresh", "anchored"])
def test_a_state_of_which_nothing_fits_is_told_and_returned(own, caplog):
    other, _ = entered(trunk(), own)
    before = copied(other.state_dict())
    strange = anchored(model()).state_dict()
    keys = other.load_state_dict(strange, strict=False)
    assert "fisher.0.weight" in keys.missing_keys
    assert "fisher.body.weight" in keys.unexpected_keys
    assert sum(NOTHING in m for m in caplog.messages) == 1
    keys = other.load_state_dict({}, strict=False)
    assert {"version", "n_anchors"} <= set(keys.missing_keys)
    whole = trunk()
    whole.wpl = other
    keys = whole.load_state_dict(trunk().state_dict(), strict=False)  # a checkpoint from before there was a penalty
    assert {"wpl.version", "wpl.n_anchors"} <= set(keys.missing_keys)
    assert sum(NOTHING in m for m in caplog.messages) == 3
    assert same_state(other, before)


def test_a_state_without_anchors_is_a_state(caplog, tmp_path):
    wpl, other = wplfast.WeightPlasticityLoss(model()), anchored(model())
    assert other.load_state_dict(wpl.state_dict(), strict=False) == ([], [])
    assert other.n_anchors == 0
    assert not any(NOTHING in m for m in caplog.messages)
    wpl.save(tmp_path / "wpl")
    again = wplfast.WeightPlasticityLoss(model())
    again.load(tmp_path / "wpl", strict=False)
    again()
    assert any("before any consolidate" in m for m in caplog.messages)


# ---- atomic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_values_that_no_penalty_has_are_errors_and_change_nothing(strict, value, tmp_path):
    wpl, other = anchored(model()), anchored(model(classes=3 if strict else 5))
    wpl.save(tmp_path / "wpl")
    tensors = load_file(tmp_path / "wpl")
    tensors["fisher.head.bias"][0] = value
    metadata = {"wplfast.kind": "penalty", "wplfast.version": "1"}
    save_file(tensors, tmp_path / "wpl", metadata)
    before = copied(other.state_dict())
    with pytest.raises(ValueError, match="must be finite and not negative"):
        other.load(tmp_path / "wpl", strict=strict)
    with pytest.raises(RuntimeError, match="must be finite and not negative"):
        other.load_state_dict(tensors, strict=strict)
    tensors["fisher.head.bias"][0] = 1.0
    tensors["version"] += 1
    with pytest.raises(RuntimeError, match="must be of version"):
        other.load_state_dict(tensors, strict=strict)
    assert same_state(other, before)


def test_a_strict_load_changes_nothing_where_a_lenient_one_would():
    """PyTorch tells a submodule that every load is strict; which one it is is looked up."""
    whole, grown = nn.Module(), nn.Module()
    whole.wpl, grown.wpl = anchored(model()), wplfast.WeightPlasticityLoss(model(extra=True))
    for strict in (True, False):
        if strict:
            with pytest.raises(RuntimeError, match=r"Missing key\(s\).*wpl.constant.extra.bias"):
                grown.load_state_dict(whole.state_dict())
            assert grown.wpl.n_anchors == 0
        else:
            keys = grown.load_state_dict(whole.state_dict(), strict=False)
            assert "wpl.fisher.extra.weight" in keys.missing_keys
            assert grown.wpl.n_anchors == 1


# ---- a Fisher with its anchors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["module", "mapping", "a model around it"])
def test_a_fishers_file_keeps_the_anchors_it_belongs_to(given, tmp_path):
    module = trunk()
    numbers, at = random_fisher(module), values(module)
    fisher = wplfast.Fisher(numbers, 7, parameters=dict(module.named_parameters()))
    around = nn.ModuleDict({"head": nn.Linear(2, 2), "trunk": module})
    kept = {"module": module, "mapping": dict(module.named_parameters()), "a model around it": around}[given]
    fisher.save(tmp_path / "f", theta_hat=kept)
    assert fisher.theta_hat is None
    loaded = wplfast.Fisher.load(tmp_path / "f")
    assert all(torch.equal(loaded.theta_hat[n].double(), v.cpu()) for n, v in at.items())
    elsewhere = trunk()  # another start
    for one in (loaded, pickle.loads(pickle.dumps(loaded)), loaded.to(torch.float64)):
        wpl = wplfast.WeightPlasticityLoss(elsewhere, alpha=2.0)
        wpl.consolidate(one)
        assert wpl().item() == pytest.approx(expected(elsewhere, [(at, numbers)]).item(), rel=1e-5)
    wpl.consolidate(loaded, anchor="replace", theta_hat=dict(elsewhere.named_parameters()))  # what is said counts
    assert wpl().item() == 0
    wpl.update(loaded, active=["0.bias"])
    assert torch.equal(wpl.theta_hat["0.bias"].double(), at["0.bias"])
    inner = wplfast.WeightPlasticityLoss(elsewhere[0], alpha=2.0)
    inner.consolidate(loaded, prefix="0.")
    assert torch.equal(inner.theta_hat["weight"].double(), at["0.weight"])
    short = loaded.select(["0.weight"]).rename(lambda n: n.removeprefix("0."))
    assert torch.equal(short.theta_hat["weight"].double(), at["0.weight"].cpu())
    loaded.save(tmp_path / "again")
    assert wplfast.Fisher.load(tmp_path / "again").theta_hat.keys() == at.keys()


def test_without_kept_anchors_it_is_anchored_where_the_parameters_are(tmp_path):
    module = trunk()
    fisher = wplfast.Fisher(random_fisher(module), 7, parameters=dict(module.named_parameters()))
    fisher.save(tmp_path / "f")
    loaded = wplfast.Fisher.load(tmp_path / "f")
    assert loaded.theta_hat is None
    wpl = wplfast.WeightPlasticityLoss(module)
    wpl.consolidate(loaded)
    assert wpl().item() == 0


def test_anchors_that_cannot_be_kept_or_used(tmp_path):
    module = trunk()
    fisher = wplfast.Fisher(random_fisher(module), 7)
    with pytest.raises(NameMismatchError, match="theta_hat lacks 5 of 5"):
        fisher.save(tmp_path / "f", theta_hat=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"theta_hat\['0.weight'\] must have shape \[7, 5\] as its Fisher, got \[1\]"):
        fisher.save(tmp_path / "f", theta_hat={**dict(module.named_parameters()), "0.weight": torch.ones(1)})
    assert not os.listdir(tmp_path)
    with pytest.raises(NameMismatchError, match="theta_hat lacks"):
        wplfast.Fisher({"a": torch.ones(1)}, 1, theta_hat={})
    with torch.no_grad():
        module[0].bias[0] = float("nan")
    fisher.save(tmp_path / "f", theta_hat=module)
    wpl = wplfast.WeightPlasticityLoss(trunk())
    with pytest.raises(NonFiniteError, match=r"theta_hat\['0.bias'\]"):
        wpl.consolidate(wplfast.Fisher.load(tmp_path / "f"))
    assert wpl.n_anchors == 0


def test_fishers_add_up_if_they_belong_to_the_same_values(tmp_path):
    module = trunk()
    parts = []
    for name in "ab":
        wplfast.Fisher(random_fisher(module), 2).save(tmp_path / name, theta_hat=module)
        parts.append(wplfast.Fisher.load(tmp_path / name))
    assert (parts[0] + parts[1]).theta_hat.keys() == parts[0].theta_hat.keys()
    assert (parts[0] + wplfast.Fisher(random_fisher(module), 2)).theta_hat is not None
    move(module)
    wplfast.Fisher(random_fisher(module), 2).save(tmp_path / "c", theta_hat=module)
    with pytest.raises(ValueError, match=r"different models do not add up: theta_hat\['0.weight'\] differs"):
        parts[0] + wplfast.Fisher.load(tmp_path / "c")


# ---- assign=True -----------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model that holds its own penalty, registered last or first."""

    def __init__(self, last=True, **settings):
        super().__init__()
        net = model()
        if last:
            self.net = net
        self.wpl = wplfast.WeightPlasticityLoss(self if last else net, **settings)
        self.net = net


def moved_state(holder):
    """A state whose parameters are elsewhere than the anchors are."""
    return {key: value.clone() if key.startswith("wpl.") else value + 1 for key, value in holder.state_dict().items()}


def value_by_hand(wpl, parameters):
    pairs = ((wpl.fisher[n], (p - wpl.theta_hat[n])) for n, p in parameters.items())
    return float(wpl.alpha) / 2 * sum(float((f * d.detach().square()).sum()) for f, d in pairs)


@pytest.mark.parametrize("settings", [{}, {"alpha": 3.0}])
@pytest.mark.parametrize("whole", [True, False], ids=["with its state", "without"])
def test_assigned_parameters_are_followed_by_the_penalty_in_their_model(settings, whole):
    saved, here = Holder(**settings), Holder(**settings)
    for holder in (saved, here):
        holder.wpl.consolidate(random_fisher(holder))
    handle = here.wpl.subset(["net.body.weight"])
    old = dict(here.named_parameters())
    state = moved_state(saved)
    state = state if whole else {key: value for key, value in state.items() if not key.startswith("wpl.")}
    here.load_state_dict(state, strict=whole, assign=True)
    now = dict(here.named_parameters())
    assert all(now[name] is not old[name] for name in now)
    assert here.wpl().item() == pytest.approx(value_by_hand(here.wpl, now), rel=1e-5)
    assert torch.equal(here.wpl.fisher["net.body.bias"], (saved if whole else here).wpl.fisher["net.body.bias"])
    here.wpl.add_grad_()
    assert all(p.grad is not None for p in now.values())
    assert all(p.grad is None for p in old.values())
    assert handle().item() > 0
    assert dict(handle)["net.body.weight"] is now["net.body.weight"]
    here.wpl.consolidate(random_fisher(here), anchor="replace")
    assert here.wpl().item() == 0


def test_parameters_that_are_assigned_after_the_penalty_was_loaded_are_told_of():
    holder = Holder(last=False)
    holder.wpl.consolidate(random_fisher(holder.net))
    holder.load_state_dict(moved_state(holder), assign=True)
    for use in (holder.wpl, holder.wpl.add_grad_):
        with pytest.raises(StaleParameterError, match=r"'body.weight'.*rebind"):
            use()
    holder.wpl.rebind(holder.net)
    parameters = dict(holder.net.named_parameters())
    assert holder.wpl().item() == pytest.approx(value_by_hand(holder.wpl, parameters), rel=1e-5)


def test_a_penaltys_own_state_may_be_assigned():
    first, second = Holder(), Holder()
    first.wpl.consolidate(random_fisher(first))
    state = first.wpl.state_dict()
    second.wpl.load_state_dict(state, assign=True)
    assert second.wpl().item() == pytest.approx(value_by_hand(second.wpl, dict(second.named_parameters())), rel=1e-5)
    before = second.wpl().item()
    for tensor in state.values():
        tensor.zero_()
    assert second.wpl().item() == before  # nothing of the caller's is kept


def test_a_name_that_is_gone_is_told_of_where_parameters_are_assigned():
    holder = Holder()
    holder.wpl.consolidate(random_fisher(holder))
    state = moved_state(holder)
    holder.net["head"] = nn.Identity()
    with pytest.raises(NameMismatchError, match=r"lacks 2 of 4 names: \['net.head.weight'"):
        holder.load_state_dict(state, strict=False, assign=True)


def test_a_penalty_inside_of_a_model_in_get_model_state_dict():
    """It looks for an attribute of every key, and would say that a penalty has no attribute 'version'."""
    distributed = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = nn.Sequential(nn.Linear(2, 1))
    model.add_module("wpl", wplfast.WeightPlasticityLoss(dict(model.named_parameters())))
    with pytest.raises(wplfast.errors.WplfastError, match=r"get_model_state_dict takes .* Save model.state_dict\(\)"):
        distributed.get_model_state_dict(model)
    assert distributed.set_model_state_dict(model, model.state_dict()).missing_keys == []


@pytest.mark.parametrize("archive", [True, False])
def test_files_of_others_are_told_from_damaged_ones(tmp_path, archive):
    fisher = wplfast.Fisher({"a": torch.ones(2)}, 1)
    wpl = wplfast.WeightPlasticityLoss({"a": torch.ones(2, requires_grad=True)})
    torch.save(dict(fisher), tmp_path / "pt", _use_new_zipfile_serialization=archive)
    for load, name in ((wplfast.Fisher.load, "Fisher"), (wpl.load, "WeightPlasticityLoss")):
        with pytest.raises(ValueError, match=rf"one of torch\.save, which torch\.load reads; {name}\.save writes"):
            load(tmp_path / "pt")
    fisher.save(tmp_path / "f")
    wpl.save(tmp_path / "w")
    with pytest.raises(ValueError, match=r"got kind 'penalty', version '1'; load it with WeightPlasticityLoss\.load"):
        wplfast.Fisher.load(tmp_path / "w")
    with pytest.raises(ValueError, match=r"got kind 'fisher', version '1'; load it with wplfast\.Fisher\.load"):
        wpl.load(tmp_path / "f")
