"""Run a model's forward pass once more than its owner did, without leaving a trace in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Snapshot:
    """What a forward pass may change: attributes of modules (a hidden state kept from batch to batch) and buffers.

    Attributes are remembered by reference and buffers by value; a buffer is copied again only after it was written to.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember how the modules are now."""
        modules = list(model.modules())
        self._modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self._scripts = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # id -> a buffer, its version, its value
        self.take()

    def take(self) -> None:
        """Remember how they are now instead."""
        self._attributes = [(m, m.__dict__.copy(), m._buffers.copy()) for m in self._modules]
        found = [buffer for _, _, buffers in self._attributes if buffers for buffer in buffers.values()]
        found += [buffer for module in self._scripts for buffer in module.buffers(recurse=False)]
        copies = {}
        for buffer in found:
            if buffer is None or buffer.is_inference():  # which no forward pass can write to
                continue
            known = self._copies.get(id(buffer))
            if known is None or known[0] is not buffer or known[1] != buffer._version:
                known = buffer, buffer._version, buffer.detach().clone()
            copies[id(buffer)] = known
        self._copies = copies

    def restore(self) -> None:
        """Set everything back."""
        for module, attributes, buffers in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for key, (buffer, version, value) in self._copies.items():
                if buffer._version != version:
                    buffer.copy_(value)
                    self._copies[key] = buffer, buffer._version, value


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore attributes and buffers of all modules afterwards."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()
