"""A CUDA driver without a GPU (``fake_cuda.c``), for what happens on the host before a kernel runs.

A process finds it in place of the real driver if it starts in :func:`environment`. PyTorch knows nothing of it: tensors
are on the CPU, and only launches go to the pretended GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
STREAM = 7


def build(folder: Path) -> Path:
    """Compile the library into a folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    library = folder / "libcuda.so.1"
    flags = ["-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread", f"-Wl,-soname,{library.name}"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return folder


def environment(folder: Path, **settings: str) -> Mapping[str, str]:
    """Return the environment of a process that finds the library, with FAKE_CUDA_* and other settings."""
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths)), "TRITON_LIBCUDA_PATH": str(folder), **settings
    }  # fmt: skip


class FakeCuda:
    """The library, in a process that found it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_cuda_notes.restype = ctypes.c_char_p

    def notes(self) -> list[str]:
        """Return what was loaded and launched since the last call, one line each."""
        notes: bytes = self._library.fake_cuda_notes()
        return notes.decode().splitlines()

    def fail(self, function: str, result: int) -> None:
        """Let a function of the driver return an error; 0 ends that."""
        self._library.fake_cuda_fail(function.encode(), result)


def triton_driver(capability: int = 90) -> Any:
    """Return Triton's own driver of NVIDIA GPUs, which compiles its parts in C, on the pretended GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: STREAM
            self.get_device_capability = lambda device: divmod(capability, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

    return Driver()


def server(required: bool = False, capability: int = 90) -> Any:
    """Return what serves launches from packs on the pretended GPU."""
    from wplfast.backends.triton.kernel import Server

    return Server(required, lambda: 0, lambda device: STREAM, lambda device: divmod(capability, 10))
