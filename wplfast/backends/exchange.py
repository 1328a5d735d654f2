"""PyTorch's table of functions that tell a tensor's address, type and shape to C++, if the extension can use it.

It is DLPack's C exchange API, ``torch.Tensor.__dlpack_c_exchange_api__`` of newer versions of PyTorch. Where it is
missing, or does not do what it should, parameters are looked at in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import wplfast._C as _C
except ImportError:  # without a compiler; the Triton backend can do without
    _C = None


def _found() -> object | None:
    """Return the table of functions after a trial, or None."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _C is None or exchange is None:
        return None
    probe = torch.empty(3, 2, device="cpu").t().requires_grad_()
    try:
        table = _C.ParameterTable(exchange, [probe])
    except ImportError:  # of another major version
        return None
    held = table.unchanged([probe], [])
    probe.data = probe.detach().contiguous()
    return exchange if held and not table.unchanged([probe], []) else None


EXCHANGE: object | None = _found()


def parameter_table(parameters: Sequence[Tensor]) -> Any:
    """Return a ``_C.ParameterTable``, or None where there cannot be one."""
    return None if EXCHANGE is None else _C.ParameterTable(EXCHANGE, list(parameters))
