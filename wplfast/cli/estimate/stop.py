"""Signals that ask a pass to stop: it ends after its batch, so that what was computed can be kept."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any


class Stop:
    """While it is open, SIGINT and SIGTERM are noted instead of obeyed; a second SIGINT is obeyed.

    Args:
        patient: note them all: torchrun sends each once more to processes that a terminal has sent it to.

    Attributes:
        signal: number of the first one that came; None if none did.
    """

    def __init__(self, patient: bool = False) -> None:
        self.signal: int | None = None
        self._patient = patient
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        """Take over the signals, which only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal."""
        if self.signal is not None and number == signal.SIGINT and not self._patient:
            raise KeyboardInterrupt
        if self.signal is None and sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(RuntimeError):  # it may have come within a write
                print("\nstopping after this batch", file=sys.stderr)
        self.signal = number if self.signal is None else self.signal
