"""The hooks and Functions of others that take part in a backward pass, by name, for messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_TORCH = os.path.dirname(torch.__file__)
_STANDARD = os.path.dirname(logging.__file__)  # which autograd logs with
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
#: Files of PyTorch from which a backward pass calls what others wrote.
_CALLERS = tuple(
    os.path.join(_TORCH, *path)
    for path in (("autograd", "graph.py"), ("autograd", "function.py"), ("utils", "hooks.py"))
)


def called_in(run: Callable[[], Any]) -> list[str]:
    """Name the functions of others that autograd calls while ``run`` runs, in this thread (on CPUs, that is all)."""
    found: dict[str, None] = {}
    before = sys.getprofile()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or caller is None or not caller.f_code.co_filename.startswith(_CALLERS):
            return
        if not code.co_filename.startswith((_TORCH, _OURS, _STANDARD)):
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the shorter one alone
            found[f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"] = None

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(found)
