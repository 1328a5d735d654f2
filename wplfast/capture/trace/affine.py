"""Products with a matrix of parameters, sums with a vector of them: one node of the graph each, tap and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..call_site import TappedCall
from ..rules import Rule
from .nested import current_task, listener_of
from .product import is_faster, multiply

mm, addmm = torch.mm, torch.addmm  # looked up once


class AffineMap(NamedTuple):
    """``x -> x W^T + b``, and whether oneDNN is to compute it; ``x -> x + b`` where there is no W.

    ``apply(tapped, x, affine_map, *leaves)`` computes and taps it, as one node of the graph instead of two.
    """

    apply: Callable[..., Tensor]
    weight: Tensor | None
    transposed: Tensor | None  # W^T, a view that is made once
    bias: Tensor | None
    by_onednn: bool = False
    keeps_input: bool = False  # the rule needs it


def affine_map_of(call: Call, rule: Rule, inputs: list[Tensor]) -> AffineMap | None:
    """Return the matrix W and the vector b where a call is ``x W^T + b`` of its only input; None otherwise."""
    if call.in_place or call.autocast is not None or len(inputs) != 1:
        return None
    x = inputs[0]
    if x.layout != torch.strided or x.dim() < 2 or not x.numel():
        return None
    term = rule.term(call)
    if term is not None:
        alike = term.dtype == x.dtype and term.dim() < 2 and term.numel() in (1, x.shape[-1])
        return AffineMap(_add, None, None, term) if alike else None
    product = rule.product(call)
    if product is None or x.dtype != product[0].dtype or not product[0].numel():
        return None
    weight, bias = product
    by_onednn = is_faster(weight, x.numel() // x.shape[-1])
    return AffineMap(_multiply, weight, weight.t(), bias, by_onednn, rule.needs_inputs(call))


def _multiply_rows(x: Tensor, right: Tensor, bias: Tensor | None, by_onednn: bool) -> Tensor:
    """Return ``x R + b`` for x [*, n] and R [n, m]; not a view, so that it may be changed in place."""
    rows = x if x.dim() == 2 else x.reshape(-1, right.shape[0])
    if by_onednn:
        product = multiply(rows, right.t(), bias)
    else:  # what F.linear comes to
        product = torch.mm(rows, right) if bias is None else torch.addmm(bias, rows, right)
    if x.dim() == 2:
        return product
    found: Tensor = torch.ops.aten._unsafe_view(product, (*x.shape[:-1], right.shape[1]))
    return found


def _is_turned(x: Tensor) -> bool:
    """Tell whether data are one matrix by columns. PyTorch returns their gradient by columns too.

    That matters where they are tokens of one image out of ``batch_norm``, which errs for gradients of other strides.
    """
    return x.stride(-2) == 1 and x.shape[:-2].numel() == 1


class _TappedProduct(torch.autograd.Function):
    """A product with a matrix of parameters, and the tap behind it."""

    @staticmethod
    def forward(ctx: Any, tapped: TappedCall, x: Tensor, affine: AffineMap, *leaves: Tensor) -> Tensor:
        """Multiply."""
        _, weight, transposed, bias, by_onednn, keeps_input = affine
        assert transposed is not None
        ctx.known = tapped, by_onednn
        ctx.set_materialize_grads(False)
        if keeps_input:
            ctx.save_for_backward(weight, x)
        else:
            ctx.save_for_backward(weight)
        if by_onednn or x.dim() != 2:
            return _multiply_rows(x, transposed, bias, by_onednn)
        return mm(x, transposed) if bias is None else addmm(bias, x, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradient, and send it through the matrix."""
        weight, *inputs = ctx.saved_tensors
        tapped, by_onednn = ctx.known
        relay = tapped.relay
        listener = relay.listener if current_task() == relay.task else listener_of(ctx, tapped)
        of_operands = listener.receive(tapped, inputs, (gradient,))
        of_input = None
        if gradient is not None and ctx.needs_input_grad[1]:
            plain = gradient.dim() == 2 and not by_onednn
            of_input = mm(gradient, weight) if plain else _multiply_rows(gradient, weight, None, by_onednn)
            if inputs and inputs[0].stride(-1) != 1 and _is_turned(inputs[0]):
                of_input = of_input.mT.contiguous().mT
        return (None, of_input, None, *of_operands)


class _TappedSum(torch.autograd.Function):
    """A sum with a vector of parameters, and the tap behind it."""

    @staticmethod
    def forward(ctx: Any, tapped: TappedCall, x: Tensor, affine: AffineMap, *leaves: Tensor) -> Tensor:
        """Add."""
        ctx.tapped = tapped
        ctx.set_materialize_grads(False)
        assert affine.bias is not None
        return x + affine.bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradient, and pass it on."""
        tapped = ctx.tapped
        relay = tapped.relay
        listener = relay.listener if current_task() == relay.task else listener_of(ctx, tapped)
        return (None, gradient, None, *listener.receive(tapped, (), (gradient,)))


#: ``Function.apply`` without its check for functorch transforms, under which nothing is tapped anyway.
_multiply: Callable[..., Tensor] = super(torch.autograd.Function, _TappedProduct).apply
_add: Callable[..., Tensor] = super(torch.autograd.Function, _TappedSum).apply

#: The types of their nodes in a graph.
NODES: tuple[type, ...] = (_TappedProduct._backward_cls, _TappedSum._backward_cls)


def folded(args: tuple[Any, ...], is_constant: Callable[[Tensor], bool]) -> tuple[Any, ...]:
    """Copy the input of ``F.linear`` where PyTorch does so for a weight that requires grad.

    For one that does not, as ours when the call runs, it would keep the strides and run a slower batched product. A
    constant is left alone: it is known by its memory. So is one matrix by columns, which PyTorch multiplies as it is.
    """
    x = args[0] if args else None
    if type(x) is Tensor and x.dim() > 2 and x.layout == torch.strided and not x.is_contiguous() and not is_constant(x):
        return args if _is_turned(x) else (x.contiguous(), *args[1:])
    return args
