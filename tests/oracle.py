"""The one-sample loop that every Fisher is compared with: slow, obvious, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wplfast.capture.watched import map_tensors


def fisher_loop(
    model: nn.Module,
    batches: list[tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], Tensor],
    params: dict[str, Tensor] | None = None,
    axes: tuple[int, int] = (0, 0),
    double: bool = True,
) -> dict[str, Tensor]:
    """Mean over samples of squared gradients, one forward and backward pass for each sample.

    Args:
        model: the module, in the mode it is to be run in; copied unless it is in float64 already.
        batches: (inputs, targets); inputs a tensor, a tuple (positional) or a dict (keywords).
        loss_fn: returns losses [N].
        params: names to report (default: all that require grad).
        axes: the sample axis of inputs and of targets.
        double: compute in float64.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad] if params is None else list(params)
    if double and any(p.dtype != torch.float64 for p in model.parameters()):
        model = copy.deepcopy(model).double()
        batches = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batches)
    watched = {name: p for name, p in model.named_parameters() if name in names}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in watched.items()}
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with without_cudnn() if recurrent else nullcontext():
        count = _add_squares(model, batches, loss_fn, axes, watched, total)
    return {name: value / count for name, value in total.items()}


def without_cudnn() -> AbstractContextManager[None]:
    """PyTorch's own kernels: those of cuDNN have no backward pass through an RNN in eval mode."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False, allow_tf32=False)
    return flags if torch.cuda.is_available() else nullcontext()


def _add_squares(
    model: nn.Module,
    batches: list[tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], Tensor],
    axes: tuple[int, int],
    watched: dict[str, Tensor],
    total: dict[str, Tensor],
) -> int:
    """Add every sample's squared gradient; return how many there are."""
    count = 0
    for inputs, targets in batches:
        n_samples = targets.shape[axes[1]]
        for n in range(n_samples):
            one = map_tensors(lambda t: t.narrow(axes[0], n, 1), inputs)  # noqa: B023
            outputs = call(model, one)
            loss_fn(outputs, targets.narrow(axes[1], n, 1)).sum().backward()
            for name, p in watched.items():
                if p.grad is not None:
                    total[name] += p.grad.double().square()
            model.zero_grad()
            count += 1
    return count


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model: a dict is keywords, a tuple positional."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def assert_close(got: Any, expected: dict[str, Tensor], rtol: float = 1e-5, model_rtol: float = 2e-6) -> None:
    """DESIGN's bound: per tensor relative, with a floor from the whole model (key biases have zero gradient)."""
    assert set(got) == set(expected)
    whole = torch.cat([e.flatten() for e in expected.values()]).norm()
    difference = torch.cat([(got[name].double() - e).flatten() for name, e in expected.items()]).norm()
    for name, e in expected.items():
        assert got[name].shape == e.shape
        error = float((got[name].double() - e).norm())
        assert error <= rtol * float(e.norm()) + 1e-12 * float(whole), f"{name}: {error} against {float(e.norm())}"
    assert float(difference) <= model_rtol * float(whole)
    assert float(whole) > 0, "the test would pass on zeros"
