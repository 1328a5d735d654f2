"""Run a model's forward pass once more than its owner did, without leaving a trace in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..undo import Undo


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
        with Preserved(self):
            pass

    def restore_buffers(self) -> None:
        """Write back the values of buffers that were written to."""
        with torch.no_grad():
            for key, (buffer, version, value) in self._copies.items():
                if buffer._version != version:
                    buffer.copy_(value)
                    self._copies[key] = buffer, buffer._version, value

    def dictionaries(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield dictionaries of modules, and what was in them."""
        for module, attributes, buffers in self._attributes:
            yield module.__dict__, attributes
            yield module._buffers, buffers


class Preserved(Undo):
    """Set everything back afterwards; no line of Python sees a module without its attributes."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Set back to how it was then."""
        super().__init__()
        self._snapshot = snapshot

    def change(self) -> None:
        """Say what it was."""
        calls: list[partial[Any]] = []
        for now, before in self._snapshot.dictionaries():
            calls += [partial(now.clear), partial(now.update, before)]
        self.by(partial.__call__, calls)
        self.then(self._snapshot.restore_buffers)
