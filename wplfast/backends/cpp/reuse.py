"""Memory that is handed out again once nobody refers to it."""

from __future__ import annotations

import sys
from collections import deque
from weakref import WeakValueDictionary

import torch
from torch import Tensor

#: Smaller buffers come from malloc's own lists. Larger ones come from the operating system, page by zeroed page: for
#: 40 MB that takes as long as filling them.
REUSED_BYTES = 1 << 20

#: Buffers kept: two penalties may be in one graph.
_KEPT = 2

_CAN_COUNT = hasattr(torch._C, "_storage_Use_Count")


class Reused:
    """Lends CPU memory of one type; any view of it, wherever it is kept, keeps it from being lent again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: deque[Tensor] = deque(maxlen=_KEPT)

    def take(self, length: int) -> Tensor:
        """Return an uninitialised tensor [length]."""
        if length * self._dtype.itemsize < REUSED_BYTES or not _CAN_COUNT:
            return torch.empty(length, dtype=self._dtype, device="cpu")
        for _ in range(_KEPT):
            try:
                buffer = self._kept.pop()  # the last one used; atomic: another thread does not find it meanwhile
            except IndexError:
                break
            if length <= len(buffer) <= 2 * length and _unused(buffer):
                lent = buffer[:length]
                self._kept.append(buffer)
                return lent
            self._kept.appendleft(buffer)
        with torch.inference_mode(False):  # the next one to take it may be outside
            buffer = torch.empty(length, dtype=self._dtype, device="cpu")
        lent = buffer[:]
        self._kept.append(buffer)
        return lent


def _references(buffer: Tensor) -> tuple[int, int]:
    """Return how many refer to a tensor's memory, and to the Python object of that."""
    storage = buffer.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


#: What a tensor has whose memory nobody else refers to; it depends on the versions of Python and PyTorch.
_ALONE = _references(torch.empty(1, device="cpu")) if _CAN_COUNT else (0, 0)


def _unused(buffer: Tensor) -> bool:
    """Tell whether nothing but this tensor refers to its memory, in this process or (shared memory) in another one."""
    whole = buffer.untyped_storage().nbytes() == buffer.nbytes  # somebody may have resized it
    return _references(buffer) == _ALONE and whole and not buffer.is_shared()


_shared: WeakValueDictionary[torch.dtype, Reused] = WeakValueDictionary()


def shared(dtype: torch.dtype) -> Reused:
    """Return the memory that all penalties of a dtype share; it goes with the last of them."""
    return _shared.setdefault(dtype, Reused(dtype))
