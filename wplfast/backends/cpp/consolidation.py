"""A newer anchor on CPUs: in place and in one pass over memory, by a call that no interrupt divides."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import wplfast._C as _C

from ...ops.consolidation import Consolidation
from ...ops.layout import in_order_of
from .dtypes import DTYPES


class CppConsolidation(Consolidation):
    """What :class:`Consolidation` does, without memory of its own; what is measured is computed once more then."""

    def _prepare(self) -> None:
        """Bring what is new to the anchors' memory order and to types that the kernel takes; list addresses."""
        hats = [_given(t, hat, hat.dtype) for t, hat in zip(self.new_theta_hat, self.theta_hat, strict=True)]
        fishers = [_given(t, f, _wide(t, f)) for t, f in zip(self.new_fisher, self.fisher, strict=True)]
        self.new_theta_hat, self.new_fisher = hats, fishers
        kinds = zip(self.theta_hat, self.fisher, fishers, strict=True)
        columns = (self.theta_hat, self.offset, self.fisher, hats, fishers)
        self._consolidate = partial(
            _C.consolidate,
            self.merge,
            self.decay,
            self.weight,
            list(map(Tensor.numel, self.fisher)),
            [DTYPES[t.dtype] for tensors in kinds for t in tensors],
            *(list(map(Tensor.data_ptr, column)) for column in columns),
        )
        self._factors: Tensor | None = None

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return what c gains and F's norms."""
        found = torch.empty(2, len(self.fisher), dtype=torch.float64, device="cpu")
        self._consolidate(0, found.data_ptr(), torch.get_num_threads())
        return found[0], found[1].sqrt()

    def scale(self, factors: Tensor) -> None:
        """Multiply what F becomes by factors."""
        self._factors = factors.contiguous()

    def steps(self) -> list[partial[Any]]:
        """Return calls that change the anchors; their versions change first, which an interrupt may leave at that."""
        factors = 0 if self._factors is None else self._factors.data_ptr()
        changed = [*self.theta_hat, *self.offset, *self.fisher]
        return [partial(increment_version, changed), partial(self._consolidate, factors, 0, torch.get_num_threads())]


def _wide(tensor: Tensor, fisher: Tensor) -> torch.dtype:
    """Return the type that holds a newer F and that the kernel takes beside a Fisher."""
    return torch.float64 if torch.float64 in (tensor.dtype, fisher.dtype) else torch.float32


def _given(tensor: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a type, dense and in the memory order of another one."""
    return in_order_of(tensor.to(dtype), like)
