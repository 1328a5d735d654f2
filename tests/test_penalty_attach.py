"""A penalty that an optimizer adds before each step, whatever kind of optimizer it is."""

from __future__ import annotations

import copy
import gc
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from penalty_cases import anchored, enter, expected, trunk
from torch import nn

import wplfast
from wplfast.errors import StaleParameterError


class Data:
    """A model with an anchored penalty over its trunk, and a loss that ignores the penalty."""

    def __init__(self, alpha=3.0, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"trunk": nn.Linear(4, 3), "head": nn.Linear(3, 2)}).to(dtype)
        self.wpl = wplfast.WeightPlasticityLoss(self.model["trunk"], alpha=alpha)
        self.anchor = enter(self.wpl, self.model["trunk"], by=0.5)
        self.x, self.y = torch.randn(8, 4, dtype=dtype), torch.arange(8) % 2

    def loss(self):
        return F.cross_entropy(self.model["head"](self.model["trunk"](self.x).tanh()), self.y)

    def penalty(self):
        return expected(self.model["trunk"], [self.anchor], 3.0)


def train(make, attached, steps=5, closure=False):
    """Return the parameters after some steps, with the penalty attached or in the loss."""
    data = Data()
    optimizer = make(data.model)
    if attached:
        data.wpl.attach(optimizer)

    def evaluate():
        optimizer.zero_grad()
        loss = data.loss() if attached else data.loss() + data.penalty().float()
        loss.backward()
        return loss

    losses = []
    for _ in range(steps):
        if closure:
            losses.append(optimizer.step(evaluate).item())
        else:
            evaluate()
            optimizer.step()
    return list(data.model.parameters()), losses


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 0.05),
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.05, fused=True),
    "groups": lambda m: torch.optim.SGD([{"params": m[part].parameters(), "lr": 0.1} for part in ("head", "trunk")]),
    "trunk alone": lambda m: torch.optim.SGD(m["trunk"].parameters(), 0.1),
}


MARKS = {"fused AdamW": pytest.mark.not_rehearsed("fused optimizers")}
optimizers = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=MARKS.get(name, ())) for name, make in OPTIMIZERS.items()]
)


@pytest.mark.parametrize("closure", [False, True], ids=["step()", "step(closure)"])
@optimizers
def test_attached_it_is_as_in_the_loss(make, closure):
    found, with_it = train(make, True, closure=closure)
    wanted, losses = train(make, False, closure=closure)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert with_it == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_penalty_in_every_evaluation(line_search):
    def make(model):
        return torch.optim.LBFGS(model.parameters(), 0.5, max_iter=6, line_search_fn=line_search)

    found, with_it = train(make, True, closure=True)
    wanted, losses = train(make, False, closure=True)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)
    assert with_it == pytest.approx(losses, rel=1e-3)


def test_a_closure_by_keyword_and_one_that_returns_nothing():
    data = Data()
    optimizer = torch.optim.SGD(data.model.parameters(), 0.0)
    data.wpl.attach(optimizer)
    loss = optimizer.step(closure=data.loss)
    assert loss.item() == pytest.approx((data.loss() + data.penalty()).item(), rel=1e-5)
    assert data.model["trunk"].weight.grad.abs().min() > 0
    assert optimizer.step(lambda: None) is None


@pytest.mark.cpu_only("a loss scale of the CPU's scaler")
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled first"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler(fused, unscaled):
    """A fused optimizer divides by the scale itself, after the hook: the penalty must not be divided away."""
    ends = []
    for scaled in (False, True):
        data = Data()
        optimizer = torch.optim.SGD(data.model.parameters(), 0.1, fused=fused)
        data.wpl.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(data.loss()).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(list(data.model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ends[0][0].double(), data.anchor[0]["weight"])


def test_removed_it_is_gone_and_may_be_attached_again():
    data = Data()
    optimizer = torch.optim.SGD(data.model.parameters(), 0.0)
    with data.wpl.attach(optimizer):
        optimizer.step()
        with pytest.raises(ValueError, match="attached to this optimizer already"):
            data.wpl.attach(optimizer)
        with pytest.raises(ValueError, match="attached to this optimizer already"):
            data.wpl.attach(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert data.model["trunk"].weight.grad is None
    handle = data.wpl.attach(optimizer)
    optimizer.step()
    once = data.model["trunk"].weight.grad.clone()
    wplfast.WeightPlasticityLoss(data.model["trunk"], alpha=0.0).attach(optimizer)  # another penalty may be
    handle.remove()
    optimizer.step()
    assert torch.equal(data.model["trunk"].weight.grad, once)


def test_two_optimizers_share_a_penalty_without_adding_it_twice(caplog):
    data = Data()
    weight, bias = data.model["trunk"].weight, data.model["trunk"].bias
    wanted = torch.autograd.grad(data.penalty(), [weight, bias])
    for part in (weight, bias):
        optimizer = torch.optim.SGD([part], 0.0)
        data.wpl.attach(optimizer)
        optimizer.step()
    for part, gradient in zip((weight, bias), wanted, strict=True):
        torch.testing.assert_close(part.grad, gradient, rtol=1e-5, atol=1e-7)
    assert [m for m in caplog.messages if "holds 1 of the penalty's 2 parameters; the gradient of ['bias']" in m]
    assert len(caplog.messages) == 2


def test_frozen_parameters_that_the_optimizer_leaves_out_are_no_fault(caplog):
    data = Data()
    data.model["trunk"].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in data.model.parameters() if p.requires_grad], 0.0)
    with caplog.at_level(logging.WARNING):
        data.wpl.attach(optimizer)
        optimizer.step()
    assert not caplog.messages
    assert data.model["trunk"].bias.grad is None
    assert data.model["trunk"].weight.grad is not None


def test_what_is_thawed_after_attaching_is_of_the_optimizer_that_holds_it(caplog):
    """The head's optimizer was attached while the trunk was frozen: it must not add the trunk's gradient later."""
    model = nn.ModuleDict({"trunk": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    wpl = wplfast.WeightPlasticityLoss(model, alpha=3.0)
    anchor = enter(wpl, model, by=0.5)
    parts = list(model["trunk"].parameters()), list(model["head"].parameters())
    model["trunk"].requires_grad_(False)
    first = torch.optim.SGD(parts[1], 0.0)
    wpl.attach(first)
    first.step()
    assert not caplog.messages
    model["trunk"].requires_grad_(True)
    second = torch.optim.SGD(parts[0], 0.0)
    wpl.attach(second)
    first.zero_grad()
    first.step()
    second.step()
    wanted = torch.autograd.grad(expected(model, [anchor], 3.0), list(model.parameters()))
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient.to(p.dtype), rtol=1e-5, atol=1e-7)


def test_optimizers_that_take_turns_while_the_other_part_is_frozen():
    """As adversarial training does: each step adds the gradient of its own part, once."""
    model = nn.ModuleDict({"generator": nn.Linear(3, 3), "critic": nn.Linear(3, 2)})
    wpl = wplfast.WeightPlasticityLoss(model, alpha=3.0)
    anchor = enter(wpl, model, by=0.5)
    gradients = torch.autograd.grad(expected(model, [anchor], 3.0), list(model.parameters()))
    wanted = dict(zip(model.parameters(), gradients, strict=True))
    optimizers = {}
    for _ in range(2):
        for part, module in model.items():
            for other in model.values():
                other.requires_grad_(other is module)
            if part not in optimizers:  # attached while the other part is frozen
                optimizers[part] = torch.optim.SGD(module.parameters(), 0.0)
                wpl.attach(optimizers[part])
            model.requires_grad_(True)  # for the step: a penalty of all would reach the other part
            model.zero_grad()
            optimizers[part].step()
            for p in module.parameters():
                torch.testing.assert_close(p.grad, wanted[p].to(p.dtype), rtol=1e-5, atol=1e-7)
            assert all(p.grad is None for other in model.values() if other is not module for p in other.parameters())


class Wrapper(torch.optim.Optimizer):
    """As some libraries wrap optimizers: it forwards step() and calls no hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_what_cannot_be_attached_to():
    data = Data()
    with pytest.raises(ValueError, match=r"holds none of the penalty's 2 parameters \['weight', 'bias'\]"):
        data.wpl.attach(torch.optim.SGD(copy.deepcopy(data.model).parameters(), 0.1))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Linear"):
        data.wpl.attach(data.model["head"])
    inner = torch.optim.SGD(data.model.parameters(), 0.1)
    with pytest.raises(TypeError, match="calls no hooks before step"):
        data.wpl.attach(Wrapper(inner))
    data.wpl.attach(inner)


def test_replaced_parameters_are_an_error_at_the_step_and_groups_may_follow():
    data = Data()
    optimizer = torch.optim.SGD(data.model.parameters(), 0.0)
    data.wpl.attach(optimizer)
    optimizer.step()
    trunk_ = data.model["trunk"]
    trunk_.weight, trunk_.bias = (nn.Parameter(p.detach().clone()) for p in (trunk_.weight, trunk_.bias))
    with pytest.raises(StaleParameterError, match="call rebind"):
        optimizer.step()
    data.wpl.rebind(trunk_)
    with pytest.raises(ValueError, match="before the parameters were replaced"):
        optimizer.step()
    optimizer.add_param_group({"params": list(trunk_.parameters())})
    optimizer.step()
    torch.testing.assert_close(trunk_.weight.grad, torch.autograd.grad(data.penalty(), trunk_.weight)[0])


def test_a_scheduler_and_hooks_of_others_leave_it_there():
    module = trunk()
    wpl = anchored(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    seen = []
    wpl.attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append(module[0].weight.grad.clone()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    wanted = torch.autograd.grad(wpl(), module[0].weight)[0]
    optimizer.step()
    scheduler.step()
    assert torch.equal(seen[0], wanted)


def test_parameters_that_take_the_places_of_others_in_an_optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3))
    wpl = wplfast.WeightPlasticityLoss(model)
    wpl.consolidate({name: torch.ones_like(p) for name, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    wpl.attach(optimizer)
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    optimizer.param_groups[0]["params"] = list(model[1].parameters())
    before = model[1].weight.clone()
    optimizer.step()
    torch.testing.assert_close(before - model[1].weight, torch.full_like(before, 0.1))


# ---- the same gradient by another way, too ---------------------------------------------------------------------------


def said(caplog):
    return [what for what in ("add_grad_() was called", "was differentiated") for _ in range(caplog.text.count(what))]


@pytest.fixture
def attached():
    """A model whose penalty an optimizer of its first layer adds, the optimizer, and the handle."""
    module = trunk()
    wpl = anchored(module)
    optimizer = torch.optim.SGD(module[0].parameters(), 0.1)
    return module, wpl, optimizer, wpl.attach(optimizer)


def test_a_gradient_that_is_added_twice_is_warned_of_once(caplog, attached):
    module, wpl, optimizer, _ = attached
    optimizer.step()
    assert said(caplog) == []
    for _ in range(2):
        module.zero_grad()
        wpl.add_grad_()
        wpl.subset(["0.weight"]).add_grad_()
        assert said(caplog) == ["add_grad_() was called"]


def test_a_value_in_the_loss_of_an_attached_penalty_is_warned_of_once(caplog, attached):
    module, wpl, optimizer, _ = attached
    for _ in range(2):
        (module(torch.ones(2, 7, 5)).sum() + wpl()).backward()
        assert said(caplog) == ["was differentiated"]
        optimizer.step()


def test_what_is_right_is_not_warned_of(caplog, attached):
    module, wpl, optimizer, handle = attached
    rest = [name for name, _ in module.named_parameters() if not name.startswith("0.")]
    for _ in range(2):
        assert float(wpl().detach()) == wpl().item()
        with torch.no_grad():
            wpl()
        wpl(active=rest).backward()
        wpl.add_grad_(active=rest)  # what the optimizer does not hold
        optimizer.step(lambda: module[0].weight.sum().detach())
    torch.func.grad(lambda scale: scale * wpl())(torch.ones(()))
    for twin in (copy.copy(wpl), copy.deepcopy(wpl), pickle.loads(pickle.dumps(wpl))):
        twin.rebind(module)
        twin.add_grad_()
        twin().backward()
    assert said(caplog) == []
    handle.remove()
    wpl.add_grad_()
    wpl().backward()
    assert said(caplog) == []


def test_an_optimizer_that_is_gone_adds_nothing(caplog):
    module = trunk()
    wpl = anchored(module)
    wpl.attach(torch.optim.SGD(module.parameters(), 0.1))
    gc.collect()
    wpl.add_grad_()
    assert said(caplog) == []


def test_parameters_that_an_optimizer_holds_by_now(caplog):
    module = trunk()
    wpl = anchored(module)
    first = nn.Parameter(module[0].weight.detach().clone())
    old = torch.optim.SGD(module.parameters(), 0.1)
    wpl.attach(old)
    module[0].weight = first
    wpl.rebind(module)
    wpl.add_grad_(active=["0.weight"])
    assert said(caplog) == []
    new = torch.optim.SGD([first], 0.1)
    wpl.attach(new)
    wpl.add_grad_(active=["0.weight"])
    assert said(caplog) == ["add_grad_() was called"]
