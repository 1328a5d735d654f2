"""Checks of what a Fisher pass is given: losses, weights, and modules that couple samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.watched import Derived, tensors_in
from ..errors import CoupledSamplesError, WplfastError
from ..params import some

#: Types of labels.
_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
        TypeError: if arguments were swapped, data cannot be iterated over or are one batch, or loss_fn cannot be
            called, or is a class.
    """
    if isinstance(data, nn.Module) and not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, got {type(model).__name__}, and data are one, a {type(data).__name__}: the order "
            "is fisher_diagonal(model, data, loss_fn)"
        )
    if not _is_iterable(data):
        if callable(data) and _is_iterable(loss_fn):
            raise TypeError(
                f"data must be an iterable of batches, got {type(data).__name__}, and loss_fn is one, a "
                f"{type(loss_fn).__name__}: the order is fisher_diagonal(model, data, loss_fn)"
            )
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
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        reduction = "reduction='none'" if issubclass(loss_fn, nn.modules.loss._Loss) else "..."
        raise TypeError(f"loss_fn is a class: make an instance of it, {loss_fn.__name__}({reduction})")


def _is_iterable(data: Any) -> bool:
    """Tell whether a loop may run over something."""
    return hasattr(data, "__iter__") or hasattr(data, "__getitem__")


def losses_of(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    """Return a user's losses; an error of theirs says what they were given, since the traceback does not.

    Raises:
        TypeError: if loss_fn does not take two arguments.
    """
    try:
        return loss_fn(outputs, targets)
    except Exception as error:
        if isinstance(error, TypeError) and (takes := _takes_others(loss_fn)):
            raise TypeError(
                f"loss_fn is called with two arguments, loss_fn(outputs, targets), and takes {takes}: the model "
                "is run by fisher_diagonal, and its outputs are what the loss is given"
            ) from error
        if hasattr(error, "add_note") and not isinstance(error, WplfastError):  # Python 3.11
            error.add_note(
                f"This is an error of loss_fn(outputs, targets): outputs are {_shown(outputs)}, targets are "
                f"{_shown(targets)}"
            )
        raise


def _takes_others(loss_fn: Callable[..., Any]) -> str:
    """Return a loss's signature if it does not take two arguments; "" if it does, or does not say."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # it has none
        return ""
    try:
        signature.bind(None, None)
    except TypeError:
        return str(signature)
    return ""


def _shown(given: Any) -> str:
    """Describe what a loss was given, with the range of labels."""
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    text = f"{str(given.dtype).removeprefix('torch.')}{list(given.shape)}"
    is_labels = given.dtype in _LABELS and given.layout == torch.strided and not given.is_nested
    if is_labels and given.device.type == "cpu" and given.numel():  # a GPU may be past answering
        text += f" from {int(given.min())} to {int(given.max())}"
    return text


def check_losses(losses: Tensor, outputs: Any = None, targets: Any = None) -> None:
    """Check that losses hold one value per sample, of data.

    Args:
        losses: of a batch.
        outputs: that they were computed of, if that is known.
        targets: with which.

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
            2: "one value per token or output: sum (or average) over those of each sample, losses.sum(1)",
        }.get(losses.dim(), "")
        hint = _broadcast(losses, outputs, targets) or hint
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


def _broadcast(losses: Tensor, outputs: Any, targets: Any) -> str:
    """Say so if losses pair all outputs with all targets, of which either has a dimension more."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or losses.dim() != 2:
        return ""
    n, shapes = len(losses), (outputs.shape, targets.shape)
    if losses.shape != (n, n) or shapes not in (((n, 1), (n,)), ((n,), (n, 1))):
        return ""
    wide = "outputs" if outputs.dim() == 2 else "targets"
    return (
        f"to which outputs {list(outputs.shape)} and targets {list(targets.shape)} were broadcast, each with all: give "
        f"the loss {wide}.squeeze(1)"
    )


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
