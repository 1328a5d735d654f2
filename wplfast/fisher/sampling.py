"""Targets drawn from the distribution that logits or means describe, for the Monte-Carlo Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

#: A likelihood by name, or ``sampler(outputs, generator) -> targets``.
Likelihood: TypeAlias = Literal["categorical", "bernoulli", "gaussian"] | Callable[[Any, torch.Generator], Any]

#: Probabilities that are added up in float64 at a time.
CHUNK = 1 << 22


def draw(logits: Tensor, likelihood: str, generator: torch.Generator, dim: int = -1, count: int = 1) -> Tensor:
    """Draw targets for each row of the logits (categorical), or for each of them.

    Each draw is from the distribution, and independent between rows. The draws of one row are stratified (a Latin
    hypercube): each falls into another of ``count`` equally probable parts, which leaves less noise than
    independent draws.

    Args:
        logits: categorical: logits of any shape; bernoulli: logits; gaussian: means, unit variance.
        likelihood: the distribution.
        generator: source of randomness, on the logits' device.
        dim: the dimension of the classes, for categorical.
        count: draws of each row.

    Returns:
        [count, ...]: class indices (int64) in the shape without ``dim``, or 0, 1 or real numbers in the logits' shape
        and dtype.

    Raises:
        ValueError: if the generator is of another device.
    """
    logits = logits.detach()
    if generator.device.type != logits.device.type:
        raise ValueError(f"generator must be of the outputs' device, {logits.device}, got one of {generator.device}")
    if likelihood == "categorical":
        logits = logits.movedim(dim, -1)
        shape = logits.shape[:-1]
        rows = logits.reshape(-1, logits.shape[-1])
        uniform = _uniform(len(rows), count, generator)
        size = max(1, CHUNK // rows.shape[1])
        drawn = [_classes(part, u) for part, u in zip(rows.split(size), uniform.split(size), strict=True)]
        return torch.cat(drawn).T.reshape(count, *shape)
    uniform = _uniform(logits.numel(), count, generator).T.reshape(count, *logits.shape)
    if likelihood == "bernoulli":
        return (uniform < logits.double().sigmoid().nan_to_num(nan=0.5)).to(logits.dtype)
    noise: Tensor = torch.special.ndtri(uniform.clamp_min(1e-16))
    return (logits + noise).to(logits.dtype)


def _classes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Find the classes [rows, count] in which uniform numbers fall."""
    # A row of NaN is drawn from all the same: its loss is NaN then, and reported as any other.
    cumulative = logits.double().softmax(-1).nan_to_num(nan=1.0).cumsum(-1)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:] * (1 - 1e-14), right=True)
    return found.clamp_max(logits.shape[-1] - 1)


def _uniform(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw numbers in [0, 1), [rows, count]; those of one row fall into different parts, in random order."""
    uniform = torch.rand(rows, count, generator=generator, device=generator.device, dtype=torch.float64)
    if count == 1:
        return uniform
    order = torch.rand(rows, count, generator=generator, device=generator.device).argsort(1)
    return (order + uniform) / count
