"""Is a sample's loss, and its gradient, the same in a batch of its own? The definition of per-sample, tested.

The batch of its own holds the sample twice: some models refuse a single sample, and PyTorch itself errs there (2.13,
CPU: the backward pass of ``batch_norm`` in eval mode, for N = 1 and gradients of some strides, by more than 100%).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product, repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.collect.batch import SingleSample
from ..capture.watched import map_tensors, tensors_in
from ..undo import Undo
from .batches import Batch
from .preserve import Preserved, Snapshot

#: Largest relative difference that rounding may make between a batch and a single sample.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}

#: Losses below this are rounding noise, with which nothing can be compared.
SMALLEST = 1e-6


def run_single_sample(
    model: nn.Module,
    batch: Batch,
    targets: Any,
    losses: Tensor,
    loss_fn: Callable[[Any, Any], Tensor],
    parameters: Sequence[Tensor],
) -> tuple[bool | None, SingleSample | None]:
    """Run the last sample in a batch of its own (twice), natively, and compare its loss.

    It costs a forward and a backward pass of two samples, and sees what gradients in a batch cannot show, such as
    statistics of raw inputs over the batch.

    Args:
        model: the module, deterministic (in eval mode).
        batch: the batch.
        targets: its targets, given or drawn.
        losses: losses [N] of the batch.
        loss_fn: the per-sample loss.
        parameters: the watched parameters.

    Returns:
        Whether the loss is the same (None: cannot be told), and the sample's gradients if it is.
    """
    n_samples = len(losses)
    expected = losses.detach()
    if n_samples < 2 or not bool(torch.isfinite(expected).all()):
        return None, None
    level = expected.abs().mean() + expected[-1].abs()
    if not bool(level > SMALLEST):
        return None, None
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in (losses, *model.parameters()))
    half = half or torch.is_autocast_enabled(losses.device.type)
    tolerance = 5e-2 if half else TOLERANCE.get(losses.dtype, 1e-3)
    verdict: bool | None = None
    with torch._C.DisableTorchFunctionSubclass(), Preserved(Snapshot(model)), _WithoutHooks(parameters):
        for inputs, target in _cuts(batch.inputs, targets, n_samples):
            try:
                loss = loss_fn(Batch(inputs, target, None).forward(model), target)
            except Exception:  # the model's own: it does not take two samples, or was cut along the wrong dimension
                continue
            if loss.shape != (2,):
                continue
            verdict = bool((loss.detach() - expected[-1]).abs().max() <= tolerance * level)
            if verdict:
                try:
                    gradients = torch.autograd.grad(loss.sum(), list(parameters), allow_unused=True)
                except RuntimeError:  # reentrant checkpoints want .backward(), which would run the users' hooks
                    return True, None
                return True, SingleSample(n_samples - 1, [None if g is None else g / 2 for g in gradients])
    return verdict, None


def _cuts(inputs: Any, targets: Any, n_samples: int) -> Iterator[tuple[Any, Any]]:
    """Yield the last sample, twice: cut along dimension 0 or 1 where inputs and targets have the batch's size there.

    First all tensors are cut, then all but one of the inputs: a mask [T, T] or positions [T] may have that size too.
    """
    cuttable = [t for t in tensors_in((inputs, targets)) if n_samples in t.shape[:2]]
    if not cuttable:
        return

    def cut(tree: Any, first: int, spared: Tensor | None) -> Any:
        def part(tensor: Tensor) -> Tensor:
            for dim in (first, 1 - first):
                if tensor is not spared and dim < tensor.dim() and tensor.shape[dim] == n_samples:
                    return tensor.narrow(dim, n_samples - 1, 1).repeat_interleave(2, dim)
            return tensor

        return map_tensors(part, tree)

    for spared in [None, *(cuttable[:8] if len(cuttable) > 2 else [])]:
        for of_inputs, of_targets in product((0, 1), repeat=2):
            yield cut(inputs, of_inputs, spared), cut(targets, of_targets, spared)


class _WithoutHooks(Undo):
    """Take the users' gradient hooks off the parameters, so that they see no gradients of ours."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Take them off these."""
        super().__init__()
        self._hooked = [p for p in parameters if p._backward_hooks]

    def change(self) -> None:
        """Take them off."""
        self.by(setattr, self._hooked, repeat("_backward_hooks"), [p._backward_hooks for p in self._hooked])
        for p in self._hooked:
            p._backward_hooks = None
