"""What is known of this processor's libraries: who multiplies matrices faster.

PyTorch's float32 products on x86 go to MKL. MKL's path for processors that are not Intel's uses 256-bit vectors, which
is half of what those with whole 512-bit units can do, and oneDNN's uses 512. PyTorch's fused LSTM and its compiler call
oneDNN in the same way. The choice follows from the processor and the sizes alone, so that runs repeat their bits.

Measured at one thread, in GFLOP/s of MKL and oneDNN (``benchmarks/NOTES.md``): AMD family 26 89 and 195; AMD family 25
95 and 107; Intel with AVX-512 the same within 5 %. A call of oneDNN takes about 10 microseconds longer than one of MKL.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

#: Multiply-adds from which a product takes less time in oneDNN, by the family of AMD's processors from which it holds.
_AMD = ((26, 1 << 20), (23, 1 << 24))


@functools.cache
def onednn_from() -> int | None:
    """Return the multiply-adds from which oneDNN multiplies faster than PyTorch does; None: never, or not known."""
    return _onednn_from(*_processor())


def _onednn_from(vendor: str, family: int) -> int | None:
    """Return them for a processor."""
    if vendor != "AuthenticAMD":
        return None
    return next((least for first, least in _AMD if family >= first), None)


def _processor() -> tuple[str, int]:
    """Return the vendor and the family of an x86 processor; "" and 0 of another one, or where the system is silent."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        words = platform.processor().split()  # of Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
        family = words[words.index("Family") + 1] if "Family" in words[:-1] else ""
        return (words[-1] if words else ""), int(family) if family.isdecimal() else 0
    return processor_of(text)


def processor_of(cpuinfo: str) -> tuple[str, int]:
    """Return the vendor and the family that Linux tells of its first processor."""
    fields = first_of(cpuinfo)
    family = fields.get("cpu family", "")
    return fields.get("vendor_id", ""), int(family) if family.isdecimal() else 0


def first_of(cpuinfo: str) -> dict[str, str]:
    """Return all that Linux tells of its first processor, by name."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
