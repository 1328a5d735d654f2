"""Checks of what a Fisher pass is given: losses, weights, and modules that couple samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..capture.watched import Derived
from ..errors import CoupledSamplesError


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the modules that may normalise over the batch, by name."""
    return {n: module for n, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


def check_batch_statistics(modules: Mapping[str, nn.modules.batchnorm._BatchNorm]) -> None:
    """Refuse normalisation over the batch, which the gradients alone cannot show in a first layer.

    Raises:
        CoupledSamplesError: naming the module.
    """
    for name, module in modules.items():
        if module.training or module.running_mean is None:
            how = "is in training mode" if module.training else "has no running statistics"
            raise CoupledSamplesError(
                f"{name or 'the model'} ({type(module).__name__}) {how}: it normalises over the batch, so samples are "
                "coupled; use model.eval() and running statistics"
            )


def check_losses(losses: Tensor) -> None:
    """Check that losses hold one value per sample, of data.

    Raises:
        TypeError: if losses is no tensor.
        ValueError: if it is not [N].
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a tensor of shape [N], got {type(losses).__name__}")
    if losses.dim() != 1 or not losses.is_floating_point():
        hint = {
            0: "a scalar: compute the loss with reduction='none' (wplfast.losses.cross_entropy does), so that every "
            "sample keeps its own",
            2: "one value per token: sum (or average) over the tokens of each sample, losses.sum(1)",
        }.get(losses.dim(), "")
        raise ValueError(
            f"losses must have one value per sample, shape [N], got {str(losses.dtype).removeprefix('torch.')}"
            f"{list(losses.shape)}" + (f", {hint}" if hint else "")
        )
    if isinstance(losses, Derived):
        raise ValueError("losses must depend on data, got a function of the parameters alone")


def check_weights(weights: Tensor | None, losses: Tensor) -> Tensor | None:
    """Check sample weights and bring them to float64 on the losses' device."""
    if weights is None:
        return None
    weights = torch.as_tensor(weights)
    if weights.shape != losses.shape:
        raise ValueError(f"weights must have shape {list(losses.shape)} as losses, got {list(weights.shape)}")
    weights = weights.detach().to(losses.device, torch.float64)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights, such as the third element of a batch, must be finite and not negative")
    return weights.contiguous()
