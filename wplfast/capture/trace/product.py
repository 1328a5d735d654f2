"""Products with one matrix where PyTorch's own are slow: what a pass multiplies with, forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..rules import Rule

_OP = "mkldnn::_linear_pointwise"

#: Below so many elements of the matrix, calling oneDNN takes longer than what it saves.
_WORTH_IT = 1 << 14


def is_faster(weight: Tensor) -> bool:
    """Tell whether oneDNN is likely to multiply with a matrix faster than PyTorch does.

    PyTorch's float32 products on CPUs go to MKL, which on some processors (AMD's) uses narrower vectors and takes twice
    the time of oneDNN. PyTorch's fused LSTM and its compiler call oneDNN in the same way as this file.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= _WORTH_IT
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CPU")
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` by oneDNN, for x [*, D_in] and W [D_out, D_in] of any strides; not a view."""
    rows = x.reshape(-1, weight.shape[1])
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    found: Tensor = product if x.dim() == 2 else torch.ops.aten._unsafe_view(product, (*x.shape[:-1], weight.shape[0]))
    return found


class Product:
    """``x -> x W^T`` for W [D_out, D_in] of any strides, without an autograd graph."""

    def __init__(self, weight: Tensor) -> None:
        """Take the matrix."""
        self._fast = is_faster(weight)
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W^T`` for x [n, D_in]."""
        return multiply(x, self._weight) if self._fast else x @ self._weight.t()

    def into(self, out: Tensor, x: Tensor) -> None:
        """Set ``out = x W^T``."""
        if self._fast:
            out.copy_(multiply(x, self._weight))
        else:
            torch.mm(x, self._weight.t(), out=out)

    def onto(self, total: Tensor, x: Tensor) -> None:
        """Add: ``total += x W^T``."""
        if self._fast:
            total.add_(multiply(x, self._weight))
        else:
            total.addmm_(x, self._weight.t())


def product_of(call: Call, rule: Rule, inputs: list[Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """Return what a call multiplies its data with, where a product of our own is faster than PyTorch's."""
    if call.in_place or call.autocast is not None or len(inputs) != 1 or inputs[0].dim() < 2 or not inputs[0].numel():
        return None
    product = rule.product(call) if inputs[0].layout == torch.strided else None
    if product is None or not is_faster(product[0]) or inputs[0].dtype != product[0].dtype:
        return None
    return product


def folded(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the input of ``F.linear`` where PyTorch does so for a weight that requires grad.

    For one that does not, as ours when the call runs, it would keep the strides and run a slower batched product.
    """
    x = args[0] if args else None
    if type(x) is Tensor and x.dim() > 2 and not x.is_contiguous():
        return (x.contiguous(), *args[1:])
    return args
