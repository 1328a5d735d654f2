"""Run a model's forward pass once more than its owner did, without leaving a trace in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Snapshot:
    """What a forward pass may change: attributes of modules (a hidden state kept from batch to batch) and buffers."""

    def __init__(self, model: nn.Module) -> None:
        """Remember attributes by reference and buffers by value."""
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self._attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
        self._buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]

    def restore(self) -> None:
        """Set everything back."""
        for module, attributes, buffers in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, value in self._buffers:
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore attributes and buffers of all modules afterwards."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()
