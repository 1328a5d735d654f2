"""Run a model's forward pass once more than its owner did, without leaving a trace in its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.undo import Undo

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
        self._attributes = self.state()
        found = [buffer for _, _, buffers in self._attributes if buffers for buffer in buffers.values()]
        copies = {}
        for buffer in (*found, *self.script_buffers()):
            if buffer is None or buffer.is_inference():  # which no forward pass can write to
                continue
            known = self._copies.get(id(buffer))
            if known is None or known[0] is not buffer or known[1] != buffer._version:
                known = buffer, buffer._version, buffer.detach().clone()
            copies[id(buffer)] = known
        self._copies = copies

    def restore(self) -> None:
        """Set everything back."""
        with Preserved(self._attributes, self.restore_buffers):
            pass

    def restore_buffers(self, spared: Set[int] = frozenset()) -> None:
        """Write back the values of buffers that were written to, but for some (by id)."""
        with torch.no_grad():
            for key, (buffer, version, value) in self._copies.items():
                if key not in spared and buffer._version != version:
                    buffer.copy_(value)
                    self._copies[key] = buffer, buffer._version, value

    def written(self) -> set[int]:
        """Return the ids of buffers that were written to since."""
        return {key for key, (buffer, version, _) in self._copies.items() if buffer._version != version}

    def value_of(self, buffer: Tensor) -> Tensor:
        """Return a buffer's value as it was."""
        return self._copies[id(buffer)][2]

    @property
    def attributes(self) -> _State:
        """All attributes and buffers as they were."""
        return self._attributes

    def state(self) -> _State:
        """Return attributes and buffers as they are now."""
        return [(m, m.__dict__.copy(), m._buffers.copy()) for m in self._modules]

    def script_buffers(self) -> Iterable[Tensor]:
        """Yield the buffers of TorchScript modules, whose places others cannot take."""
        return (buffer for module in self._scripts for buffer in module.buffers(recurse=False))


class Preserved(Undo):
    """Set modules back afterwards; no line of Python sees one without its attributes.

    Args:
        state: attributes and buffers of modules.
        then: called after them.
    """

    def __init__(self, state: _State, then: Callable[[], None]) -> None:
        super().__init__(is_inner=True)
        self._state, self._then_call = state, then

    def change(self) -> None:
        """Say what it was."""
        calls: list[partial[Any]] = []
        for module, attributes, buffers in self._state:
            calls += [partial(module.__dict__.clear), partial(module.__dict__.update, attributes)]
            calls += [partial(module._buffers.clear), partial(module._buffers.update, buffers)]
        self.by(partial.__call__, calls)
        self.then(self._then_call)


class Rewound(Preserved):
    """Modules that :meth:`rewind` sets back to a snapshot, any number of times; afterwards they are as they are now.

    A graph of a forward pass since the snapshot stays usable: buffers that it wrote to are not written to again, other
    tensors stand for them meanwhile.

    Args:
        snapshot: to go back to.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot, self._written = snapshot, snapshot.written()
        scripts = (b for b in snapshot.script_buffers() if id(b) in self._written)
        self._scripts = [(buffer, buffer.detach().clone()) for buffer in scripts]
        super().__init__(snapshot.state(), self._write_back)

    def rewind(self) -> None:
        """Set everything back to the snapshot."""
        state = [
            (m, a, {name: self._stand_in(b) for name, b in buffers.items()})
            for m, a, buffers in self._snapshot.attributes
        ]
        with Preserved(state, partial(self._snapshot.restore_buffers, self._written)):
            pass
        with torch.no_grad():
            for buffer, _ in self._scripts:
                buffer.copy_(self._snapshot.value_of(buffer))

    def _stand_in(self, buffer: Tensor | None) -> Tensor | None:
        """Return what stands for a buffer."""
        return self._snapshot.value_of(buffer).clone() if buffer is not None and id(buffer) in self._written else buffer

    def _write_back(self) -> None:
        """Give buffers that others could not stand for their values."""
        self._snapshot.restore_buffers(self._written)
        with torch.no_grad():
            for buffer, value in self._scripts:
                buffer.copy_(value)
