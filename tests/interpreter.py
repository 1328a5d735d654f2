"""Tests in Triton's interpreter, which must be chosen before the first import of Triton: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

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
