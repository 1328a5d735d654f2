"""The Weight Plasticity Loss as a function of lists of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import backends
from .ops import check_penalty
from .ops.arguments import PenaltyArguments
from .ops.layout import by_kind, in_order_of, is_dense
from .ops.prepared import PreparedPenalty, dispatched
from .penalty.autograd import differentiable, total
from .penalty.coefficients import constant, scalar
from .penalty.operations import under_vmap


def wpl_penalty(
    params: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: float | Tensor,
    *,
    l2: float | Tensor = 0.0,
) -> Tensor:
    """Return ``alpha/2 sum_p sum_i F_pi (theta_pi - theta_hat_pi)^2 + l2/2 |theta|^2``.

    Args:
        params: parameters theta, any floating point dtype, device and stride.
        theta_hat: their anchors, with the same shapes, dtypes and devices.
        fisher: their Fisher diagonals, with the same shapes and devices; float32 or bfloat16, all alike (float64 for
            float64 parameters).
        alpha: strength of the anchor; a float or a 0-d tensor.
        l2: strength of the weight decay term.

    Returns:
        A 0-d tensor, float32 or wider, differentiable (twice) with respect to params; on the first parameter's device.
        Under ``torch.func.vmap`` any argument may be batched.

    Raises:
        TypeError: if a list is something else (a mapping, a module, one tensor).
        ValueError: if lengths, shapes, dtypes or devices do not fit, or alpha or l2 is complex. (Their values are not
            looked at.)

    Example:
        >>> import torch, wplfast
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss = wplfast.functional.wpl_penalty([w], [torch.zeros(2)], [torch.tensor([1.0, 0.5])], alpha=2.0)
        >>> loss.backward(); loss.item(), w.grad
        (3.0, tensor([2., 2.]))

    Source: arXiv:1902.08232.
    """
    for what, tensors in (("params", params), ("theta_hat", theta_hat), ("fisher", fisher)):
        if not isinstance(tensors, list | tuple):
            _check_list(what, tensors)
        if len(tensors) != len(params):
            raise ValueError(f"{what} must hold {len(params)} tensors, as params does, got {len(tensors)}")
    if not params:
        raise ValueError("params must hold at least one tensor")
    kept = None if dispatched() else backends.kept_penalties(params[0].device.type)
    found = None if kept is None else kept.find(params, theta_hat, fisher)
    if found is not None:
        return differentiable(found(constant(alpha, params[0].device), constant(l2, params[0].device)))
    ordered = not under_vmap()  # or no kernel will run, and what vmap takes of tensors need not be dense
    values = []
    for (device, _), indices in by_kind(params).items():
        theta, hats, fishers = ([column[i] for i in indices] for column in (params, theta_hat, fisher))
        if ordered:
            theta = [p if is_dense(p) else p.contiguous() for p in theta]
            hats, fishers = (
                [t if t.shape != p.shape else in_order_of(t, p) for t, p in zip(column, theta, strict=True)]
                for column in (hats, fishers)
            )
        arguments = PenaltyArguments(theta, hats, (), fishers, scalar(alpha, device), scalar(l2, device))
        check_penalty.check_arguments(arguments, ordered)
        prepared = PreparedPenalty(*arguments) if kept is None else kept.penalty(arguments, params, theta_hat, fisher)
        values.append(differentiable(prepared))
    return total(values)


def _check_list(what: str, given: Any) -> None:
    """Require a sequence of tensors, and tell what else to pass in the place of what is none.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(given, Mapping):
        do = "names are not matched here. Pass [params[n] for n in names], [theta_hat[n] for n in names] and so on"
    elif isinstance(given, Tensor):
        do = "pass [tensor]"
    elif isinstance(given, nn.Module) and not isinstance(given, nn.ParameterList):
        do = "pass list(module.parameters()), and theta_hat and fisher in this order"
    elif hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return
    else:
        do = "pass list(...) of it"
    raise TypeError(
        f"{what} must be a list of tensors, got {type(given).__name__}: {do}. WeightPlasticityLoss takes modules and "
        "mappings, and matches names"
    )
