"""WeightPlasticityLoss: values, anchors, references, names, state, bad input."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import wplfast
from wplfast.errors import NameMismatchError, NonFiniteError, StaleParameterError


def trunk(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Conv1d(7, 3, 2), nn.Linear(2, 2, bias=False)).to(dtype)


def random_fisher(module, dtype=None):
    return {n: torch.rand(p.shape, dtype=dtype or torch.float32) for n, p in module.named_parameters()}


def values(module):
    return {n: p.detach().double().clone() for n, p in module.named_parameters()}


def move(module, by=0.1):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))


def expected(module, anchors, alpha, l2=0.0, names=None):
    """The definition, in float64; anchors is a list of (theta_hat, fisher)."""
    total = torch.zeros((), dtype=torch.float64)
    for name, p in module.named_parameters():
        if names is None or name in names:
            a = alpha[name] if isinstance(alpha, dict) else alpha
            for hat, fisher in anchors:
                total = total + a / 2 * (fisher[name].double() * (p.double() - hat[name]) ** 2).sum()
            total = total + l2 / 2 * (p.double() ** 2).sum()
    return total


def gradients(module, value):
    return dict(
        zip(dict(module.named_parameters()), torch.autograd.grad(value, list(module.parameters())), strict=True)
    )


@pytest.fixture
def module():
    return trunk()


@pytest.fixture
def anchored(module):
    """A module that moved away from its anchor, the penalty, and the anchor as numbers."""
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1)
    fisher, hat = random_fisher(module), values(module)
    wpl.consolidate(fisher)
    move(module)
    return module, wpl, (hat, fisher)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradient(dtype):
    module = trunk(dtype)
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1)
    fisher, hat = random_fisher(module), values(module)
    wpl.consolidate(fisher)
    move(module, 0.3)
    exact = expected(module, [(hat, fisher)], 3.0, 0.1)
    value = wpl()
    assert value.dim() == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(value.item() - exact.item()) <= 1e-6 * exact.item()
    value.backward()
    rtol = 4 * torch.finfo(dtype).eps
    for (name, p), e in zip(module.named_parameters(), gradients(module, exact).values(), strict=True):
        torch.testing.assert_close(p.grad, e.to(dtype), rtol=rtol, atol=1e-6, msg=name)


def test_add_grad_equals_autograd(anchored):
    module, wpl, _ = anchored
    wpl().backward()
    by_autograd = [p.grad.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    module[0].bias.grad = None
    value = wpl.add_grad_(scale=2.0)
    assert not value.requires_grad
    assert value.item() == pytest.approx(wpl().item(), rel=1e-6)
    for p, g in zip(module.parameters(), by_autograd, strict=True):
        start = 0.0 if p is module[0].bias else 1.0
        torch.testing.assert_close(p.grad, start + 2 * g)


def test_add_grad_takes_a_tensor_scale(anchored):
    module, wpl, _ = anchored
    wpl.add_grad_(scale=torch.tensor(0.5))
    half = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    wpl.add_grad_()
    for p, h in zip(module.parameters(), half, strict=True):
        torch.testing.assert_close(p.grad, 2 * h)


def test_add_grad_leaves_frozen_parameters_alone(anchored):
    module, wpl, anchor = anchored
    module[0].weight.requires_grad_(False)
    value = wpl.add_grad_()
    assert module[0].weight.grad is None
    assert module[0].bias.grad is not None
    assert value.item() == pytest.approx(expected(module, [anchor], 3.0, 0.1).item(), rel=1e-6)


def test_before_the_first_anchor_the_l2_term_alone(module):
    assert wplfast.WeightPlasticityLoss(module)().item() == 0.0
    wpl = wplfast.WeightPlasticityLoss(module, l2=0.5)
    exact = expected(module, [], 0.0, 0.5)
    assert wpl().item() == pytest.approx(exact.item(), rel=1e-6)
    wpl.add_grad_()
    torch.testing.assert_close(module[0].weight.grad, 0.5 * module[0].weight.detach())


def test_second_derivative_and_functional_transforms():
    module = trunk(torch.float64)
    theta = [p.detach().clone().requires_grad_() for p in module.parameters()]
    hat, fisher = [torch.randn_like(p).detach() for p in theta], [torch.rand_like(p).detach() for p in theta]
    penalty = lambda *ps: wplfast.functional.wpl_penalty(ps, hat, fisher, 2.0, l2=0.3)  # noqa: E731
    assert torch.autograd.gradcheck(penalty, theta)
    assert torch.autograd.gradgradcheck(penalty, theta)
    by_func = torch.func.grad(penalty)(theta[0].detach(), *[t.detach() for t in theta[1:]])
    torch.testing.assert_close(by_func, torch.autograd.grad(penalty(*theta), theta[0])[0])


def test_second_backward_on_a_retained_graph(anchored):
    module, wpl, _ = anchored
    value = wpl()
    value.backward(retain_graph=True)
    first = [p.grad.clone() for p in module.parameters()]
    value.backward()
    for p, f in zip(module.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * f)


def test_upstream_gradient_is_respected(anchored):
    module, wpl, anchor = anchored
    (7 * wpl()).backward()
    exact = gradients(module, 7 * expected(module, [anchor], 3.0, 0.1))
    torch.testing.assert_close(module[0].weight.grad, exact["0.weight"].float())


def test_compiles_without_a_break_and_without_recompiling_for_alpha(anchored):
    module, wpl, anchor = anchored
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda: wpl() * 2, fullgraph=True, backend=backend)
    for alpha in (3.0, 5.0, torch.tensor(0.25)):
        wpl.alpha = alpha
        exact = 2 * expected(module, [anchor], float(alpha), 0.1)
        assert step().item() == pytest.approx(exact.item(), rel=1e-6)
    assert len(graphs) == 1


# ---- alpha and active sets ---------------------------------------------------------------------------------


def test_alpha_by_prefix(anchored):
    module, wpl, anchor = anchored
    wpl.alpha = {"": 1.0, "0.": 2.0, "0.bias": 5.0}
    alpha = {"0.weight": 2.0, "0.bias": 5.0, "2.weight": 1.0, "2.bias": 1.0, "3.weight": 1.0}
    assert wpl().item() == pytest.approx(expected(module, [anchor], alpha, 0.1).item(), rel=1e-6)
    wpl.alpha = {"": 4.0}
    assert wpl().item() == pytest.approx(expected(module, [anchor], 4.0, 0.1).item(), rel=1e-6)
    with pytest.raises(ValueError, match="no prefix for"):
        wpl.alpha = {"0.": 1.0}
    with pytest.raises(ValueError, match="not negative, got -1"):
        wpl.alpha = -1.0


def test_active_set(anchored):
    module, wpl, anchor = anchored
    names = ["2.weight", "0.bias"]
    exact = expected(module, [anchor], 3.0, 0.1, names)
    assert wpl(active=names).item() == pytest.approx(exact.item(), rel=1e-6)
    handle = wpl.subset(names)
    assert handle().item() == pytest.approx(exact.item(), rel=1e-6)
    assert [(name, id(p)) for name, p in handle] == [(name, id(module.get_parameter(name))) for name in names]
    handle.add_grad_()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == set(names)
    before = {n: f.clone() for n, f in wpl.fisher.items()}
    wpl.consolidate(random_fisher(module), active=names)
    assert {n for n, f in wpl.fisher.items() if not torch.equal(f, before[n])} == set(names)
    with pytest.raises(NameMismatchError, match=r"nope"):
        wpl(active=["nope"])
    with pytest.raises(TypeError, match="sequence of names"):
        wpl(active="0.bias")


# ---- several anchors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_anchors_are_the_exact_sum(dtype):
    module = trunk(dtype)
    wpl = wplfast.WeightPlasticityLoss(module, alpha=2.0)
    anchors = []
    for k in range(6):
        fisher = {n: f * 10.0 ** (k - 3) for n, f in random_fisher(module).items()}
        fisher["0.bias"][::2] = 0  # never anchored
        anchors.append((values(module), fisher))
        wpl.consolidate(fisher)
        move(module, 0.05)
    exact = expected(module, anchors, 2.0)
    assert wpl.n_anchors == 6
    assert wpl().item() == pytest.approx(exact.item(), rel=1e-5)
    wpl().backward()
    for (name, p), e in zip(module.named_parameters(), gradients(module, exact).values(), strict=True):
        error = float((p.grad.double() - e.double()).norm() / e.double().norm())
        # What is expected is added up in the parameter's type, anchor by anchor.
        assert error <= (1e-5 if dtype == torch.float32 else 2**-7), name
    assert module[0].bias.grad[::2].abs().max() == 0


def test_replace_decay_and_weight(module):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0)
    first, second = random_fisher(module), random_fisher(module)
    wpl.consolidate(first)
    move(module)
    hat = values(module)
    wpl.consolidate(second, anchor="replace", decay=0.5, weight=3.0)
    move(module)
    online = {n: 0.5 * first[n] + 3.0 * second[n] for n in first}
    assert wpl.n_anchors == 1
    assert wpl().item() == pytest.approx(expected(module, [(hat, online)], 1.0).item(), rel=1e-6)


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


@pytest.mark.parametrize("anchor", ["merge", "replace"])
def test_clipping_by_norm_scales_a_parameters_whole_penalty(module, anchor):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=2.0)
    anchors = []
    for scale in (1.0, 10.0):
        fisher = {n: scale * f for n, f in random_fisher(module).items()}
        anchors.append((values(module), fisher))
        wpl.consolidate(fisher, anchor=anchor, clip_norm=5.0)
        if anchor == "replace":
            anchors = [(anchors[-1][0], {n: sum(f[n] for _, f in anchors) for n in fisher})]
        norms = {n: sum(f[n] for _, f in anchors).norm().item() for n in fisher}
        factors = {n: min(1.0, 5.0 / norm) for n, norm in norms.items()}
        anchors = [(hat, {n: factors[n] * f[n] for n in f}) for hat, f in anchors]
        move(module)
    assert min(factors.values()) < 0.3 < max(factors.values())
    for n, f in wpl.fisher.items():
        assert f.norm().item() == pytest.approx(min(norms[n], 5.0), rel=1e-5)
    exact = expected(module, anchors, 2.0)
    assert wpl().item() == pytest.approx(exact.item(), rel=1e-5)
    wpl().backward()
    for (name, p), e in zip(module.named_parameters(), gradients(module, exact).values(), strict=True):
        torch.testing.assert_close(p.grad, e.float(), rtol=1e-5, atol=1e-6, msg=name)


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
    fisher = random_fisher(module)
    wpl.consolidate(fisher)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_fisher_in_bfloat16_is_off_by_its_rounding(dtype):
    module = trunk(dtype)
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1, fisher_dtype=torch.bfloat16)
    fisher, hat = random_fisher(module), values(module)
    wpl.consolidate(fisher)
    kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert {f.dtype for f in wpl.fisher.values()} == {kept}
    move(module, 0.3)
    exact = expected(module, [(hat, fisher)], 3.0, 0.1)
    assert wpl().item() == pytest.approx(exact.item(), rel=2**-8)
    rounded = expected(module, [(hat, wpl.fisher)], 3.0, 0.1)
    assert wpl().item() == pytest.approx(rounded.item(), rel=1e-6)
    wpl.add_grad_()
    rtol = 4 * torch.finfo(dtype).eps
    for (name, p), e in zip(module.named_parameters(), gradients(module, rounded).values(), strict=True):
        torch.testing.assert_close(p.grad, e.to(dtype), rtol=rtol, atol=1e-6, msg=name)


def test_a_running_fisher_in_bfloat16_moves_or_says_that_it_would_not(module):
    wpl = wplfast.WeightPlasticityLoss(module, fisher_dtype=torch.bfloat16)
    ones = {n: torch.ones(p.shape) for n, p in module.named_parameters()}
    wpl.consolidate(ones)
    for _ in range(200):
        wpl.update({n: 2 * f for n, f in ones.items()}, rate=2**-4)
    assert all(bool((f > 2 * (1 - 2**-4)).all()) for f in wpl.fisher.values())
    with pytest.raises(ValueError, match="would not move far at a rate below"):
        wpl.update(ones, rate=2**-5)
    with pytest.raises(ValueError, match=r"fisher_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        wplfast.WeightPlasticityLoss(module, fisher_dtype=torch.float16)


def test_given_anchor_values_and_prefix(module):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0)
    fisher = random_fisher(module)
    hat = {n: torch.randn(p.shape) for n, p in module.named_parameters()}
    long = {f"model.trunk.{n}": f for n, f in fisher.items()}
    with pytest.raises(NameMismatchError, match=r"prefix='model.trunk.' would match"):
        wpl.consolidate(long, theta_hat=hat)
    wpl.consolidate(long, theta_hat={f"model.trunk.{n}": h for n, h in hat.items()}, prefix="model.trunk.")
    assert wpl().item() == pytest.approx(expected(module, [(hat, fisher)], 1.0).item(), rel=1e-6)


def test_a_fisher_of_the_whole_model_is_matched_by_identity(module):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = module[0]
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)))

    data = [(torch.randn(4, 5), torch.randint(0, 3, (4,)))]
    fisher = wplfast.fisher_diagonal(Model(), data, wplfast.losses.cross_entropy)  # named fc.weight, ...
    wpl = wplfast.WeightPlasticityLoss(module[0])  # named weight, bias
    wpl.consolidate(fisher)
    assert torch.equal(wpl.fisher["weight"], fisher["fc.weight"])


# ---- references --------------------------------------------------------------------------------------------


def test_it_owns_nothing(anchored):
    module, wpl, _ = anchored
    module.wpl = wpl
    assert list(wpl.parameters()) == []
    assert len(list(module.parameters())) == 5
    assert not [key for key in module.state_dict() if key.startswith("wpl.") and "alpha" in key]


CHANGES = {
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "p.data = clone": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "channels swapped in memory": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    "a view with gaps": lambda m: setattr(m[0].weight, "data", torch.zeros(7, 10)[:, ::2].copy_(m[0].weight.data)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_follows_parameters_whose_memory_was_exchanged(anchored, change):
    module, wpl, (hat, fisher) = anchored
    wpl()
    change(module)
    move(module)
    exact = expected(module, [(hat, fisher)], 3.0, 0.1)
    assert wpl().item() == pytest.approx(exact.item(), rel=1e-3 if module[0].weight.dtype == torch.float16 else 2e-3)
    module.zero_grad()
    wpl.add_grad_()
    for (name, p), e in zip(module.named_parameters(), gradients(module, exact).values(), strict=True):
        torch.testing.assert_close(p.grad, e.to(p.dtype), rtol=1e-3, atol=2e-3, msg=name)
    assert all(f.dtype in (torch.float32, torch.float64) for f in wpl.fisher.values())


@pytest.mark.not_rehearsed("sparse tensors")
def test_gradients_in_another_memory_order(anchored):
    module, wpl, anchor = anchored
    module[0].weight.grad = torch.zeros(5, 7).t()
    wpl.add_grad_()
    exact = gradients(module, expected(module, [anchor], 3.0, 0.1))
    torch.testing.assert_close(module[0].weight.grad, exact["0.weight"].float())
    module[0].weight.grad = None
    module[0].bias.grad = torch.zeros(7).to_sparse()
    with pytest.raises(ValueError, match=r"\.grad must be dense"):
        wpl.add_grad_()


def test_a_changed_shape_is_an_error(anchored):
    module, wpl, _ = anchored
    module[0].weight.data = torch.zeros(9, 5)
    with pytest.raises(StaleParameterError, match=r"'0.weight' had shape \[7, 5\].* now has \[9, 5\]"):
        wpl()


def test_to_moves_nothing_and_keeps_the_fisher_dtype(anchored):
    module, wpl, anchor = anchored
    wpl.half().to(torch.float64)
    assert wpl.fisher["0.weight"].dtype == torch.float32
    assert wpl().item() == pytest.approx(expected(module, [anchor], 3.0, 0.1).item(), rel=1e-6)


def test_deepcopy_follows_the_model_it_is_part_of(anchored):
    module, wpl, _ = anchored
    alone = copy.deepcopy(wpl)
    before = wpl().item()
    module.wpl = wpl
    twin = copy.deepcopy(module)
    move(twin, 1.0)
    assert wpl().item() == alone().item() == before
    assert twin.wpl().item() != before
    alone.consolidate(random_fisher(trunk()))
    assert wpl.n_anchors == 1
    assert wpl().item() == before


class PenaltyFirst(nn.Module):
    """Registers its penalty before the layers that it is about."""

    def __init__(self):
        super().__init__()
        layers = trunk()
        self.wpl = wplfast.WeightPlasticityLoss(layers)
        self.layers = layers


def test_deepcopy_does_not_depend_on_the_order_of_submodules():
    model = PenaltyFirst()
    model.wpl.consolidate(random_fisher(model.layers))
    twins = [copy.deepcopy(model)]
    twins.append(copy.deepcopy(twins[0]))  # before the first is used
    for twin in twins:
        move(twin, 1.0)
        assert twin.wpl().item() > 0
        twin.wpl.add_grad_()
        assert all(p.grad is not None for p in twin.layers.parameters())
    assert model.wpl().item() == 0.0
    assert model.layers[0].weight.grad is None


REPLACEMENTS = {
    "a parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(7, 5))),
    "a layer": lambda m: m.__setitem__(0, nn.Linear(5, 7)),
    "a layer, now without bias": lambda m: m.__setitem__(0, nn.Linear(5, 7, bias=False)),
}


@pytest.mark.parametrize("use", ["call", "add_grad_", "subset", "consolidate"])
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_replaced_parameter_is_an_error_until_rebound(anchored, replace, use):
    module, wpl, _ = anchored
    handle = wpl.subset(["0.weight"])
    uses = {"call": wpl, "add_grad_": wpl.add_grad_, "subset": handle, "consolidate": lambda: wpl.consolidate({})}
    replace(module)
    with pytest.raises(StaleParameterError, match=r"holds another tensor as '0.weight' .* call rebind"):
        uses[use]()
    wpl.rebind(module, missing="drop")
    before = [p.grad for p in module.parameters()]
    wpl.add_grad_()
    assert all(p.grad is not None and old is None for p, old in zip(module.parameters(), before, strict=True))


def test_a_penalty_that_is_part_of_its_model_is_freed_with_it():
    module = trunk()
    module.wpl = wplfast.WeightPlasticityLoss(module)
    module.wpl.consolidate(random_fisher(module))
    module.wpl().backward()
    module.wpl.add_grad_()
    module[0].weight.register_hook(lambda g, keep=module: g)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_pickle_keeps_names_but_no_parameters(anchored):
    module, wpl, _ = anchored
    blob = pickle.dumps(wpl)
    again = pickle.loads(blob)
    with pytest.raises(StaleParameterError, match="rebind"):
        again()
    again.rebind(module)
    assert again().item() == wpl().item()


def test_rebind_checks_names_and_shapes(anchored):
    _, wpl, _ = anchored
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
    wpl = wplfast.WeightPlasticityLoss(module, alpha={"": 1.0, "1.": 2.0})
    for _ in range(3 if several else 1):
        wpl.consolidate(random_fisher(module))
        move(module)
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
    wpl.consolidate(random_fisher(module))
    assert wpl.fisher["1.weight"][3:].min() > 0


def test_rebind_can_drop_what_vanished(anchored):
    module, wpl, anchor = anchored
    wpl.alpha = {"": 3.0, "3.": 9.0}
    names = ["0.weight", "0.bias", "3.weight"]
    rest = {n: p for n, p in module.named_parameters() if n in names}
    exact = expected(module, [anchor], {n: 9.0 if n == "3.weight" else 3.0 for n in names}, 0.1, names)
    gone = wpl.subset(["2.weight"])
    with pytest.raises(NameMismatchError, match="lacks 2 of 5 names"):
        wpl.rebind(rest)
    wpl.rebind(rest, missing="drop")
    for use in (gone, gone.add_grad_, lambda: dict(gone)):
        with pytest.raises(NameMismatchError, match=r"2\.weight"):
            use()
    assert wpl().item() == pytest.approx(exact.item(), rel=1e-6)
    assert list(wpl.fisher) == names
    with pytest.raises(NameMismatchError, match="lacks 3 of 3"):
        wpl.rebind({"other": torch.zeros(2)}, missing="drop")
    with pytest.raises(ValueError, match="missing must be"):
        wpl.rebind(rest, missing="ignore")


# ---- state -------------------------------------------------------------------------------------------------


def same_state(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def two_anchors(module):
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0)
    for _ in range(2):
        wpl.consolidate(random_fisher(module))
        move(module)
    return wpl


def test_state_dict_round_trip(module):
    wpl = two_anchors(module)
    other = wplfast.WeightPlasticityLoss(module, alpha=3.0)
    other.load_state_dict(wpl.state_dict())
    assert same_state(wpl, other)
    assert other().item() == wpl().item()
    assert other.n_anchors == 2
    empty = wplfast.WeightPlasticityLoss(module)
    other.load_state_dict(empty.state_dict())
    assert other.n_anchors == 0
    assert other().item() == 0


def test_a_bad_state_changes_nothing(module):
    wpl = two_anchors(module)
    before = {key: value.clone() for key, value in wpl.state_dict().items()}
    bad_shape = {**before, "fisher.0.weight": torch.zeros(3)}
    missing = {key: value for key, value in before.items() if key != "theta_hat.0.bias"}
    extra = {**before, "fisher.unknown": torch.zeros(3)}
    for state, match in ((bad_shape, "must have shape"), (missing, "Missing key"), (extra, "Unexpected key")):
        with pytest.raises(RuntimeError, match=match):
            wpl.load_state_dict(state)
        assert all(torch.equal(value, before[key]) for key, value in wpl.state_dict().items())


def test_files(module, tmp_path):
    wpl = two_anchors(module)
    wpl.save(tmp_path / "wpl.safetensors")
    other = wplfast.WeightPlasticityLoss(module, alpha=3.0)
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


def test_reset(anchored):
    _, wpl, _ = anchored
    wpl.reset()
    assert wpl.n_anchors == 0
    assert wpl.fisher == {}


# ---- bad input ---------------------------------------------------------------------------------------------


def test_bad_parameters():
    with pytest.raises(TypeError, match="must be a Module, a mapping or"):
        wplfast.WeightPlasticityLoss(torch.zeros(3))
    with pytest.raises(ValueError, match="empty"):
        wplfast.WeightPlasticityLoss({})
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="same tensor"):
        wplfast.WeightPlasticityLoss([("a", w), ("b", w)])
    with pytest.raises(ValueError, match="occurs twice"):
        wplfast.WeightPlasticityLoss([("a", torch.zeros(3)), ("a", torch.zeros(3))])
    with pytest.raises(ValueError, match="leaf"):
        wplfast.WeightPlasticityLoss({"a": torch.zeros(3, requires_grad=True) * 2})
    with pytest.raises(ValueError, match="floating point"):
        wplfast.WeightPlasticityLoss({"a": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="l2 must be finite"):
        wplfast.WeightPlasticityLoss({"a": torch.zeros(3)}, l2=-1.0)


def test_a_failed_consolidate_changes_nothing(anchored):
    module, wpl, _ = anchored
    before = {key: value.clone() for key, value in wpl.state_dict().items()}
    good = random_fisher(module)
    last = "3.weight"
    cases = [
        ({**good, last: torch.zeros(4)}, ValueError, r"fisher\['3.weight'\] must be .*\[2, 2\], got .*\[4\]"),
        ({**good, last: -torch.ones(2, 2)}, ValueError, "must not be negative"),
        ({**good, last: torch.full((2, 2), float("nan"))}, NonFiniteError, "NaN or inf"),
        ({n: f for n, f in good.items() if n != last}, NameMismatchError, "lacks 1 of 5 names"),
        ({f"x{n}": f for n, f in good.items()}, NameMismatchError, "lacks 5 of 5 names"),
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
    assert all(torch.equal(value, before[key]) for key, value in wpl.state_dict().items())


def test_functional_checks_its_arguments(device):
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="theta_hat must hold 1"):
        wplfast.functional.wpl_penalty([w], [], [torch.zeros(3)], 1.0)
    with pytest.raises(ValueError, match=r"fisher\[0\] must be float32\[3\]"):
        wplfast.functional.wpl_penalty([w], [torch.zeros(3)], [torch.zeros(2)], 1.0)
    with pytest.raises(ValueError, match=rf"fisher\[0\] must be float32\[3\] on {device}, got float64\[3\]"):
        wplfast.functional.wpl_penalty([w], [torch.zeros(3)], [torch.zeros(3).double()], 1.0)
    with pytest.raises(ValueError, match=rf"theta_hat\[0\] must be float32\[3\] on {device}, got .* on meta"):
        wplfast.functional.wpl_penalty([w], [torch.zeros(3, device="meta")], [torch.zeros(3)], 1.0)
    with pytest.raises(ValueError, match="0-d tensor"):
        wplfast.functional.wpl_penalty([w], [torch.zeros(3)], [torch.zeros(3)], torch.zeros(2))


def test_its_own_tensors_may_be_given(module):
    wpl, other = (wplfast.WeightPlasticityLoss(module, alpha=3.0) for _ in range(2))
    for penalty in (wpl, other):
        penalty.consolidate({n: torch.ones(p.shape) for n, p in module.named_parameters()})
    move(module)
    for anchor in ("replace", "merge"):
        other.consolidate({n: f.clone() for n, f in other.fisher.items()}, anchor=anchor, decay=0.5, weight=2.0)
        wpl.consolidate(wpl.fisher, anchor=anchor, decay=0.5, weight=2.0)
        assert same_state(wpl, other)
    swapped = lambda w: dict(zip(w.theta_hat, reversed(list(w.theta_hat.values())), strict=True))  # noqa: E731
    square = nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)})
    wpl = wplfast.WeightPlasticityLoss(square)
    wpl.consolidate(random_fisher(square))
    expected_hats = {n: hat.clone() for n, hat in swapped(wpl).items()}
    wpl.consolidate(random_fisher(square), theta_hat=swapped(wpl), anchor="replace")
    assert all(torch.equal(hat, expected_hats[n]) for n, hat in wpl.theta_hat.items())
