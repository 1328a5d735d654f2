"""Tables of addresses that live on the device, so that one launch reaches tensors anywhere in memory.

A table is a function of the addresses and sizes in its key alone, so a cached one stays right for as long as the same
addresses come in: nothing is uploaded on a steady training step, nor while a CUDA graph is captured after a warm-up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress

import torch
from torch import Tensor

#: Tables that a CUDA graph has captured: its replays read them for as long as it lives, which nobody tells.
_captured: dict[int, DeviceTable] = {}


class DeviceTable:
    """An int64 table on the device, uploaded without a host synchronisation.

    Args:
        rows: int64 tensor on the CPU.
        device: where the table is read.
    """

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self._source, self._rows = rows, rows
        self._device = device
        self._uploaded: torch.cuda.Event | None = None
        if device.type == "cuda":
            # The copy may run after this returns, in a captured graph on every replay: the table keeps its source.
            self._source = rows.pin_memory()
            self._rows = self._source.to(device, non_blocking=True)
            self._stream = torch.cuda.current_stream(device)
            if not torch.cuda.is_current_stream_capturing():
                self._uploaded = torch.cuda.Event()
                self._uploaded.record(self._stream)

    def rows(self) -> Tensor:
        """Return the rows, ordered behind their upload on the current stream."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream and not torch.cuda.is_current_stream_capturing():
                # A capture starts with a device synchronisation, and may not wait for events outside it.
                if self._uploaded is not None:
                    stream.wait_event(self._uploaded)
                self._rows.record_stream(stream)
        return self._rows


class TableCache:
    """The most recently used tables, by the addresses and sizes they were made from.

    Args:
        capacity: tables kept; those that a CUDA graph has captured are kept for ever, also beyond this cache.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tables: OrderedDict[Hashable, DeviceTable] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of tables that may be found again."""
        return len(self._tables)

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """Return the table of ``key`` on ``device``, built and uploaded if it is not there yet."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._tables.get(key)
        if table is None:
            table = DeviceTable(build(), device)
            if not capturing:  # a table made in a capture holds nothing until the graph is replayed
                self._tables[key] = table
                if len(self._tables) > self._capacity:
                    with suppress(KeyError):  # another thread dropped the same one at this moment
                        self._tables.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread dropped it at this moment
                self._tables.move_to_end(key)
        if capturing:
            _captured[id(table)] = table
        return table.rows()
