"""The penalty on GPUs over parameters that stay where they are: tables made once, kernels launched directly."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.layout import same_order
from ...ops.prepared import Link, PreparedPenalty, dispatched
from ..exchange import parameter_table
from .kernel import KernelError
from .launch import Relaunched, on_device, written
from .penalty_kernel import ACCUMULATE, STORE, VALUE, penalty_kernel
from .penalty_launch import Streams, launch
from .reduce import sum_partials_kernel
from .tables import TableCache

#: Sets of gradients whose addresses are kept: they come back where a training loop drops and allocates them in turn.
_GRADIENTS = 4


class TritonPenalty(PreparedPenalty):
    """What :class:`PreparedPenalty` does, without the dispatcher, and without a look at every address at each call."""

    def _prepare(self) -> None:
        """Remember addresses and make tables."""
        self._parameters = list(self.theta)
        self._table = parameter_table(self._parameters)
        self._streams = Streams(self.arguments)
        self._chunks, self._gradients = TableCache(1), TableCache(_GRADIENTS)
        last = Relaunched(sum_partials_kernel)
        self._refused = False  # whether a kernel could not be started: the dispatcher's operators give way then
        self._kernels = {mode: (Relaunched(penalty_kernel), last) for mode in (VALUE, STORE, ACCUMULATE)}

    def remember(self) -> None:
        """Remember what the parameters are; a table in C++ did so when it was made."""
        if self._table is None:
            super().remember()

    def unchanged(self, links: Sequence[Link]) -> bool:
        """Tell whether every parameter is what and where it was."""
        if self._table is None:
            return super().unchanged(links)
        unchanged: bool = self._table.unchanged(self._parameters, links)
        return unchanged

    def value(self) -> Tensor:
        """Return the value."""
        if not (self._refused or dispatched()):
            try:
                return self._evaluate(VALUE)
            except KernelError:
                self._refused = True
        return super().value()

    def with_grad(self) -> tuple[Tensor, Tensor]:
        """Return the value and the packed gradient."""
        if not (self._refused or dispatched()):
            packed = torch.empty(self.packing.length, dtype=self._streams.dtype, device=self._streams.device)
            try:
                return self._evaluate(STORE, packed=packed), packed
            except KernelError:
                self._refused = True
        return super().with_grad()

    def add_grad_(self, scale: Tensor) -> Tensor:
        """Return the value and add to ``.grad``."""
        found = None if self._refused or dispatched() else self._found_gradients()
        if found is None:  # something must see the operator, or a gradient is missing or in another memory order
            return super().add_grad_(scale)
        gradients, addresses = found
        try:
            value = self._evaluate(ACCUMULATE, addresses=addresses, scale=scale)
        except KernelError:  # nothing was added
            self._refused = True
            return super().add_grad_(scale)
        written(*gradients)
        return value

    def _found_gradients(self) -> tuple[list[Tensor], bytes] | None:
        """Return the gradients, and an int64 address for each parameter, 0 where none is required.

        None where a gradient is missing, or is not laid out as its parameter is.
        """
        if self._table is not None:
            found: tuple[list[Tensor], bytes] | None = self._table.gradients(self._parameters)
            return found
        gradients, places = [], []
        for p in self._parameters:
            grad = p.grad if p.requires_grad else None
            if grad is not None:
                alike = (grad.dtype, grad.device, grad.shape) == (p.dtype, p.device, p.shape)
                if grad.layout != torch.strided or not alike or not same_order(grad, p):
                    return None
                gradients.append(grad)
            elif p.requires_grad:
                return None
            places.append(0 if grad is None else grad.data_ptr())
        return gradients, array("q", places).tobytes()

    def _evaluate(
        self, mode: int, addresses: bytes = b"", packed: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Launch in one of the kernel's modes and return the value."""
        device = self._streams.device
        with on_device(device):
            chunks = self._chunks.get(None, device, self._streams.chunks)
            grads = self._gradients.get(addresses, device, lambda: _rows(addresses)) if addresses else None
            coefficients, kernels = (*self.arguments[4:], self.constant), self._kernels[mode]
            return launch(mode, self._streams, chunks, *coefficients, grads, packed, scale, kernels)


def _rows(addresses: bytes) -> Tensor:
    """Return int64 addresses as a tensor."""
    return torch.frombuffer(bytearray(addresses), dtype=torch.int64)
