"""Run a model's forward pass once more than its owner did, without leaving a trace in its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: A module, its attributes, its buffers.
_State = list[tuple[nn.Module, dict[str, Any], dict[str, Tensor | None]]]


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
        self._attributes = self._state()
        found = [buffer for _, _, buffers in self._attributes if buffers for buffer in buffers.values()]
        copies = {}
        for buffer in (*found, *self._script_buffers()):
            if buffer is None or buffer.is_inference():  # which no forward pass can write to
                continue
            known = self._copies.get(id(buffer))
            if known is None or known[0] is not buffer or known[1] != buffer._version:
                known = buffer, buffer._version, buffer.detach().clone()
            copies[id(buffer)] = known
        self._copies = copies

    def restore(self) -> None:
        """Set everything back."""
        _put(self._attributes)
        self._undo(set())

    @contextmanager
    def rewound(self) -> Iterator[Callable[[], None]]:
        """Yield what sets everything back for a while; afterwards the modules are as they are now.

        A graph of a forward pass since :meth:`take` stays usable: buffers that it wrote to are not written to again,
        other tensors stand for them meanwhile.
        """
        written = {key for key, (buffer, version, _) in self._copies.items() if buffer._version != version}
        now = self._state()
        scripts = [(buffer, buffer.detach().clone()) for buffer in self._script_buffers() if id(buffer) in written]

        def stand_in(buffer: Tensor | None) -> Tensor | None:
            return self._copies[id(buffer)][2].clone() if id(buffer) in written else buffer

        def rewind() -> None:
            self._undo(written)
            _put([(m, a, {name: stand_in(b) for name, b in buffers.items()}) for m, a, buffers in self._attributes])
            with torch.no_grad():
                for buffer, _ in scripts:
                    buffer.copy_(self._copies[id(buffer)][2])

        try:
            yield rewind
        finally:
            self._undo(written)
            _put(now)
            with torch.no_grad():
                for buffer, value in scripts:
                    buffer.copy_(value)

    def _undo(self, spared: set[int]) -> None:
        """Give buffers back their values, but for some."""
        with torch.no_grad():
            for key, (buffer, version, value) in self._copies.items():
                if key not in spared and buffer._version != version:
                    buffer.copy_(value)
                    self._copies[key] = buffer, buffer._version, value

    def _state(self) -> _State:
        """Return attributes and buffers as they are now."""
        return [(m, m.__dict__.copy(), m._buffers.copy()) for m in self._modules]

    def _script_buffers(self) -> Iterable[Tensor]:
        """Yield the buffers of TorchScript modules, whose places others cannot take."""
        return (buffer for module in self._scripts for buffer in module.buffers(recurse=False))


def _put(state: _State) -> None:
    """Set attributes and buffers."""
    for module, attributes, buffers in state:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
