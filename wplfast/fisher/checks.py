"""Checks of what a Fisher pass is given: losses, weights, and modules that couple samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.watched import Derived, tensors_in
from ..errors import CoupledSamplesError
from ..params import some


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
            how, cure = "is in training mode", "leave out train=True, or put this layer in eval mode"
            if module.running_mean is None:
                how = "has no running statistics"
                cure = "make it with track_running_stats=True, or use GroupNorm or LayerNorm"
            raise CoupledSamplesError(
                f"{name or 'the model'} ({type(module).__name__}) {how}: it normalises over the batch, so samples are "
                f"coupled; {cure}"
            )


def check_arguments(model: Any, data: Any, loss_fn: Any, unpack: Any) -> None:
    """Check what a pass is given, as far as that is told without running anything.

    Raises:
        TypeError: if model and data were swapped, data cannot be iterated over or are one batch, or loss_fn
            cannot be called.
    """
    if isinstance(data, nn.Module) and not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, got {type(model).__name__}, and data are one, a {type(data).__name__}: the order "
            "is fisher_diagonal(model, data, loss_fn)"
        )
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        got = "None" if data is None else type(data).__name__
        raise TypeError(f"data must be an iterable of batches, such as a DataLoader or [(inputs, targets)], got {got}")
    is_one = isinstance(data, (tuple, list)) and len(data) in (2, 3) and all(isinstance(x, Tensor) for x in data)
    if is_one and unpack is None:
        raise TypeError(
            f"data must be an iterable of batches, got {len(data)} tensors, which are one batch: pass "
            f"[({', '.join(('x', 'y', 'weights')[: len(data)])})]"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function loss_fn(outputs, targets) that returns one loss for each sample, such as "
            f"wplfast.losses.cross_entropy, got {type(loss_fn).__name__}"
        )


def check_losses(losses: Tensor) -> None:
    """Check that losses hold one value per sample, of data.

    Raises:
        TypeError: if losses is no tensor.
        ValueError: if it is not [N], or was computed in inference mode.
    """
    if losses is None:
        raise TypeError(
            "losses must be a tensor of shape [N], got None: does loss_fn return something? Models of Hugging Face "
            "compute outputs.loss where labels are among their inputs alone, and as a mean: use losses.cross_entropy("
            "outputs, labels, shift=True), or losses.seq2seq(outputs, labels)"
        )
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
    if losses.is_inference():
        raise ValueError(
            "losses were computed under torch.inference_mode(), in which nothing has a graph: run the model and the "
            "loss outside of it"
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


def check_outputs(outputs: Any, losses: Tensor) -> None:
    """Refuse losses without a graph where the model runs itself in inference mode.

    Raises:
        ValueError: if its outputs were computed in it.
    """
    if not losses.requires_grad and any(tensor.is_inference() for tensor in tensors_in(outputs)):
        raise ValueError(
            "the model's outputs were computed under torch.inference_mode(), in which nothing has a graph: does its "
            "forward pass enter it, or its decorator?"
        )


def without_graph(model: nn.Module, names: list[str], strangers: list[str]) -> str:
    """Say why no loss may depend on some parameters.

    Args:
        model: the module.
        names: of the parameters.
        strangers: those that are not the module's.
    """
    why = f"was the model run under no_grad, are its outputs detached, or is {some(names)} no part of its forward pass?"
    if len(strangers) == len(names):
        why = (
            f"none of params, {some(names)}, is a parameter of this {type(model).__name__}, which has "
            f"{some([name for name, _ in model.named_parameters()])}; pass those of this very model: a copy has its own"
        )
    return f"losses must depend on the parameters through a graph, and those of no batch do: {why}"
