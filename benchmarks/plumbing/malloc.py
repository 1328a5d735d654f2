"""How the C library's allocator treats memory that tensors free."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def keep() -> bool:
    """Keep freed memory in this process from now on; tell whether that is possible.

    glibc maps large blocks anew each time and gives freed memory back, so that a contender with temporaries pays for
    page faults in every call: on a virtual machine several times what its arithmetic costs. Kept memory is what caching
    allocators give, and what is best for such contenders.
    """
    library = _glibc()
    return library is not None and library.mallopt(_MMAP_MAX, 0) == library.mallopt(_TRIM_THRESHOLD, -1) == 1


def map_large() -> None:
    """Map each block of 64 KB and more by itself from now on: memory leaves this process as soon as it is freed."""
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_THRESHOLD, 1 << 16)


def give_back() -> None:
    """Give freed memory back to the system once."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):
        return None


def available(device: str = "cpu") -> float:
    """Return the bytes that are free for tensors on a type of device; inf where the system does not say."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
