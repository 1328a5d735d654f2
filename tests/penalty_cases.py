"""Modules, penalties, the plain formula and other helpers that several files of tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wplfast

needs_cpp = pytest.mark.needs_cpp
BIG = 1 << 18  # float32 elements of 1 MiB: from here on gradient buffers are used again


def trunk(dtype=torch.float32) -> nn.Sequential:
    """Layers whose parameters have one, two and three dimensions, for inputs [N, 7, 5]."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Conv1d(7, 3, 6), nn.Linear(2, 2, bias=False)).to(dtype)


def random_fisher(module) -> dict[str, Tensor]:
    return {n: torch.rand(p.shape, dtype=torch.float64).to(torch.float32) for n, p in module.named_parameters()}


def move(module, by=0.1) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))


def values(module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in module.named_parameters()}


def enter(wpl, module, fisher=None, by=0.1, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Consolidate with random F, or the given one, and move away; return the anchor: theta_hat and F."""
    anchor = values(module), random_fisher(module) if fisher is None else fisher
    wpl.consolidate(anchor[1], **options)
    move(module, by)
    return anchor


def anchored(module, anchors=1, **settings) -> wplfast.WeightPlasticityLoss:
    """A penalty whose anchors the module has moved away from."""
    wpl = wplfast.WeightPlasticityLoss(module, **({"alpha": 2.0} | settings))
    for _ in range(anchors):
        enter(wpl, module)
    return wpl


def expected(module, anchors, alpha=2.0, l2=0.0, names=None) -> Tensor:
    """The definition in float64, of all parameters that have anchors, or of those that are named."""
    total = torch.zeros((), dtype=torch.float64)
    for name, p in module.named_parameters():
        if names is None or name in names:
            theta = p.double()  # once, so that a gradient is rounded once
            a = alpha[name] if isinstance(alpha, dict) else alpha
            for hat, fisher in anchors:
                total = total + a / 2 * (fisher[name].double() * (theta - hat[name].double()) ** 2).sum()
            total = total + l2 / 2 * (theta**2).sum()
    return total


def plain(module, wpl, alpha=2.0, names=None) -> Tensor:
    """The definition for one anchor, read from the penalty."""
    return expected(module, [(wpl.theta_hat, wpl.fisher)], alpha, names=wpl.fisher if names is None else names)


def gradients(module, value) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def grads_of(wpl_call, module) -> list[Tensor]:
    return list(gradients(module, wpl_call()).values())


def one_big(n=BIG) -> tuple[Tensor, wplfast.WeightPlasticityLoss]:
    """One parameter with a gradient of 1 MiB, whose every entry is theta."""
    theta = torch.zeros(n, requires_grad=True)
    wpl = wplfast.WeightPlasticityLoss({"theta": theta})
    wpl.consolidate({"theta": torch.ones(n)})
    return theta, wpl


def set_to(theta: Tensor, value: float) -> None:
    with torch.no_grad():
        theta.fill_(value)


def copied(state) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def same_state(first, second) -> bool:
    """Tell whether two penalties, or a penalty and a copied state, are equal to the bit."""
    a, b = (each.state_dict() if isinstance(each, nn.Module) else each for each in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def in_a_flat_buffer(module):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.parameters()), module.parameters())


def set_data(parameter, data):
    parameter.data = data


STALE = {
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "half and back": lambda m: m.half().float(),
    "to": lambda m: m.to(m[0].weight.device, torch.float64),
    "p.data": lambda m: [set_data(p, p.data.clone()) for p in m.parameters()],
    "channels swapped in memory": lambda m: set_data(m[0].weight, m[0].weight.data.t().contiguous().t()),
    "a view with gaps": lambda m: set_data(m[0].weight, torch.zeros(7, 10)[:, ::2].copy_(m[0].weight.data)),
    "a flat buffer": in_a_flat_buffer,
    "load_state_dict": lambda m: m.load_state_dict({n: p + 1 for n, p in m.state_dict().items()}),
    "storage": lambda m: [p.untyped_storage().copy_(p.data.clone().untyped_storage()) for p in m.parameters()],
    "set_": lambda m: [p.data.set_(p.data.clone()) for p in m.parameters()],
    "share_memory": lambda m: m.share_memory(),
}
