"""The Weight Plasticity Loss as a function of lists of tensors, and its autograd.

The forward pass computes the value and, in the same pass over memory, the gradient (16 bytes a float32 parameter: three
reads, one write). The backward pass hands views of that gradient on: as they are where the incoming gradient is 1 on
the CPU, else after scaling them in place (8 bytes more). Recomputing the gradient in the backward pass instead would
cost 12 + 16 bytes and read theta, theta_hat and F twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .coefficients import scalar
from .ops import check_penalty
from .ops.layout import flat_dtype, is_dense, packed_views, same_order


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
        fisher: their Fisher diagonals, float32 (float64 for float64 parameters), with the same shapes and devices.
        alpha: strength of the anchor; a float or a 0-d tensor.
        l2: strength of the weight decay term.

    Returns:
        A 0-d tensor, float32 or wider, differentiable (twice) with respect to params; on the first parameter's device.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not fit.

    Example:
        >>> import torch, wplfast
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss = wplfast.functional.wpl_penalty([w], [torch.zeros(2)], [torch.tensor([1.0, 0.5])], alpha=2.0)
        >>> loss.backward(); loss.item(), w.grad
        (3.0, tensor([2., 2.]))

    Source: arXiv:1902.08232.
    """
    for what, tensors in (("theta_hat", theta_hat), ("fisher", fisher)):
        if len(tensors) != len(params):
            raise ValueError(f"{what} must hold {len(params)} tensors, as params does, got {len(tensors)}")
    if not params:
        raise ValueError("params must hold at least one tensor")
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(params):
        groups.setdefault((parameter.device, parameter.dtype), []).append(index)
    values = []
    for (device, _), indices in groups.items():
        theta = [params[i] if is_dense(params[i]) else params[i].contiguous() for i in indices]
        hats, fishers = (
            [t if t.shape != p.shape or same_order(t, p) else _like(t, p) for t, p in zip(column, theta, strict=True)]
            for column in ([theta_hat[i] for i in indices], [fisher[i] for i in indices])
        )
        coefficients = scalar(alpha, device), scalar(l2, device)
        check_penalty.check_anchors(theta, hats, (), fishers, *coefficients)
        values.append(penalty(theta, hats, (), fishers, *coefficients))
    return total(values)


def penalty(
    theta: Sequence[Tensor],
    theta_hat: Sequence[Tensor],
    offset: Sequence[Tensor],
    fisher: Sequence[Tensor],
    alpha: Tensor,
    l2: Tensor,
) -> Tensor:
    """Return the differentiable value for tensors that fulfil the op contract already."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in theta):
        tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        apply: Any = (_Penalty if tracing else _EagerPenalty).apply
        value: Tensor
        value, _ = apply(alpha, l2, len(theta), *theta, *theta_hat, *fisher, *offset)
        return value
    result: Tensor = torch.ops.wplfast.penalty(theta, theta_hat, offset, fisher, alpha, l2)
    return result


def total(values: Sequence[Tensor]) -> Tensor:
    """Add the values of several groups, on the first one's device, in the widest dtype."""
    result = values[0]
    for value in values[1:]:
        result = result + value.to(result.device)
    return result


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Copy a tensor into the parameter's memory order."""
    return torch.empty_strided(tensor.shape, parameter.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _split(tensors: Sequence[Tensor], n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Undo the concatenation theta, theta_hat, fisher, offset (which may be empty)."""
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n : 3 * n]), list(tensors[3 * n :])


class _Penalty(torch.autograd.Function):
    """Value and packed gradient in one pass; the gradient of theta alone is defined."""

    @staticmethod
    def forward(alpha: Tensor, l2: Tensor, n: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate both."""
        theta, theta_hat, fisher, offset = _split(tensors, n)
        value, packed = torch.ops.wplfast.penalty_with_grad(theta, theta_hat, offset, fisher, alpha, l2)
        return value, packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the gradient, and what a second derivative needs."""
        alpha, l2, n, *tensors = inputs
        _, packed = output
        ctx.n = n
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, alpha, l2, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradient on, times the incoming one."""
        packed, alpha, l2, *tensors = ctx.saved_tensors
        nothing = (None,) * (len(tensors) - ctx.n)
        if upstream is None:
            return (None, None, None, *(None,) * ctx.n, *nothing)
        if torch.is_grad_enabled():
            return (None, None, None, *_differentiable(upstream, alpha, l2, _split(tensors, ctx.n)), *nothing)
        return (None, None, None, *packed_views(_scaled(packed, upstream), tensors[: ctx.n]), *nothing)


class _EagerPenalty(_Penalty):
    """The same outside of transforms, where PyTorch need not look at the signature of ``forward`` at every call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Evaluate both."""
        output = _Penalty.forward(*inputs)
        _Penalty.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context  # the default tells PyTorch that forward takes ctx


def _scaled(packed: Tensor, upstream: Tensor) -> Tensor:
    """Multiply the packed gradient with the incoming one, in place where nobody will need it again."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return packed * upstream.to(packed.dtype)
    one = upstream.device.type == "cpu" and upstream.item() == 1.0  # on a GPU the look would cost a synchronisation
    if torch._C._autograd._get_current_graph_task_keep_graph():
        # A second backward pass may come, and AccumulateGrad may take the views for .grad: give them a copy.
        return packed.clone() if one else packed * upstream.to(packed.dtype)
    return packed if one else packed.mul_(upstream.to(packed.dtype))


def _differentiable(
    upstream: Tensor, alpha: Tensor, l2: Tensor, split: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
) -> list[Tensor]:
    """Return the gradients by ordinary operations, for a second derivative."""
    gradients = []
    for index, (p, p_hat, f) in enumerate(zip(*split[:3], strict=True)):
        wide = flat_dtype(p.dtype)
        alpha_p = (alpha if alpha.dim() == 0 else alpha[index]).to(wide)
        d = p.to(wide) - p_hat.to(wide)
        if split[3]:
            d = d - split[3][index]
        gradients.append((upstream.to(wide) * (alpha_p * f * d + l2.to(wide) * p.to(wide))).to(p.dtype))
    return gradients
