"""Products with a matrix by the library that is likely to be fast: oneDNN or what PyTorch calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.processor import onednn_from

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
