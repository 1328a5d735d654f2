"""Is a sample's loss the same in a batch of its own? The definition of a per-sample loss, tested by a forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .capture.watched import map_tensors, tensors_in

#: Largest relative difference that rounding may make between a batch and a single sample.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def is_independent(
    model: nn.Module, batch: Batch, targets: Any, losses: Tensor, loss_fn: Callable[[Any, Any], Tensor]
) -> bool | None:
    """Compare the loss of the first sample with what it is alone.

    It costs a forward pass of one sample and sees what gradients cannot show: statistics of raw inputs over the batch.

    Args:
        model: the module, deterministic (in eval mode).
        batch: the batch.
        targets: its targets, given or drawn.
        losses: losses [N] of the batch.
        loss_fn: the per-sample loss.

    Returns:
        Whether they agree; None if the batch cannot be cut into samples, or there is one sample only.
    """
    n_samples = len(losses)
    if n_samples < 2:
        return None
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in (losses, *model.parameters()))
    half = half or torch.is_autocast_enabled(losses.device.type)
    tolerance = 5e-2 if half else TOLERANCE.get(losses.dtype, 1e-3)
    level = losses.detach().abs().mean() + losses[0].detach().abs()
    verdict: bool | None = None
    for inputs, target in _cuts(batch.inputs, targets, n_samples):
        try:
            with torch.no_grad():
                alone = loss_fn(Batch(inputs, target, None).forward(model), target)
        except Exception:  # the model's own: it does not take one sample, or was cut along the wrong dimension
            continue
        if alone.shape != (1,):
            continue
        verdict = bool((alone[0] - losses[0].detach()).abs() <= tolerance * level)
        if verdict:
            break
    return verdict


def _cuts(inputs: Any, targets: Any, n_samples: int) -> Iterator[tuple[Any, Any]]:
    """Yield the first sample, cut along dimension 0 or 1 of the inputs and of the targets where they have that size."""
    if all(n_samples not in t.shape[:2] for t in tensors_in((inputs, targets))):
        return

    def cut(tree: Any, first: int) -> Any:
        def part(tensor: Tensor) -> Tensor:
            for dim in (first, 1 - first):
                if dim < tensor.dim() and tensor.shape[dim] == n_samples:
                    return tensor.narrow(dim, 0, 1)
            return tensor

        return map_tensors(part, tree)

    for of_inputs, of_targets in itertools.product((0, 1), repeat=2):
        yield cut(inputs, of_inputs), cut(targets, of_targets)
