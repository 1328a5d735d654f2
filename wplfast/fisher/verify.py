"""``verify_fisher``: compare a few samples with a one-sample loop, the slow way that nobody doubts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.watched import map_tensors, tensors_in
from ..distributed.engines import inner_module
from ..errors import UnsupportedParameterError, VerificationError
from ..ops.layout import flat_dtype
from ..params import Params, device_of, is_fully_sharded, named
from .batches import Batch, Unpack
from .diagonal import fisher_diagonal
from .undisturbed import Undisturbed


def verify_fisher(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    params: Params | None = None,
    unpack: Unpack | None = None,
    max_samples: int = 4,
    rtol: float | None = None,
) -> dict[str, float]:
    """Compare ``fisher_diagonal`` on a few samples with one forward and backward pass for each of them.

    The model runs in eval mode. Samples are cut from dimension 0 of every input and target tensor that has the batch's
    size there, so inputs with the sample axis elsewhere cannot be checked in this way.

    Args:
        model: the module.
        batch: one batch, of any form that ``fisher_diagonal`` takes.
        loss_fn: returns one loss per sample, [N].
        params: what to compare; default: all parameters that require grad.
        unpack: turns the batch into (inputs, targets).
        max_samples: samples to compare, from the batch's start.
        rtol: largest relative difference allowed per parameter; default: 1e-9 in float64, 1e-3 in float32, 0.05 in
            half.

    Returns:
        Parameter name -> ``|F - F_loop| / |F_loop|``; for parameters whose gradient is zero but for rounding
        (attention key
        biases), relative to the whole model.

    Raises:
        VerificationError: if a parameter differs by more than rtol.
        ValueError: if the batch cannot be cut into samples.
        UnsupportedParameterError: if it is an FSDP2 model.
    """
    model = inner_module(model)
    if is_fully_sharded(model):
        raise UnsupportedParameterError(
            "verify_fisher runs samples one by one, which the ranks of an FSDP2 model cannot do apart: verify on a "
            "small copy of the model to which fully_shard was not applied"
        )
    parameters = named(model if params is None else params, complex_too=True)
    device = device_of([*model.parameters(), *parameters.values()])
    taken = Batch.of(batch, unpack, device)
    size = next((t.shape[0] for t in tensors_in(taken.targets) if t.dim()), 0)
    count = min(max_samples, size)
    if count < 1:
        raise ValueError("the batch's targets must be a tensor with the sample axis first")

    def cut(first: int, last: int) -> tuple[Any, Any]:
        def part(tensor: Tensor) -> Tensor:
            return tensor[first:last] if tensor.dim() and tensor.shape[0] == size else tensor

        inputs, targets = map_tensors(part, (taken.inputs, taken.targets))
        return inputs, targets

    fisher = fisher_diagonal(model, [cut(0, count)], loss_fn, params=parameters, unpack=tuple, reduce=False)
    with Undisturbed(model, train=False, device=device):
        loop = {name: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for name, p in parameters.items()}
        for n in range(count):
            inputs, targets = cut(n, n + 1)
            losses = loss_fn(Batch(inputs, targets, None).forward(model), targets)
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            for total, gradient in zip(loop.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.abs().double().square() / count
    return _compare(fisher, loop, parameters, rtol)


def _compare(
    fisher: Any, loop: dict[str, Tensor], parameters: dict[str, Tensor], rtol: float | None
) -> dict[str, float]:
    """Return the relative differences, or raise."""
    whole = sum(float(f.square().sum()) for f in loop.values()) ** 0.5
    errors = {}
    for name, expected in loop.items():
        dtype = parameters[name].dtype
        allowed = rtol
        if allowed is None:
            allowed = 1e-9 if dtype == torch.float64 else 1e-3 if flat_dtype(dtype) == dtype else 0.05
        difference = float((fisher[name].double() - expected).norm())
        norm = float(expected.norm())
        errors[name] = difference / norm if norm > 1e-9 * whole else difference / (whole or 1.0)
        if not errors[name] <= allowed:
            raise VerificationError(
                f"the Fisher of {name!r} differs from the one-sample loop by {errors[name]:.3g} (allowed {allowed:g})"
            )
    return errors
