"""Penalties that would silently not be there: names left over, modules that grew, nothing to be anchored to."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from penalty_cases import anchored, copied, enter, expected, move, random_fisher, same_state, trunk, values
from torch import nn

import wplfast
from wplfast.errors import NameMismatchError, StaleParameterError

BEFORE, FROZEN, ZERO = "before any consolidate", "requires grad", "consolidated is zero"


def ones(module):
    return {n: torch.ones_like(p) for n, p in module.named_parameters()}


def said(caplog, text):
    return sum(text in message for message in caplog.messages)


# ---- modules that grew -----------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A model whose parts come in every form that a module may hold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Identity())
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2)})
        self.tokens = nn.ParameterList([torch.randn(3)])
        self.more = None


GROWTH = {
    "a head": (lambda m: m.heads.update({"b": nn.Linear(4, 2)}), ["heads.b.weight", "heads.b.bias"]),
    "an identity's place": (lambda m: m.body.__setitem__(1, nn.Linear(4, 4)), ["body.1.weight", "body.1.bias"]),
    "at the end": (lambda m: m.body.append(nn.PReLU()), ["body.2.weight"]),
    "a parameter": (lambda m: setattr(m, "scale", nn.Parameter(torch.ones(2))), ["scale"]),
    "in a list": (lambda m: m.tokens.append(nn.Parameter(torch.ones(2))), ["tokens.1"]),
    "an adapter in a layer": (
        lambda m: setattr(m.body[0], "lora", nn.Linear(2, 2, bias=False)),
        ["body.0.lora.weight"],
    ),
    "registered": (lambda m: m.register_parameter("z", nn.Parameter(torch.ones(1))), ["z"]),
}


@pytest.mark.parametrize("use", ["call", "add_grad_", "subset", "consolidate", "rebind"])
@pytest.mark.parametrize("growth", GROWTH)
def test_a_module_that_grew_is_an_error_until_its_parameters_join(growth, use):
    module = Branching()
    wpl = wplfast.WeightPlasticityLoss(module, alpha=2.0)
    anchors = [enter(wpl, module), enter(wpl, module)]
    handle = wpl.subset(["body.0.weight"])
    handle()
    grow, names = GROWTH[growth]
    grow(module)
    uses = {"call": wpl, "add_grad_": wpl.add_grad_, "subset": handle, "rebind": lambda: wpl.rebind(module)}
    uses["consolidate"] = lambda: wpl.consolidate(ones(module))
    with pytest.raises((StaleParameterError, NameMismatchError), match=r"does not cover: \['" + names[0]) as caught:
        uses[use]()
    assert "new='add'" in str(caught.value)
    assert "Weight" in repr(wpl)
    wpl.rebind(module, new="add")
    assert wpl.n_anchors == 2
    assert list(wpl.fisher)[-len(names) :] == names
    old = [n for n in wpl.fisher if n not in names]
    assert wpl().item() == pytest.approx(expected(module, anchors, names=old).item(), rel=1e-5)
    move(module)  # those that joined are free
    assert wpl().item() == pytest.approx(expected(module, anchors, names=old).item(), rel=1e-5)
    wpl.add_grad_()
    parameters = dict(module.named_parameters())
    assert all(not parameters[n].grad.any() for n in names)
    last = enter(wpl, module)  # and now they are anchored
    value = expected(module, anchors, names=old) + expected(module, [last])
    assert wpl().item() == pytest.approx(value.item(), rel=1e-5)


def test_modules_that_grew_elsewhere_cost_one_look_and_no_error():
    module, other = trunk(), nn.Sequential(nn.Linear(2, 2))
    wpl = anchored(module)
    value = wpl().item()
    other.append(nn.Linear(2, 2))
    module.note = nn.Identity()
    module.other_name_of_the_same = module[0]
    assert wpl().item() == value
    wpl.consolidate(random_fisher(module))


def test_frozen_parts_are_no_news_until_a_fisher_names_them():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    module["b"].requires_grad_(False)
    wpl = wplfast.WeightPlasticityLoss(module)
    wpl.consolidate(ones(module["a"]) | ones(module), extra="ignore")
    module["b"].requires_grad_(True)  # as in progressive unfreezing
    module["a"].extra = nn.Identity()
    assert wpl().item() == 0
    with pytest.raises(NameMismatchError, match=r"2 names that this penalty does not cover: \['b.weight', 'b.bias'\]"):
        wpl.consolidate(ones(module))
    wpl.rebind(module, new="add")
    wpl.consolidate(ones(module))
    assert set(wpl.fisher) == set(ones(module))


def test_a_deep_copy_follows_its_own_module():
    module = trunk()
    module.wpl = anchored(module)
    twin = copy.deepcopy(module)
    twin.append(nn.Linear(2, 2))
    module.wpl()
    with pytest.raises(StaleParameterError, match=r"\['5.weight', '5.bias'\]"):
        twin.wpl()
    other = copy.deepcopy(module)
    other.wpl()
    other.append(nn.Linear(2, 2))
    with pytest.raises(StaleParameterError, match="new='add'"):
        other.wpl.add_grad_()


@pytest.mark.parametrize("alpha", [2.0, {"": 2.0, "b": 7.0}], ids=["one alpha", "by prefix"])
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_what_joins_takes_its_strength_by_prefix(alpha, l2):
    module = nn.ModuleDict({"a": nn.Linear(2, 2)})
    wpl = wplfast.WeightPlasticityLoss(module, alpha=alpha, l2=l2)
    anchor = enter(wpl, module)
    module["b"] = nn.Linear(2, 2)
    wpl.rebind(module, new="add")
    last = enter(wpl, module)
    strength = {n: 7.0 if isinstance(alpha, dict) and n.startswith("b") else 2.0 for n in ones(module)}
    old = ["a.weight", "a.bias"]
    value = expected(module, [anchor], 2.0, names=old) + expected(module, [last], strength, l2)
    assert wpl().item() == pytest.approx(value.item(), rel=1e-5)
    if isinstance(alpha, dict):
        wpl.alpha = {"a": 1.0, "b": 1.0}
        module["c"] = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"no prefix for 'c.weight'"):
            wpl.rebind(module, new="add")


# ---- rebind ----------------------------------------------------------------------------------------------------------


def test_rebind_to_more_than_the_penalty_covers():
    part, head = nn.Linear(3, 3), nn.Linear(3, 3)
    wpl = anchored(part)
    before = copied(wpl.state_dict())
    model = nn.ModuleDict({"trunk": part, "head": head})
    with pytest.raises(NameMismatchError, match=r"as 'trunk.weight' .* pass that part alone, model.trunk"):
        wpl.rebind(model)
    for more in (dict(part.named_parameters()) | {"x": head.weight}, [*part.named_parameters(), ("x", head.weight)]):
        with pytest.raises(NameMismatchError, match=r"1 names that this penalty does not cover: \['x'\]; new='add'"):
            wpl.rebind(more)
        with pytest.raises(NameMismatchError, match=r"not cover: \['x'\]"):
            wpl.rebind(more, missing="drop")
    with pytest.raises(ValueError, match="new must be 'error' or 'add', got 'ignore'"):
        wpl.rebind(part, new="ignore")
    assert same_state(wpl, before)
    wpl.rebind(more, new="add")
    assert list(wpl.fisher) == ["weight", "bias", "x"]


def test_rebind_adds_and_drops_at_once():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    wpl = wplfast.WeightPlasticityLoss(module)
    anchor = enter(wpl, module)
    del module["a"]
    module["c"] = nn.Linear(2, 2)
    with pytest.raises(StaleParameterError, match=r"no longer holds 'a.weight'; call rebind\(module, missing='drop'\)"):
        wpl()
    for options in ({}, {"new": "add"}, {"missing": "drop"}):
        with pytest.raises(NameMismatchError):
            wpl.rebind(module, **options)
    wpl.rebind(module, new="add", missing="drop")
    assert list(wpl.fisher) == ["b.weight", "b.bias", "c.weight", "c.bias"]
    names = ["b.weight", "b.bias"]
    assert wpl().item() == pytest.approx(expected(module, [anchor], 1.0, names=names).item(), rel=1e-5)


def test_rebind_takes_a_modules_frozen_parameters_that_it_covers():
    module = trunk()
    wpl = anchored(module)
    module[0].requires_grad_(False)
    twin = copy.deepcopy(module)
    for missing in ("error", "drop"):
        wpl.rebind(twin, missing=missing)
        assert len(wpl.fisher) == len(list(module.parameters()))
    twin.requires_grad_(False)
    wpl.rebind(twin)


def test_joining_before_any_anchor_and_a_subset_after_it():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    wpl = wplfast.WeightPlasticityLoss({"a": a}, l2=1.0)
    handle = wpl.subset(["a"])
    handle()
    wpl.rebind({"b": b, "a": a}, new="add")
    assert wpl().item() == pytest.approx(2.5)
    assert handle().item() == pytest.approx(1.0)
    wpl.consolidate({"a": torch.ones(2), "b": torch.ones(3)})
    assert list(wpl.fisher) == ["a", "b"]


# ---- names that a Fisher has beside ----------------------------------------------------------------------------------


def test_a_grown_heads_fisher_is_not_dropped_in_silence():
    wpl = anchored(trunk())
    fisher = random_fisher(trunk()) | {"4.weight": torch.ones(2, 2)}
    before = copied(wpl.state_dict())
    for call in (wpl.consolidate, wpl.update):
        with pytest.raises(NameMismatchError, match=r"not cover: \['4.weight'\]; it covers .*extra='ignore'"):
            call(fisher)
        with pytest.raises(ValueError, match="extra must be"):
            call(fisher, extra="drop")
    assert same_state(wpl, before)
    wpl.consolidate(fisher, extra="ignore")
    wpl.update(fisher, extra="ignore")
    assert wpl.n_anchors == 1


def test_extra_names_are_seen_behind_identity_prefixes_and_active_sets():
    part, head = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(OrderedDict(trunk=part, head=head))
    wpl = wplfast.WeightPlasticityLoss(part)
    fisher = wplfast.Fisher(ones(model), 1, parameters=dict(model.named_parameters()))
    with pytest.raises(NameMismatchError, match=r"not cover: \['head.weight', 'head.bias'\]"):
        wpl.consolidate(fisher)
    wpl.consolidate(fisher.select(["trunk.weight", "trunk.bias"]))
    wpl.consolidate(fisher, extra="ignore")
    wpl.consolidate(ones(model), prefix="trunk.")  # names elsewhere belong to others
    with pytest.raises(NameMismatchError, match=r"not cover: \['trunk.more'\]"):
        wpl.consolidate(ones(model) | {"trunk.more": torch.ones(2)}, prefix="trunk.")
    wpl.consolidate(ones(part), active=["bias"])  # covered, but not asked for
    with pytest.raises(NameMismatchError, match=r"not cover: \['x'\]"):
        wpl.consolidate(ones(part) | {"x": torch.ones(2)}, active=["bias"])
    # "weight" is another parameter's name there: the penalty's own was found as trunk.weight
    strange = wplfast.Fisher(
        ones(part) | {"trunk.weight": torch.ones(2, 2), "trunk.bias": torch.ones(2)},
        1,
        parameters={"trunk.weight": part.weight, "trunk.bias": part.bias},
    )
    with pytest.raises(NameMismatchError, match=r"not cover: \['weight', 'bias'\]"):
        wpl.consolidate(strange)


# ---- said once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("use", ["call", "add_grad_", "subset", "compiled"])
def test_a_penalty_without_anchors_says_so_once(caplog, use, l2):
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module, l2=l2)
    uses = {"call": wpl, "add_grad_": wpl.add_grad_, "subset": wpl.subset(["0.weight"])}
    uses["compiled"] = torch.compile(lambda: wpl() * 1.0, backend="eager", fullgraph=True)
    assert not said(caplog, BEFORE)
    for _ in range(3):
        uses[use]()
    assert said(caplog, BEFORE) == 1
    assert all(r.name.startswith("wplfast.") for r in caplog.records if r.levelname == "WARNING")
    wplfast.WeightPlasticityLoss(module)()
    assert said(caplog, BEFORE) == 2


def test_a_penalty_that_was_anchored_says_nothing(caplog, tmp_path):
    module = trunk()
    wpl = anchored(module)
    wpl.save(tmp_path / "wpl")
    wpl()
    wpl.alpha = 0.0
    wpl.add_grad_()
    wpl.reset()  # on purpose
    wpl()
    other, third = (wplfast.WeightPlasticityLoss(module) for _ in range(2))
    other.load(tmp_path / "wpl")
    other()
    third.load_state_dict(other.state_dict())
    third()
    assert wpl(active=[]).item() == 0
    assert not caplog.messages


def test_a_fisher_that_is_zero_says_so_once(caplog):
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    zero = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    wpl.consolidate(zero | {"0.bias": torch.ones(7)})
    assert not said(caplog, ZERO)
    for _ in range(2):
        wpl.consolidate(zero)
    assert said(caplog, ZERO) == 1


@pytest.mark.parametrize("use", ["call", "add_grad_", "subset"])
def test_a_penalty_whose_parameters_are_all_frozen_says_so_once(caplog, use):
    module = trunk()
    wpl = anchored(module)
    uses = {"call": wpl, "add_grad_": wpl.add_grad_, "subset": wpl.subset(["0.weight", "0.bias"])}
    module[0].weight.requires_grad_(False)
    uses[use]()
    module.requires_grad_(False)
    with torch.no_grad():
        wpl()  # a value is all that is wanted
    assert not said(caplog, FROZEN)
    for _ in range(3):
        uses[use]()
    assert said(caplog, FROZEN) == 1


def test_a_penalty_over_a_state_dict_says_that_nothing_is_trained(caplog):
    module = trunk()
    wplfast.WeightPlasticityLoss({name: p.detach() for name, p in module.named_parameters()})
    wplfast.WeightPlasticityLoss(module.state_dict(keep_vars=True))
    assert not said(caplog, FROZEN)
    wpl = wplfast.WeightPlasticityLoss(module.state_dict())
    assert said(caplog, "a state_dict() holds tensors without grad") == 1
    wpl.consolidate(random_fisher(module))
    wpl.add_grad_()
    assert said(caplog, "a state_dict() holds tensors without grad") == 1


# ---- what is given in the place of something else --------------------------------------------------------------------


WRONG = {
    "a path": (lambda m: "f.safetensors", r"got str: load it first: wplfast.Fisher.load\('f.safetensors'\)"),
    "a Path": (lambda m: Path("a") / "f", r"Path: load it first: wplfast.Fisher.load\('a/f'\)"),
    "a module": (lambda m: m, r"got Sequential: pass its Fisher: wplfast.fisher_diagonal"),
    "an accumulator": (wplfast.FisherAccumulator, r"got FisherAccumulator: pass what its result\(\) returns"),
    "a tensor": (lambda m: torch.ones(3), "got Tensor: pass a Fisher, or {name: tensor}"),
    "pairs": (lambda m: list(random_fisher(m).items()), "got list: pass a Fisher"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_fisher_is_an_error_that_says_what_to_do(wrong):
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    make, match = WRONG[wrong]
    for call in (wpl.consolidate, wpl.update):
        with pytest.raises(TypeError, match=match):
            call(make(module))
    with pytest.raises(TypeError, match=r"theta_hat must map names to tensors, got Sequential: .*state_dict\(\)"):
        wpl.consolidate(random_fisher(module), theta_hat=module)


def test_a_penalty_takes_no_inputs():
    module = trunk()
    module.append(anchored(module))
    with pytest.raises(TypeError, match="got a Tensor: the penalty takes no inputs"):
        module(torch.randn(2, 7, 5))


def test_functional_takes_lists_and_says_how_to_make_them():
    module = nn.Linear(2, 2)
    lists = (
        [p for _, p in module.named_parameters()],
        [torch.zeros(2, 2), torch.zeros(2)],
        [torch.ones(2, 2), torch.ones(2)],
    )
    value = wplfast.functional.wpl_penalty(*lists, 1.0)
    assert torch.equal(wplfast.functional.wpl_penalty(nn.ParameterList(lists[0]), *map(tuple, lists[1:]), 1.0), value)
    for wrong, match in (
        (ones(module), r"params must be a list of tensors, got dict: .*\[params\[n\] for n in names\]"),
        (module, r"got Linear: pass list\(module.parameters\(\)\)"),
        (nn.ParameterDict(ones(module)), "got ParameterDict"),
        (torch.ones(2), r"got Tensor: pass \[tensor\]"),
        (module.parameters(), r"got generator: pass list\(...\)"),
    ):
        with pytest.raises(TypeError, match=match):
            wplfast.functional.wpl_penalty(wrong, *lists[1:], 1.0)
    with pytest.raises(TypeError, match="fisher must be a list"):
        wplfast.functional.wpl_penalty(*lists[:2], ones(module), 1.0)


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_a_shallow_copy_has_anchors_of_its_own():
    module = trunk()
    wpl = anchored(module, anchors=2)
    before, value = copied(wpl.state_dict()), wpl().item()
    twin = copy.copy(wpl)
    assert twin().item() == value
    for how in ("merge", "replace"):
        twin.consolidate({n: 9 * f for n, f in random_fisher(module).items()}, anchor=how)
    twin.alpha = 0.0
    assert same_state(wpl, before)
    assert wpl().item() == value
    module.wpl = wpl
    assert copy.copy(module).wpl is wpl


def test_copies_of_a_model_have_a_penalty_that_is_there():
    model = trunk()
    model.wpl = anchored(model)
    value = model.wpl().item()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    move(model)
    average.update_parameters(model)
    anchor = [(model.wpl.theta_hat, model.wpl.fisher)]
    for each in (model, average.module, copy.deepcopy(average).module):
        assert each.wpl().item() == pytest.approx(expected(each, anchor).item(), rel=1e-5)
        assert each.wpl().item() != value
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for again in (torch.load(saved, weights_only=False), pickle.loads(pickle.dumps(model))):
        for use in (again.wpl, again.wpl.add_grad_):
            with pytest.raises(StaleParameterError, match="call rebind"):
                use()
        again.wpl.rebind(again)
        assert again.wpl().item() == model.wpl().item()
        again.append(nn.Linear(2, 2))
        with pytest.raises(StaleParameterError, match="new='add'"):
            again.wpl()


def test_tied_weights_that_are_untied_and_tied_again():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    wpl = wplfast.WeightPlasticityLoss(model)
    assert enter(wpl, model)[1].keys() == {"embed.weight"}
    model["head"].weight = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(StaleParameterError, match=r"\['head.weight'\]"):
        wpl()
    model["head"].weight = model["embed"].weight
    wpl()
    model["embed"].weight = nn.Parameter(values(model)["embed.weight"].float())
    with pytest.raises(StaleParameterError, match=r"another tensor as 'embed.weight'"):
        wpl()
    with pytest.raises(NameMismatchError, match=r"\['head.weight'\]"):
        wpl.rebind(model)
