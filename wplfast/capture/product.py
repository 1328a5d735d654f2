"""Products with one matrix, again and again: what a recurrence does at every step."""

from __future__ import annotations

import torch
from torch import Tensor

_OP = "mkldnn::_linear_pointwise"

#: Below so many elements of the matrix, calling oneDNN takes longer than what it saves.
_WORTH_IT = 1 << 14


class Product:
    """``x -> x W^T`` for W [D_out, D_in], without an autograd graph.

    Where PyTorch's CPU products go to MKL, its fused LSTM goes to oneDNN, which on some processors (AMD's) takes half
    the time for matrices of few rows. PyTorch's own fusing compiler calls oneDNN in the same way as this class.
    """

    def __init__(self, weight: Tensor) -> None:
        """Take the matrix, of any strides."""
        self._fast = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= _WORTH_IT
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CPU")
        )
        self._weight = weight.contiguous() if self._fast else weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W^T`` for x [n, D_in]."""
        if self._fast:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
            return product
        return x @ self._weight

    def into(self, out: Tensor, x: Tensor) -> None:
        """Set ``out = x W^T``."""
        if self._fast:
            out.copy_(self(x))
        else:
            torch.mm(x, self._weight, out=out)

    def onto(self, total: Tensor, x: Tensor) -> None:
        """Add: ``total += x W^T``."""
        if self._fast:
            total.add_(self(x))
        else:
            total.addmm_(x, self._weight)
