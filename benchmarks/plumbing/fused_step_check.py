"""Whether the prototype's steps are those of ``add_grad_`` and torch's fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import wplfast

from ..contenders import ALPHA, Case, WrongResultError
from .fused_step import STATE, OwnStep, torch_optimizer

STEPS, LR = 4, 0.2
#: Relative to how far the parameters went, which is far enough for a few units in the last place to stay below it.
TOLERANCE = 1e-5


def anchored(
    theta: Sequence[Tensor], theta_hat: Sequence[Tensor], fisher: Sequence[Tensor]
) -> wplfast.WeightPlasticityLoss:
    """Return the library's penalty."""
    penalty = wplfast.WeightPlasticityLoss({str(i): p for i, p in enumerate(theta)}, alpha=ALPHA)
    anchors = {str(i): a for i, a in enumerate(theta_hat)}
    penalty.consolidate({str(i): f for i, f in enumerate(fisher)}, theta_hat=anchors)
    return penalty


def check(rule: str, case: Case) -> dict[str, float]:
    """Return the prototype's relative errors after several steps: fused and in two passes, parameters and values.

    Every step begins with new gradients, as after ``zero_grad`` and ``backward``.

    Raises:
        WrongResultError: if one is above the tolerance.
    """
    gradients = [p.grad for p in case.theta]

    def go(theta: list[Tensor], step: Callable[[], Tensor | float]) -> Tensor:
        values = []
        for k in range(STEPS):
            for p, g in zip(theta, gradients, strict=True):
                p.grad = g * (1 + k)
            values.append(float(step()))
        return torch.tensor(values, dtype=torch.float64)

    def copies() -> list[Tensor]:
        return [p.detach().clone().requires_grad_() for p in case.theta]

    def farthest(a: list[Tensor], b: list[Tensor]) -> Tensor:
        pairs = ((p.detach(), q.detach()) for p, q in zip(a, b, strict=True) if p.numel())
        return torch.stack([(p - q).abs().max() for p, q in pairs]).max()

    expected = copies()
    penalty, optimizer = anchored(expected, case.theta_hat, case.fisher), torch_optimizer(rule, expected, LR)
    values = go(expected, lambda: (penalty.add_grad_(), optimizer.step())[0])
    errors = {}
    for name in ("fused", "two passes"):
        theta = copies()
        state = [[torch.zeros_like(p) for _ in STATE[rule]] for p in theta]
        own = OwnStep(rule, theta, case.theta_hat, case.fisher, state, ALPHA, LR)
        found = go(theta, own.fused if name == "fused" else lambda own=own: (own.penalty(), own.step())[0])
        errors[name] = (farthest(theta, expected) / farthest(expected, case.theta)).item()
        errors[f"{name}, value"] = (found / values - 1).abs().max().item()
    if not all(error < TOLERANCE for error in errors.values()):
        raise WrongResultError(f"{case.name}, {rule}: relative errors {errors}, expected < {TOLERANCE}")
    return errors
