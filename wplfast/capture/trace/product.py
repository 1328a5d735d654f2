"""Products with one matrix of parameters: run as one node of the graph, with their tap, by the library that is fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.processor import onednn_from
from ..call import Call
from ..call_site import TappedCall
from ..rules import Rule
from .nested import current_task, listener_of

_OP = "mkldnn::_linear_pointwise"


def is_faster(weight: Tensor, rows: int) -> bool:
    """Tell whether oneDNN is likely to multiply that many rows with a matrix faster than PyTorch does."""
    least = onednn_from()
    return (
        least is not None
        and rows * weight.numel() >= least
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CPU")
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` by oneDNN, for x [n, D_in] and W [D_out, D_in] of any strides."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _multiply(x: Tensor, right: Tensor, bias: Tensor | None, by_onednn: bool) -> Tensor:
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


class Product:
    """``x -> x W^T`` for W [D_out, D_in] of any strides, without an autograd graph."""

    def __init__(self, weight: Tensor) -> None:
        """Take the matrix."""
        self._weight = weight
        self._fast: dict[int, bool] = {}  # by number of rows

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W^T`` for x [n, D_in]."""
        return multiply(x, self._weight) if self._is_fast(x) else x @ self._weight.t()

    def into(self, out: Tensor, x: Tensor) -> None:
        """Set ``out = x W^T``."""
        if self._is_fast(x):
            out.copy_(multiply(x, self._weight))
        else:
            torch.mm(x, self._weight.t(), out=out)

    def onto(self, total: Tensor, x: Tensor) -> None:
        """Add: ``total += x W^T``."""
        if self._is_fast(x):
            total.add_(multiply(x, self._weight))
        else:
            total.addmm_(x, self._weight.t())

    def _is_fast(self, x: Tensor) -> bool:
        """Tell whether oneDNN is to multiply so many rows."""
        found = self._fast.get(len(x))
        if found is None:
            found = self._fast[len(x)] = is_faster(self._weight, len(x))
        return found


class AffineMap(NamedTuple):
    """``x -> x W^T + b``, and whether oneDNN is to compute it."""

    weight: Tensor
    transposed: Tensor  # W^T, a view that is made once
    bias: Tensor | None
    by_onednn: bool


def product_of(call: Call, rule: Rule, inputs: list[Tensor]) -> AffineMap | None:
    """Return the matrix W and the bias b where a call is ``x W^T + b`` of its only input; None otherwise."""
    if call.in_place or call.autocast is not None or len(inputs) != 1 or inputs[0].dim() < 2 or not inputs[0].numel():
        return None
    product = rule.product(call) if inputs[0].layout == torch.strided else None
    if product is None or inputs[0].dtype != product[0].dtype or not product[0].numel():
        return None
    rows = inputs[0].numel() // inputs[0].shape[-1] if inputs[0].shape[-1] else 0
    weight, bias = product
    return AffineMap(weight, weight.t(), bias, is_faster(weight, rows))


def multiply_and_tap(tapped: TappedCall, x: Tensor, product: AffineMap) -> Tensor:
    """Run a call, which is ``x W^T + b``, and tap it: one node of the graph instead of two."""
    result = _apply(tapped, x, product, *tapped.call.leaves)
    tapped.shapes = [result.shape]
    return result


class _TappedProduct(torch.autograd.Function):
    """A product with a matrix of parameters, and the tap behind it."""

    @staticmethod
    def forward(ctx: Any, tapped: TappedCall, x: Tensor, product: AffineMap, *leaves: Tensor) -> Tensor:
        """Multiply."""
        weight, transposed, bias, ctx.by_onednn = product
        ctx.tapped = tapped
        ctx.set_materialize_grads(False)
        if tapped.rule.needs_inputs(tapped.call):
            ctx.save_for_backward(weight, x)
        else:
            ctx.save_for_backward(weight)
        return _multiply(x, transposed, bias, ctx.by_onednn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report the gradient, and send it through the matrix."""
        weight, *inputs = ctx.saved_tensors
        tapped = ctx.tapped
        relay = tapped.relay
        listener = relay.listener if current_task() == relay.task else listener_of(ctx, tapped)
        of_operands = listener.receive(tapped, inputs, (gradient,))
        of_input = None
        if gradient is not None and ctx.needs_input_grad[1]:
            of_input = _multiply(gradient, weight, None, ctx.by_onednn)
        return (None, of_input, None, *of_operands)


#: ``Function.apply`` without its check for functorch transforms, under which nothing is tapped anyway.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _TappedProduct).apply

#: The type of its nodes in a graph.
PRODUCT_NODE: type = _TappedProduct._backward_cls


def folded(args: tuple[Any, ...], is_constant: Callable[[Tensor], bool]) -> tuple[Any, ...]:
    """Copy the input of ``F.linear`` where PyTorch does so for a weight that requires grad.

    For one that does not, as ours when the call runs, it would keep the strides and run a slower batched product. A
    constant is left alone: it is known by its memory.
    """
    x = args[0] if args else None
    if type(x) is Tensor and x.dim() > 2 and x.layout == torch.strided and not x.is_contiguous() and not is_constant(x):
        return (x.contiguous(), *args[1:])
    return args
