"""The plain sum that penalties are compared with after anything that may happen to them, and inputs of every kind.

The oracle keeps every anchor apart, as (theta_hat in the parameter's dtype, weighted F), and adds the definition up. Of
the merged form it knows nothing but that it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (3,), (17,), (5, 7), (1, 6), (2, 0, 3), (2, 3, 5, 3), (70, 61), (4097,)]
LARGE = (70_001,)  # from 65,536 elements on, two threads share the work
ORDERS = ["plain", "transposed", "channels_last", "gaps", "misaligned"]
FISHERS = ["uniform", "zeros", "holes", "tiny", "wide", "large"]


def random(shape, generator, dtype=torch.float64):
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def ordered(values: Tensor, order: str) -> Tensor:
    """Return the values in memory of their own, in some order of memory."""
    if order == "transposed":
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards)
    if order == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if order == "gaps" and values.dim() > 0:
        return values.new_full((*values.shape, 3), torch.nan)[..., 1].copy_(values)
    if order == "misaligned":
        return (
            values.new_full((values.numel() + 12,), torch.nan)[3 : 3 + values.numel()].view(values.shape).copy_(values)
        )
    return values.clone(memory_format=torch.contiguous_format)


def random_fisher(shape, style, generator, dtype) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    uniform = uniform.to(torch.get_default_device())
    if style == "zeros":
        uniform = torch.zeros_like(uniform)
    elif style == "holes":
        uniform = uniform * (torch.rand(shape, generator=generator, device="cpu") < 0.5).to(uniform.device)
    elif style == "tiny":
        uniform = uniform * (1e-6 if dtype == torch.float16 else 1e-25)
    elif style == "wide":
        uniform = 10 ** (uniform * 10 - 7)
    elif style == "large":
        uniform = uniform * (1e4 if dtype == torch.float16 else 1e15)
    return uniform.to(dtype)


class Oracle:
    """One parameter's anchors, apart from each other."""

    def __init__(self, theta: Tensor) -> None:
        self.newest = theta.detach().double().clone()
        self.anchors: list[tuple[Tensor, Tensor]] = []  # (theta_hat, F)
        self.roundings = 0  # how often F was rounded to its dtype

    def fisher(self) -> Tensor:
        return sum((f for _, f in self.anchors), torch.zeros_like(self.newest))

    def enter(self, theta_hat: Tensor, fisher: Tensor, weight: float, decay: float, rule: str) -> None:
        new, theta_hat = weight * fisher.double(), theta_hat.double().clone()
        if rule == "replace":
            self.anchors = [(theta_hat, decay * self.fisher() + new)]
        else:
            self.anchors = [(hat, decay * f) for hat, f in self.anchors] + [(theta_hat, new)]
        self.newest, self.roundings = theta_hat, self.roundings + 1

    def clip(self, max_norm: float) -> None:
        norm = float(self.fisher().norm())
        factor = min(1.0, max_norm / norm) if norm else 1.0
        self.anchors = [(hat, factor * f) for hat, f in self.anchors]
        self.roundings += 1

    def convert(self, dtype: torch.dtype) -> None:
        """Round the newest anchor; the others keep their distance from it."""
        shift = self.newest.to(dtype).double() - self.newest
        self.anchors = [(hat + shift, f) for hat, f in self.anchors]
        self.newest, self.roundings = self.newest + shift, self.roundings + 1

    def grow(self, theta: Tensor) -> None:
        def padded(old: Tensor, filling: Tensor) -> Tensor:
            filling[tuple(slice(0, n) for n in old.shape)] = old
            return filling

        self.newest = padded(self.newest, theta.detach().double().clone())
        self.anchors = [
            (padded(h, self.newest.clone()), padded(f, torch.zeros_like(self.newest))) for h, f in self.anchors
        ]

    def value(self, theta: Tensor, alpha: float, l2: float) -> float:
        p = theta.detach().double()
        return sum(alpha / 2 * float((f * (p - hat) ** 2).sum()) for hat, f in self.anchors) + l2 / 2 * float(
            (p * p).sum()
        )

    def gradient(self, theta: Tensor, alpha: float, l2: float) -> tuple[Tensor, Tensor]:
        """Return it, and the sum of its terms' magnitudes."""
        p = theta.detach().double()
        total, magnitude = l2 * p, l2 * p.abs()
        for hat, f in self.anchors:
            total, magnitude = total + alpha * f * (p - hat), magnitude + alpha * f * (p - hat).abs()
        if len(self.anchors) > 1:  # distances are measured from the newest anchor, and were from every earlier one
            spread = torch.stack([(p - hat).abs() for hat, _ in self.anchors]).amax(0)
            if theta.dtype == torch.float64:
                spread = spread + p.abs()  # the sums of anchors and offsets are rounded too
            magnitude = magnitude + alpha * self.fisher() * spread
        return total, magnitude
