"""Modules, penalties and helpers that several files of tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wplfast

needs_cpp = pytest.mark.needs_cpp
BIG = 1 << 18  # float32 elements of 1 MiB: from here on gradient buffers are used again


def trunk(dtype=torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)


def random_fisher(module) -> dict[str, Tensor]:
    return {n: torch.rand(p.shape, dtype=torch.float64).to(torch.float32) for n, p in module.named_parameters()}


def move(module, by=0.1) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))


def anchored(module, anchors=1, **settings) -> wplfast.WeightPlasticityLoss:
    wpl = wplfast.WeightPlasticityLoss(module, **({"alpha": 2.0} | settings))
    for _ in range(anchors):
        wpl.consolidate(random_fisher(module))
        move(module)
    return wpl


def one_big(n=BIG) -> tuple[Tensor, wplfast.WeightPlasticityLoss]:
    """One parameter with a gradient of 1 MiB, whose every entry is theta."""
    theta = torch.zeros(n, requires_grad=True)
    wpl = wplfast.WeightPlasticityLoss({"theta": theta})
    wpl.consolidate({"theta": torch.ones(n)})
    return theta, wpl


def set_to(theta: Tensor, value: float) -> None:
    with torch.no_grad():
        theta.fill_(value)


def grads_of(wpl_call, module) -> list[Tensor]:
    return list(torch.autograd.grad(wpl_call(), list(module.parameters())))


def plain(module, wpl, alpha=2.0) -> Tensor:
    """The penalty of one anchor as anyone would write it."""
    terms = [
        (wpl.fisher[n] * (p - wpl.theta_hat[n]) ** 2).sum() for n, p in module.named_parameters() if n in wpl.fisher
    ]
    return alpha / 2 * torch.stack(terms).sum()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)


def reload(module):
    module.load_state_dict({n: p + 1 for n, p in module.state_dict().items()})


STALE = {
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(m[0].weight.device, torch.float64),
    "p.data": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "a flat buffer": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()), m.parameters()
    ),
    "load_state_dict": reload,
    "storage": lambda m: [p.untyped_storage().copy_(p.data.clone().untyped_storage()) for p in m.parameters()],
    "set_": lambda m: [p.data.set_(p.data.clone()) for p in m.parameters()],
    "share_memory": lambda m: m.share_memory(),
}
