"""A buffer that is handed out again once nobody refers to its memory."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

#: Smaller buffers come from malloc's own lists. Larger ones come from the operating system, page by zeroed page: for
#: 40 MB that takes as long as filling them.
REUSED_BYTES = 1 << 20

#: References to the memory when only this class has some: the buffer's and that of its storage's Python object.
_OWN_REFERENCES = 2


class Reused:
    """Memory for one CPU tensor at a time; any view of it, wherever it is kept, keeps it from being handed out.

    Args:
        length: elements.
        dtype: their type.
    """

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self._length, self._dtype = length, dtype
        self._worthwhile = length * dtype.itemsize >= REUSED_BYTES and hasattr(torch._C, "_storage_Use_Count")
        self._kept: deque[tuple[Tensor, torch.UntypedStorage]] = deque(maxlen=1)

    def take(self) -> Tensor:
        """Return an uninitialised tensor [length]."""
        if not self._worthwhile:
            return torch.empty(self._length, dtype=self._dtype)
        try:
            buffer, storage = self._kept.pop()  # atomic: another thread finds nothing meanwhile, and allocates
        except IndexError:
            buffer, storage = self._allocate()
        if torch._C._storage_Use_Count(storage._cdata) > _OWN_REFERENCES:
            buffer, storage = self._allocate()
        lent = buffer.detach()
        self._kept.append((buffer, storage))
        return lent

    def _allocate(self) -> tuple[Tensor, torch.UntypedStorage]:
        """Return new memory, and the storage that counts its references."""
        buffer = torch.empty(self._length, dtype=self._dtype)
        return buffer, buffer.untyped_storage()
