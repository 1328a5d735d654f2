"""Strengths of the penalty as the op contract wants them: float64 tensors that stay on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

#: One strength for all parameters, or {prefix: strength}.
Alpha: TypeAlias = float | Tensor | Mapping[str, float]


def scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a 0-d coefficient on the device, without grad.

    Raises:
        ValueError: if it is a tensor that is not 0-d, or complex.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"a coefficient must be a float or a 0-d tensor, got shape {list(value.shape)}")
        if value.is_complex():
            raise ValueError(f"a coefficient must be real, got a tensor of {value.dtype}")
        return value.detach().to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def constant(value: float | Tensor, device: torch.device) -> Tensor:
    """Return what :func:`scalar` does, to be read only; for a float on a CPU the same tensor as before.

    For calls that nothing needs to see (:func:`wplfast.ops.prepared.dispatched`).
    """
    if not isinstance(value, float) or device.type != "cpu":
        return scalar(value, device)
    if torch.is_inference_mode_enabled() or torch._C._len_torch_function_stack():
        return scalar(value, device)  # a tensor of this mode, which must not be met outside
    return _kept(float(value))


@lru_cache(32)
def _kept(value: float) -> Tensor:
    """Return a number as a tensor."""
    return scalar(value, torch.device("cpu"))


def alpha_tensor(alpha: Alpha, names: Sequence[str], device: torch.device) -> Tensor:
    """Return alpha as a tensor of its own: 0-d, or one entry per name if it is given by prefix.

    Raises:
        TypeError: if it is no number, such as a Fisher, or a string.
        ValueError: if it is negative, not finite or complex, or a name matches no prefix.
    """
    given: list[Any] = list(alpha.values()) if isinstance(alpha, Mapping) else []
    if any(isinstance(value, Tensor) and value.dim() for value in given):
        raise TypeError(
            "alpha must be a number, or {prefix: number}, got tensors by name, as a Fisher holds them: make the "
            "penalty with WeightPlasticityLoss(model, alpha=...), and pass the Fisher to its consolidate(fisher)"
        )
    with torch.inference_mode(False):  # an inference tensor could not be changed later
        if isinstance(alpha, Tensor):
            strength = scalar(alpha, device).clone()
            if not strength.is_meta:
                _checked(strength)  # waits for a GPU, once
            return strength
        if not isinstance(alpha, Mapping):
            return scalar(_checked(alpha), device)
        values = []
        for name in names:
            longest = next((name[:end] for end in range(len(name), -1, -1) if name[:end] in alpha), None)
            if longest is None:
                raise ValueError(f"alpha has no prefix for {name!r}: got {sorted(alpha)}; '' matches all")
            values.append(_checked(alpha[longest]))
        return torch.tensor(values, dtype=torch.float64, device=device)


def check_order(params: Any, alpha: Any) -> None:
    """Refuse a module in alpha's place, whatever stands in its own: a strength, or a Fisher.

    Raises:
        TypeError: if it does.
    """
    if isinstance(alpha, nn.Module):
        of_fisher = ", and pass the Fisher to its consolidate(fisher)" if isinstance(params, Mapping) else ""
        raise TypeError(
            f"alpha must be a number, or {{prefix: number}}, got a module, {type(alpha).__name__}: the order is "
            f"WeightPlasticityLoss(model, alpha){of_fisher}"
        )


def _checked(value: Any) -> float:
    """Return a strength that is finite and not negative.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is another one.
    """
    if isinstance(value, (str, bytes)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"alpha must be a number, or {{prefix: number}}, got {type(value).__name__}: {value!r:.40}")
    strength = float(scalar(value, value.device) if isinstance(value, Tensor) else value)
    if not 0 <= strength < float("inf"):
        raise ValueError(f"alpha must be finite and not negative, got {strength}")
    return strength
