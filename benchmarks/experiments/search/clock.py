"""Time per part of a search."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds and counts by part; on a GPU a part ends when its kernels have.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: str) -> None:
        """Start at zero."""
        self._cuda = torch.device(device).type == "cuda"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - started
        self.counts[name] += 1

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Return the mean time of one, and how many there were, by part."""
        return {
            name: {"milliseconds": round(1e3 * seconds / self.counts[name], 4), "count": self.counts[name]}
            for name, seconds in self.seconds.items()
        }

    def _wait(self) -> None:
        """Wait for the GPU."""
        if self._cuda:
            torch.cuda.synchronize()
