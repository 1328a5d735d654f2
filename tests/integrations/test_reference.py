"""``WPLModule`` in the place of the reference repository's: its interface, its rule on request, and its search."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from oracle import fisher_loop
from torch import nn
from torch.nn import functional as F

from wplfast.errors import NameMismatchError, WplfastError
from wplfast.integrations.reference import WPLModule


def arguments(**changes) -> SimpleNamespace:
    """What that code's command line gives, as its README sets it for the RNN."""
    given = {
        "alpha_fisher": 60.0,
        "lambda_fisher": 0.9,
        "momentum": True,
        "fisher_clip_by_norm": 0.0,
        "alpha_decay": 1.0,
        "alpha_decay_after": 15.0,
    }
    return SimpleNamespace(**{**given, **changes})


class Net(WPLModule):
    """Four keys: two linear layers, one that is ignored, one without parameters."""

    def __init__(self, args, compat=False) -> None:
        super().__init__(args, compat=compat)
        torch.manual_seed(0)
        self.a, self.b, self.cell, self.act = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 4), nn.Dropout(0.5)
        self.ignore_module_keys = ["cell"]

    def forward(self, x):
        return self.b(self.act(torch.tanh(self.cell(self.a(x)))))


X, Y = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0, 1, 0, 0])


def losses(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def take(net, keys, epoch=0) -> int:
    with net.fisher_pass(keys) as batch:
        batch.backward(losses(net(X), Y))
    return net.update_fisher(keys, epoch)


def loop(net) -> dict[str, torch.Tensor]:
    plain = nn.Module()  # float64 without anchors
    plain.__dict__["_modules"] = {name: copy.deepcopy(module) for name, module in net._modules.items()}
    plain.forward = lambda x: plain.b(torch.tanh(plain.cell(plain.a(x))))
    return fisher_loop(plain, [(X, Y)], losses, double=False)


# ---- the interface, name by name -----------------------------------------------------------------------------------


def test_init_wpl_weights():
    net = Net(arguments())
    assert not net.build
    net.init_wpl_weights()
    assert net.build
    assert set(net._fisher) == set(net._modules_opt) == {"a", "b", "act"}
    assert list(net._fisher["a"]) == ["0", "1"]
    assert torch.equal(net._modules_opt["a"]["0"], net.a.weight)
    assert net._modules_opt["a"]["0"].data_ptr() != net.a.weight.data_ptr()
    assert not net._fisher["b"]["1"].any()
    assert net.compute_weight_plastic_loss_with_update_fisher(["a", "b"]) == 0


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_update_fisher(momentum, clip):
    """F <- (1 - lambda) F + lambda F_new, of samples and without dropout, limited by tensor; alpha is not in it."""
    net = Net(arguments(momentum=momentum, fisher_clip_by_norm=clip))
    assert net.training
    expected = dict.fromkeys(["a.weight", "a.bias", "b.weight", "b.bias"], 0)
    for step in range(3):
        newest = loop(net)
        assert take(net, ["a", "b"], epoch=100) == 4
        for name in expected:
            value = (0.1 if momentum else 1.0) * expected[name] + 0.9 * newest[name]
            expected[name] = value * (clip / value.norm()) if 0 < clip < value.norm() else value
        with torch.no_grad():
            net.a.weight.add_(0.1 * step)
    assert net.training
    for key in "ab":
        for index, name in enumerate(("weight", "bias")):
            found = net._fisher[key][str(index)].double()
            torch.testing.assert_close(found, expected[f"{key}.{name}"], rtol=1e-5, atol=1e-12)


def test_update_fisher_of_some_keys():
    net = Net(arguments())
    with net.fisher_pass() as batch:  # all
        batch.backward(losses(net(X[:4]), Y[:4]))
        batch.backward(losses(net(X[4:]), Y[4:]))
    assert net.update_fisher(["a", "cell", "act"]) == 2
    assert net._fisher["a"]["0"].any()
    assert not net._fisher["b"]["0"].any()
    torch.testing.assert_close(net._fisher["a"]["0"].double(), 0.9 * loop(net)["a.weight"], rtol=1e-5, atol=1e-12)
    assert net.update_fisher(iter(["b"])) == 2  # what is left of the pass
    with pytest.raises(WplfastError, match=r"no per-sample gradients of \['b.0', 'b.1'\].*fisher_pass"):
        net.update_fisher(["b"])
    before = net._fisher["a"]["0"].clone()
    losses(net(X), Y).mean().backward()
    with pytest.raises(WplfastError, match="compat=True"):
        net.update_fisher(["a"])
    assert torch.equal(net._fisher["a"]["0"], before)


def test_the_penalty_and_its_gradient():
    net = Net(arguments())
    take(net, ["a", "b"])
    net.update_optimal_weights()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    expected, places = 0, [("a", net.a), ("b", net.b)]
    for key, layer in places:
        for index, p in enumerate(layer.parameters()):
            expected = (
                expected + (60 * net._fisher[key][str(index)] * (p - net._modules_opt[key][str(index)]) ** 2).sum()
            )
    found = net.compute_weight_plastic_loss_with_update_fisher(["a", "b", "cell"])
    torch.testing.assert_close(found, expected)
    parameters = [p for _, layer in places for p in layer.parameters()]
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
    part = net.compute_weight_plastic_loss_with_update_fisher({"b": 1})
    assert 0 < part < found
    assert net.compute_weight_plastic_loss_with_update_fisher([]) == 0
    assert net.compute_weight_plastic_loss_with_update_fisher(["cell", "act"]) == 0
    net.args.alpha_fisher = 30.0
    torch.testing.assert_close(net.compute_weight_plastic_loss_with_update_fisher(["a", "b"]), found / 2)
    net.update_optimal_weights()  # all keys
    assert torch.equal(net._modules_opt["b"]["1"], net.b.bias)
    assert net.compute_weight_plastic_loss_with_update_fisher(["a", "b"]) == 0
    net.set_fisher_zero()
    assert not any(f.any() for entries in net._fisher.values() for f in entries.values())


def test_keys_that_are_wrong():
    net = Net(arguments())
    for call in (net.update_fisher, net.compute_weight_plastic_loss_with_update_fisher):
        with pytest.raises(NameMismatchError, match=r"no module has the keys \['c'\]; there are \['a', 'b', 'act'\]"):
            call(["a", "c"])
        with pytest.raises(TypeError, match=r"pass \['ab'\]"):
            call("ab")
    net.init_wpl_weights()
    net.a = nn.Linear(3, 5)
    with pytest.raises(NameMismatchError, match=r"'a' has shape \[5, 3\], its anchor \[4, 3\]: call init_wpl_weights"):
        net.update_optimal_weights()


class Parent(WPLModule):
    """Another WPLModule among the children, tied weights, and keys of its own, never initialised."""

    def __init__(self) -> None:
        super().__init__(arguments())
        self.net, self.out, self.tied = Net(arguments()), nn.Linear(2, 2), nn.Linear(2, 2)
        self.tied.weight = self.out.weight
        self.wpl_monitored_modules = OrderedDict(inner=self.net, out=self.out, tied=self.tied)

    def forward(self, x):
        return self.tied(self.out(self.net(x)))


def test_nested_and_tied():
    parent = Parent()
    assert take(parent, ["inner", "out", "tied"]) == 4 + 3
    assert parent.net._fisher["a"]["0"].any()
    parent.update_optimal_weights()
    with torch.no_grad():
        parent.out.weight.add_(1)
    once = parent.compute_weight_plastic_loss_with_update_fisher(["out"])
    both = parent.compute_weight_plastic_loss_with_update_fisher(["out", "tied"])
    torch.testing.assert_close(once, both)
    with parent.fisher_pass(["inner"]) as batch:
        batch.backward(losses(parent(X), Y))
    assert parent.net.update_fisher(["a"]) == 2  # a child may be updated by itself
    parent.set_fisher_zero()
    assert not parent.net._fisher["a"]["0"].any()
    parent.init_wpl_weights(force=True)
    assert parent.net.build


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves(dtype):
    """There, `.to` made F the weights, and failed where init_wpl_weights was not called."""
    net = Net(arguments()).to(torch.float32)
    take(net, ["a", "b"])
    before = net._fisher["a"]["0"].clone()
    net.to(dtype)
    assert net._modules_opt["a"]["0"].dtype == dtype
    assert net._fisher["a"]["0"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(net._fisher["a"]["0"].float(), before)
    net.compute_weight_plastic_loss_with_update_fisher(["a", "b"]).backward()


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_state(way):
    parent = Parent()
    take(parent, ["inner", "out"])
    parent.update_optimal_weights()
    with torch.no_grad():
        parent.out.weight.add_(1)
        parent.net.a.weight.add_(1)
    if way == "state_dict":
        other = Parent()
        other.load_state_dict({name: tensor.clone() for name, tensor in parent.state_dict().items()})
    else:
        other = copy.deepcopy(parent) if way == "deepcopy" else pickle.loads(pickle.dumps(parent))
    keys = ["inner", "out"]
    expected = parent.compute_weight_plastic_loss_with_update_fisher(keys)
    assert expected > 0
    parent.set_fisher_zero()
    assert torch.equal(other.compute_weight_plastic_loss_with_update_fisher(keys), expected)
    other.update_optimal_weights()
    assert other.compute_weight_plastic_loss_with_update_fisher(keys) == 0


def test_state_dicts_that_lack_something():
    net = Net(arguments())
    take(net, ["a", "b"])
    state = net.state_dict()
    plain = {name: tensor for name, tensor in state.items() if "wpl." not in name}
    kept = net._fisher["a"]["0"].clone()
    net.load_state_dict(plain)  # of that code, which keeps no anchors
    assert torch.equal(net._fisher["a"]["0"], kept)
    lacking = {name: tensor for name, tensor in state.items() if name != "wpl.fisher.a.0"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "wpl.fisher.a.0"'):
        Net(arguments()).load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "wpl.fisher.z.0"'):
        net.load_state_dict({**state, "wpl.fisher.z.0": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"wpl.fisher.a.0 must have shape \[4, 3\], got \[2\]"):
        net.load_state_dict({**state, "wpl.fisher.a.0": torch.ones(2)})


# ---- the rule of that code, on request -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 10.0])
def test_compat_reproduces_that_code(clip):
    """Squares of the batch's gradient; alpha compounds, by 60 * 0.1 an update, and decays to zero."""
    net = Net(arguments(fisher_clip_by_norm=clip), compat=True)
    losses(net(X), Y).mean().backward()
    net.b.bias.grad = None
    gradient = net.a.weight.grad
    expected, norms = torch.zeros_like(gradient), []
    for epoch in (0, 1, 14, 15, 40):
        alpha = 60.0 if epoch < 15 else 60.0 - (epoch - 14)
        net.update_fisher(["a", "b"], epoch)
        expected = 0.1 * expected + 0.9 * gradient**2
        if 0 < clip < expected.norm():
            expected = expected / expected.norm() * clip
        expected = alpha * expected
        norms.append(net._fisher["a"]["0"].norm().item())
        torch.testing.assert_close(net._fisher["a"]["0"], expected)
    if not clip:
        assert norms[1] / norms[0] == pytest.approx(7.0, rel=1e-5)
        assert norms[2] / norms[1] == pytest.approx(43 / 7, rel=1e-5)
    assert not net._fisher["b"]["1"].any()
    net.update_optimal_weights()
    with torch.no_grad():
        net.a.weight.add_(0.5)
    torch.testing.assert_close(
        net.compute_weight_plastic_loss_with_update_fisher(["a"]).detach(), (expected * 0.25).sum()
    )
    net.update_fisher(["a"], epoch=75)
    assert net.compute_weight_plastic_loss_with_update_fisher(["a"]) == 0
