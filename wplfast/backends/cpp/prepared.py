"""The penalty on CPUs over parameters that stay where they are: remembered addresses, kernels called directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import wplfast._C as _C

from ...ops.arguments import PenaltyArguments
from ...ops.layout import ALIGNMENT, flat_dtype
from ...ops.prepared import Link, PreparedPenalty, dispatched
from ..exchange import parameter_table
from .dtypes import DTYPES
from .reuse import shared


def prepare(table: Any, arguments: PenaltyArguments, alpha: int, l2: int, constant: int = 0) -> Any:
    """Return a ``_C.PreparedPenalty``.

    Args:
        table: of theta.
        arguments: it keeps addresses of them, and none of the tensors.
        alpha: address of a tensor like the arguments' own; 0 if every call brings a 0-d one, and an l2.
        l2: likewise.
        constant: address of the merged anchors' constants; 0 means zero.
    """
    theta, theta_hat, offset, fisher, _, _ = arguments
    return _C.PreparedPenalty(
        table,
        DTYPES[theta[0].dtype],
        DTYPES[fisher[0].dtype],
        [p.numel() for p in theta],
        *([t.data_ptr() for t in column] for column in (theta_hat, offset, fisher)),
        alpha,
        alpha != 0 and arguments.alpha.dim() == 1,
        constant,
        l2,
        ALIGNMENT,
    )


class CppPenalty(PreparedPenalty):
    """What :class:`PreparedPenalty` does, without the dispatcher and without Python code per parameter."""

    def _prepare(self) -> None:
        """Remember addresses and make tables."""
        _, _, _, _, alpha, l2 = self.arguments
        self._parameters = list(self.theta)
        self._table = parameter_table(self._parameters)
        constant = 0 if self.constant is None else self.constant.data_ptr()
        self._prepared = prepare(self._table, self.arguments, alpha.data_ptr(), l2.data_ptr(), constant)
        self._memory = shared(self.theta[0].dtype)

    def remember(self) -> None:
        """Do nothing: the table holds what the parameters were when this was made."""

    def unchanged(self, links: Sequence[Link]) -> bool:
        """Tell whether every parameter is what and where it was."""
        unchanged: bool = self._table.unchanged(self._parameters, links)
        return unchanged

    def value(self) -> Tensor:
        """Return the value."""
        if dispatched():
            return super().value()
        value = self._new_value()
        self._prepared.value(value.data_ptr(), torch.get_num_threads())
        return value

    def with_grad(self) -> tuple[Tensor, Tensor]:
        """Return the value and the packed gradient, in memory that is used again once nobody refers to it."""
        if dispatched():
            return super().with_grad()
        value, packed = self._new_value(), self._memory.take(self.packing.length)
        self._prepared.store(packed.data_ptr(), value.data_ptr(), torch.get_num_threads())
        return value, packed

    def add_grad_(self, scale: Tensor) -> Tensor:
        """Return the value and add to ``.grad``."""
        if dispatched():
            return super().add_grad_(scale)
        value = self._new_value()
        gradients = self._prepared.add(self._parameters, scale.data_ptr(), value.data_ptr(), torch.get_num_threads())
        if gradients is None:  # one is missing or in another memory order
            return super().add_grad_(scale)
        increment_version(gradients)
        return value

    def _new_value(self) -> Tensor:
        """Return an uninitialised 0-d value."""
        return torch.empty((), dtype=flat_dtype(self.theta[0].dtype), device="cpu")
