"""Targets drawn from the model, for the Monte-Carlo Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..losses import logits_of

#: A likelihood by name, or ``sampler(outputs, generator) -> targets``.
Likelihood: TypeAlias = Literal["categorical", "bernoulli", "gaussian"] | Callable[[Any, torch.Generator], Any]


def draw(outputs: Any, given: Any, likelihood: Likelihood, generator: torch.Generator) -> Any:
    """Draw targets from the distribution that the outputs describe.

    Args:
        outputs: categorical: logits [N, ..., C]; bernoulli: logits of any shape; gaussian: means, unit variance.
        given: the batch's targets; where they are a class index below zero (padding), categorical keeps them.
        likelihood: the distribution, or a sampler.
        generator: source of randomness, on the outputs' device.

    Raises:
        ValueError: if the likelihood is unknown, or the generator is of another device.
    """
    if callable(likelihood):
        return likelihood(outputs, generator)
    logits = logits_of(outputs).detach()
    if generator.device.type != logits.device.type:
        raise ValueError(f"generator must be of the outputs' device, {logits.device}, got one of {generator.device}")
    if likelihood == "categorical":
        # A row of NaN is drawn from all the same: its loss is NaN then, and reported as any other.
        probabilities = logits.float().softmax(-1).nan_to_num(nan=1.0).reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])
        if isinstance(given, Tensor) and given.shape == drawn.shape and not given.is_floating_point():
            drawn = torch.where(given < 0, given, drawn)
        return drawn
    if likelihood == "bernoulli":
        return torch.bernoulli(logits.float().sigmoid().nan_to_num(nan=0.5), generator=generator).to(logits.dtype)
    if likelihood == "gaussian":
        noise = torch.randn(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
        return logits + noise.to(logits.dtype)
    raise ValueError(f"likelihood must be 'categorical', 'bernoulli', 'gaussian' or a sampler, got {likelihood!r}")
