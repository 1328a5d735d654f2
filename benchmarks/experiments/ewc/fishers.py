"""The Fisher of a task: the right one, in three types, and the common mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wplfast

from ...plumbing.data import Split

#: how F is computed, and what each is called in tables and figures
KINDS = {
    "empirical": "right: empirical",
    "exact": "right: exact over classes",
    "mc": "right: labels drawn from the model",
    "squared": "batch-squared",
}


def estimate(
    kind: str,
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    split: Split,
    batch_size: int,
    max_samples: int | None = None,
) -> Mapping[str, Tensor]:
    """Return F of a model over (the first of) its training data, read in batches of one size."""
    images, labels = (part[:max_samples] for part in split.train)
    loader = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    if kind == "squared":
        return batch_squared(model, params, loader)
    return wplfast.fisher_diagonal(
        model,
        loader,
        wplfast.losses.cross_entropy,
        params=params,
        fisher_type=kind,  # type: ignore[arg-type]
    )


def batch_squared(
    model: nn.Module, params: Mapping[str, nn.Parameter], loader: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the common mistake: the square of each batch's mean gradient, averaged over batches."""
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    count = 0
    for images, labels in loader:
        gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(params.values()))
        for name, gradient in zip(params, gradients, strict=True):
            total[name] += gradient.square()
        count += 1
    return {name: value / count for name, value in total.items()}
