"""The penalty by ordinary operations: for second derivatives, and for what has no kernel, batches of ``vmap``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.arguments import PenaltyArguments
from ..ops.layout import flat_dtype

#: What tells which transforms are active; None in a version of PyTorch that has it elsewhere.
_stack: Any = getattr(torch._C._functorch, "get_interpreter_stack", None)
_VMAP: Any = getattr(getattr(torch._C._functorch, "TransformType", None), "Vmap", None)
_is_legacy_batched: Any = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)


def under_vmap() -> bool:
    """Tell whether one of the active transforms is ``vmap``, or may be: operations are right under all of them."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    if _stack is None or _VMAP is None:
        return True
    return any(level.key() == _VMAP for level in _stack() or ())


def is_batched(upstream: Tensor) -> bool:
    """Tell whether an incoming gradient may stand for several: under transforms, or with ``is_grads_batched=True``."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return _is_legacy_batched is not None and bool(_is_legacy_batched(upstream))


def value_by_operations(arguments: PenaltyArguments) -> Tensor:
    """Return the value, differentiable any number of times; tensors may lie in any memory order."""
    l2, total = arguments.l2, torch.zeros((), dtype=torch.float64, device=arguments.l2.device)
    for p, d, f, alpha in _terms(arguments):
        anchored = (f * d * d).sum(dtype=torch.float64)
        total = total + 0.5 * (alpha * anchored + l2 * p.square().sum(dtype=torch.float64))
    return total.to(flat_dtype(arguments.theta[0].dtype))


def gradients_by_operations(upstream: Tensor, arguments: PenaltyArguments) -> list[Tensor]:
    """Return the gradients times an incoming one."""
    gradients = []
    for own, (p, d, f, alpha) in zip(arguments.theta, _terms(arguments), strict=True):
        wide = p.dtype
        gradient = upstream.to(wide) * (alpha.to(wide) * f * d + arguments.l2.to(wide) * p)
        gradients.append(gradient.to(own.dtype))
    return gradients


class _Term(NamedTuple):
    """What one parameter brings, in a wide type."""

    theta: Tensor
    distance: Tensor  #: from the anchor
    fisher: Tensor
    alpha: Tensor  #: 0-d, float64


def _terms(arguments: PenaltyArguments) -> Iterator[_Term]:
    """Yield what the parameters bring."""
    theta, theta_hat, offset, fisher, alpha, _ = arguments
    for index, (p, p_hat, f) in enumerate(zip(theta, theta_hat, fisher, strict=True)):
        wide = flat_dtype(p.dtype)
        p = p.to(wide)
        d = p - p_hat.to(wide)
        if offset:
            d = d - offset[index]
        yield _Term(p, d, f.to(wide), alpha if alpha.dim() == 0 else alpha[index])
