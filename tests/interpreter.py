"""Tests in Triton's interpreter, which must be chosen before the first import of Triton: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy
import pytest


def run(file: str, **environment: str) -> None:
    """Run a file's tests in the interpreter; their failures are this test's."""
    triton = pytest.importorskip("triton")
    if _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs NumPy before 2.4: later ones refuse its loop bounds")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _version(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


def quicken() -> None:
    """Spare Triton's interpreter what it does over and over to the same effect: most of the time of these tests.

    It puts functions on NumPy in place of Triton's language at every launch, and at every call of a function by a
    kernel, which takes milliseconds. Here they stay in place: nothing is compiled in this process. And it takes
    bfloat16 apart into sign, exponent and significand, of which float32 has the same ones in the same order.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, convert = interpreter._patch_lang, interpreter._convert_float
    patched: set[tuple[str, ...]] = set()

    def patch_once(function: FunctionType) -> Any:
        known = (language, language.core)
        modules = tuple(name for name, value in function.__globals__.items() if any(value is m for m in known))
        if modules not in patched:
            patch(function)
            patched.add(modules)
        return SimpleNamespace(restore=lambda: None)

    def converted(data: numpy.ndarray, source: Any, target: Any, rounding: Any) -> numpy.ndarray:
        if (source, target) == (language.bfloat16, language.float32):
            return data.view(numpy.uint16).astype(numpy.uint32) << 16
        if (source, target, rounding) == (language.float32, language.bfloat16, None):
            return (data.view(numpy.uint32) >> 16).astype(numpy.uint16)
        return convert(data, source, target, rounding)

    interpreter._patch_lang, interpreter._convert_float = patch_once, converted
