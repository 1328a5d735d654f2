"""Anchors: which Fisher is whose, how anchors add up, what scales them, what is refused and changes nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from penalty_cases import anchored, copied, enter, expected, gradients, move, random_fisher, same_state, trunk, values
from torch import nn

import wplfast
from wplfast.errors import NameMismatchError, NonFiniteError


@pytest.fixture
def module():
    return trunk()


# ---- names -------------------------------------------------------------------------------------------------


def test_names_by_identity_come_before_names_as_written(tmp_path):
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    numbers = {"a": torch.full((3,), 1.0), "b": torch.full((3,), 2.0)}
    fisher = wplfast.Fisher(numbers, 1, parameters={"a": first, "b": second})
    fisher.save(tmp_path / "fisher")
    loaded = wplfast.Fisher.load(tmp_path / "fisher")  # a file has names alone
    for given, of_b, of_a in ((fisher, 1.0, 2.0), (loaded, 2.0, 1.0)):
        wpl = wplfast.WeightPlasticityLoss({"b": first, "a": second})  # the other way round
        wpl.consolidate(given)
        assert [wpl.fisher[name].tolist() for name in "ba"] == [[of_b] * 3, [of_a] * 3]


def test_one_entry_is_not_taken_for_two_parameters():
    known, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    fisher = wplfast.Fisher({"0.weight": torch.ones(3)}, 1, parameters={"0.weight": known})
    wpl = wplfast.WeightPlasticityLoss({"0.weight": new, "1.weight": known})
    with pytest.raises(NameMismatchError):
        wpl.consolidate(fisher)


def test_a_fisher_of_the_whole_model_is_matched_by_identity(module):
    model = nn.Sequential(OrderedDict(fc=module[0], activation=nn.Tanh(), head=nn.Linear(7, 3)))
    data = [(torch.randn(4, 5), torch.randint(0, 3, (4,)))]
    fisher = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)  # named fc.weight, ...
    wpl = wplfast.WeightPlasticityLoss(module[0])  # named weight, bias
    wpl.consolidate(fisher, extra="ignore")
    assert torch.equal(wpl.fisher["weight"], fisher["fc.weight"])


def test_a_fisher_of_other_parameters_of_the_same_names_is_said_to_be_matched_by_name(module, caplog, tmp_path):
    fisher = wplfast.Fisher(random_fisher(module), 1, parameters=dict(module.named_parameters()))
    fisher.save(tmp_path / "fisher")
    twin = wplfast.WeightPlasticityLoss(copy.deepcopy(module))
    for given, penalty, said in (
        (fisher, twin, True),
        (wplfast.Fisher.load(tmp_path / "fisher"), twin, False),  # a file knows no parameters
        (fisher, wplfast.WeightPlasticityLoss(module), False),
    ):
        caplog.clear()
        with caplog.at_level("INFO", "wplfast"):
            penalty.consolidate(given)
        assert ("matched by name" in caplog.text) == said


def test_given_anchor_values_and_a_prefix_that_the_error_proposes(module):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0)
    fisher, hat = random_fisher(module), {n: torch.randn(p.shape) for n, p in module.named_parameters()}
    longer, longer_hat = ({f"model.trunk.{n}": t for n, t in tensors.items()} for tensors in (fisher, hat))
    with pytest.raises(NameMismatchError, match=r"prefix='model.trunk.' would match") as caught:
        wpl.consolidate(longer, theta_hat=hat)
    assert "'0.weight'" in str(caught.value)
    assert "'model.trunk.0.weight'" in str(caught.value)
    assert wpl.n_anchors == 0
    wpl.consolidate(longer, theta_hat=longer_hat, prefix="model.trunk.")
    assert wpl().item() == pytest.approx(expected(module, [(hat, fisher)], 1.0).item(), rel=1e-6)


def test_any_mapping_will_do(module):
    fisher, (one, other) = random_fisher(module), (wplfast.WeightPlasticityLoss(module) for _ in range(2))
    one.consolidate(fisher)
    other.consolidate(OrderedDict(reversed(fisher.items())), theta_hat=module.state_dict())
    assert same_state(one, other)


def test_its_own_tensors_may_be_given(module):
    wpl, other = (wplfast.WeightPlasticityLoss(module, alpha=3.0) for _ in range(2))
    for penalty in (wpl, other):
        penalty.consolidate({n: torch.ones(p.shape) for n, p in module.named_parameters()})
    move(module)
    for anchor in ("replace", "merge"):
        other.consolidate(copied(other.fisher), anchor=anchor, decay=0.5, weight=2.0)
        wpl.consolidate(wpl.fisher, anchor=anchor, decay=0.5, weight=2.0)
        assert same_state(wpl, other)
    wpl = anchored(nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)}))
    swapped = dict(zip(wpl.theta_hat, reversed(list(wpl.theta_hat.values())), strict=True))
    wanted = copied(swapped)
    wpl.consolidate(wpl.fisher, theta_hat=swapped, anchor="replace")
    assert all(torch.equal(hat, wanted[n]) for n, hat in wpl.theta_hat.items())


# ---- several anchors ---------------------------------------------------------------------------------------


def drifting(dtype, scales, fisher_dtype=None):
    """Consolidate along a random walk; return the errors of the value, of the gradient, and beyond its storage type."""
    module = nn.ParameterList([torch.randn(shape).to(dtype) for shape in ((4000,), (7, 5), (3, 7, 2))])
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0, fisher_dtype=fisher_dtype)
    anchors = []
    for scale in scales:
        fisher = {n: scale * torch.rand(p.shape) ** 4 for n, p in module.named_parameters()}
        fisher["0"][::10] = 0  # never anchored
        anchors.append(enter(wpl, module, fisher, by=0.02))
    exact, value = expected(module, anchors, 1.0).item(), wpl()
    value.backward()
    assert wpl.n_anchors == len(scales)
    assert module[0].grad[::10].abs().max() == 0
    found = torch.cat([p.grad.double().flatten() for p in module])
    wanted = [sum(f[n].double() * (p - hat[n]) for hat, f in anchors) for n, p in values(module).items()]
    wanted = torch.cat([w.flatten() for w in wanted])
    size = wanted.norm()
    return (
        abs(value.item() - exact) / exact,
        ((found - wanted).norm() / size).item(),
        ((found - wanted.to(dtype).double()).norm() / size).item(),
    )


STEPS = {"one": [1.0], "six of unlike sizes": [10.0**k for k in range(-3, 3)], "fifty": [1.0] * 50}


@pytest.mark.parametrize("scales", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_anchors_are_the_exact_sum(dtype, scales):
    value, gradient, beyond_storage = drifting(dtype, scales)
    assert value <= 1e-6
    if dtype == torch.float32:
        assert gradient <= 1e-5
    else:  # a gradient in 8 or 11 bits is off by its rounding; what is more than that is ours
        assert beyond_storage <= torch.finfo(dtype).eps / 16


@pytest.mark.parametrize(("steps", "value_bound", "gradient_bound"), [("one", 5e-4, 3e-3), ("fifty", 1e-2, 3e-2)])
def test_a_fisher_in_bfloat16(steps, value_bound, gradient_bound):
    """One rounding is 2^-8 at most, and averages out in the value; fifty of them pile up where F has grown large."""
    value, gradient, _ = drifting(torch.float32, STEPS[steps], torch.bfloat16)
    assert value <= value_bound
    assert gradient <= gradient_bound


def test_replace_decay_and_weight(module):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0)
    _, first = enter(wpl, module)
    hat, second = enter(wpl, module, anchor="replace", decay=0.5, weight=3.0)
    online = {n: 0.5 * first[n] + 3.0 * second[n] for n in first}
    assert wpl.n_anchors == 1
    assert wpl().item() == pytest.approx(expected(module, [(hat, online)], 1.0).item(), rel=1e-6)
    anchors = [(hat, online)]
    for _ in range(2):  # merges: what the first leaves as a constant fades in the second
        newest, fisher = enter(wpl, module, decay=0.5, weight=2.0)
        anchors = [(h, {n: 0.5 * f for n, f in each.items()}) for h, each in anchors]
        anchors.append((newest, {n: 2.0 * f for n, f in fisher.items()}))
    assert wpl().item() == pytest.approx(expected(module, anchors, 1.0).item(), rel=1e-6)


def test_running_fisher(module):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0)
    running, sub = {n: torch.zeros(p.shape) for n, p in module.named_parameters()}, ["0.weight", "2.bias"]
    hat = values(module)
    for step, rate in enumerate((0.9, 0.9, 0.25)):
        active = sub if step == 1 else list(running)
        fisher = random_fisher(module)
        wpl.update(fisher, rate, active=active)
        now = values(module)
        running |= {n: (1 - rate) * running[n] + rate * fisher[n] for n in active}
        hat |= {n: now[n] for n in active}
        move(module)
    assert wpl.n_anchors == 1
    for n, f in wpl.fisher.items():
        torch.testing.assert_close(f, running[n])
    assert wpl().item() == pytest.approx(expected(module, [(hat, running)], 1.0).item(), rel=1e-6)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got"):
            wpl.update(running, rate)


@pytest.mark.parametrize(("target", "rate", "too_slow"), [(2.0, 2**-4, 2**-5), (0.7, 0.1, 0.01)])
def test_a_running_fisher_in_bfloat16_arrives_or_says_that_it_would_not(module, target, rate, too_slow):
    wpl = wplfast.WeightPlasticityLoss(module, fisher_dtype=torch.bfloat16)
    ones = {n: torch.ones(p.shape) for n, p in module.named_parameters()}
    wpl.consolidate(ones)
    for _ in range(300):
        wpl.update({n: target * f for n, f in ones.items()}, rate=rate)
    for f in wpl.fisher.values():
        torch.testing.assert_close(f.float(), torch.full_like(f, target).float(), rtol=0.05, atol=0.0)
    with pytest.raises(ValueError, match="would not move far at a rate below"):
        wpl.update(ones, rate=too_slow)


# ---- scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["merge", "replace"])
def test_clipping_by_norm_scales_a_parameters_whole_penalty(module, anchor):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=2.0)
    anchors = []
    for scale in (1.0, 10.0):
        fisher = {n: scale * f for n, f in random_fisher(module).items()}
        anchors.append(enter(wpl, module, fisher, anchor=anchor, clip_norm=5.0))
        if anchor == "replace":
            anchors = [(anchors[-1][0], {n: sum(f[n] for _, f in anchors) for n in fisher})]
        norms = {n: sum(f[n] for _, f in anchors).norm().item() for n in fisher}
        factors = {n: min(1.0, 5.0 / norm) for n, norm in norms.items()}
        anchors = [(hat, {n: factors[n] * f[n] for n in f}) for hat, f in anchors]
    assert min(factors.values()) < 0.3 < max(factors.values())
    for n, f in wpl.fisher.items():
        assert f.norm().item() == pytest.approx(min(norms[n], 5.0), rel=1e-5)
    exact = expected(module, anchors, 2.0)
    assert wpl().item() == pytest.approx(exact.item(), rel=1e-5)
    wanted = gradients(module, exact)
    for name, g in gradients(module, wpl()).items():
        torch.testing.assert_close(g, wanted[name].float(), rtol=1e-5, atol=1e-6, msg=name)


def test_clipping_leaves_a_fisher_of_zero_and_survives_a_huge_one():
    w = torch.ones(4, requires_grad=True)
    wpl = wplfast.WeightPlasticityLoss({"w": w})
    wpl.consolidate({"w": torch.zeros(4)}, clip_norm=1.0)
    assert torch.equal(wpl.fisher["w"], torch.zeros(4))
    wpl.consolidate({"w": torch.full((4,), 1e30)}, clip_norm=1.0)
    torch.testing.assert_close(wpl.fisher["w"], torch.full((4,), 0.5))


@pytest.mark.parametrize("by", ["trace", "max"])
def test_normalization(module, by):
    wpl = wplfast.WeightPlasticityLoss(module)
    _, fisher = enter(wpl, module)
    scaled = {n: 1e-6 * f for n, f in random_fisher(module).items()}
    flat = torch.cat([f.flatten() for f in scaled.values()]).double()
    factor = 1 / (flat.mean() if by == "trace" else flat.max())
    wpl.consolidate(scaled, normalize=by)
    for n, f in wpl.fisher.items():
        torch.testing.assert_close(f, (fisher[n] + factor * scaled[n]).float())
    with pytest.raises(ValueError, match="zero everywhere cannot be normalised"):
        wpl.consolidate({n: torch.zeros_like(f) for n, f in fisher.items()}, normalize=by)
    with pytest.raises(ValueError, match="normalize must be"):
        wpl.consolidate(fisher, normalize="sum")


# ---- what is refused ---------------------------------------------------------------------------------------


def test_a_failed_consolidate_changes_nothing(module):
    wpl = anchored(module, l2=0.1)
    before, value = copied(wpl.state_dict()), wpl().item()
    good = random_fisher(module)
    last = "3.weight"
    cases = [
        ({**good, last: torch.zeros(4)}, ValueError, r"fisher\['3.weight'\] must be .*\[2, 2\], got .*\[4\]"),
        ({**good, last: -torch.ones(2, 2)}, ValueError, "must not be negative"),
        ({**good, last: torch.full((2, 2), float("nan"))}, NonFiniteError, "NaN or inf"),
        (
            {n: f for n, f in good.items() if n != last},
            NameMismatchError,
            r"lacks 1 of 5 names: \['3.weight'\]; it has \['0.weight'",
        ),
        ({f"x{n}": f for n, f in good.items()}, NameMismatchError, "lacks 5 of 5 names"),
        ({f"other{n}": torch.ones(1) for n in range(3)}, NameMismatchError, "lacks 5 of 5 names"),
    ]
    for fisher, error, match in cases:
        with pytest.raises(error, match=match):
            wpl.consolidate(fisher)
        if "negative" not in match:
            with pytest.raises(error, match=match.replace("fisher", "theta_hat")):
                wpl.consolidate(good, theta_hat=fisher)
    for options in ({"decay": -1}, {"weight": float("nan")}, {"anchor": "both"}):
        with pytest.raises(ValueError, match="got"):
            wpl.consolidate(good, **options)
    for bad in (float("nan"), float("inf")):
        kept = module[0].bias.detach().clone()
        with torch.no_grad():
            module[0].bias[1] = bad
        with pytest.raises(NonFiniteError, match=r"0\.bias"):
            wpl.consolidate(good)
        with torch.no_grad():
            module[0].bias.copy_(kept)
    assert same_state(wpl, before)
    assert wpl().item() == value


class TwoParts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)


ENC = ["enc.weight", "enc.bias"]


def fisher_of(module):
    """A Fisher that knows whose it is."""
    return wplfast.Fisher(random_fisher(module), 1, parameters=dict(module.named_parameters()))


@pytest.mark.parametrize(
    ("of", "over", "given", "says", "works"),
    [
        # names that the Fisher has under another owner's prefix are listed, and what is said to work does
        ("enc", "", {}, ["2 of 4", "'head.bias'", "has ['weight', 'bias']", f"active={ENC}"], {"active": ENC}),
        ("enc copy", "", {}, ["4 of 4", "has ['weight', 'bias']", "rename(lambda name: 'enc.' +"], {"active": ENC}),
        (" copy", "enc", {}, ["2 of 2", "['weight', 'bias']", "prefix='enc.'"], {"prefix": "enc."}),
        (" copy", "enc", {"prefix": "model."}, ["'model.weight'", "prefix='enc.'"], {"prefix": "enc."}),
        ("enc copy", "enc", {"prefix": "enc."}, ["'enc.weight'", "prefix=''"], {"prefix": ""}),
        ("enc dict", "", {}, ["4 of 4", "{'enc.' + name: t for name, t in fisher.items()}"], {"active": ENC}),
    ],
)
def test_names_that_lack_a_prefix_are_told(of, over, given, says, works):
    model, other = TwoParts(), TwoParts()
    wpl = wplfast.WeightPlasticityLoss(model.get_submodule(over))
    part, _, kind = of.partition(" ")
    fisher = fisher_of((other if kind else model).get_submodule(part))
    fisher = dict(fisher) if kind == "dict" else fisher
    with pytest.raises(NameMismatchError) as found:
        wpl.consolidate(fisher, **given)
    for text in says:
        assert text in str(found.value)
    if "rename" in str(found.value):
        fisher = fisher.rename(lambda name: "enc." + name)
    elif kind == "dict":
        fisher = {"enc." + name: t for name, t in fisher.items()}
    wpl.consolidate(fisher, extra="ignore", **works)
    weight = wpl.fisher["weight" if over else "enc.weight"]
    assert torch.equal(weight, fisher["weight" if "weight" in fisher else "enc.weight"].to(weight))


def test_a_part_is_told_where_a_penalty_is_bound_anew():
    model = TwoParts()
    wpl = wplfast.WeightPlasticityLoss(model)
    with pytest.raises(NameMismatchError, match=r"has \['weight', 'bias'\]; its names are missing ones without 'enc.'"):
        wpl.rebind(model.enc)
