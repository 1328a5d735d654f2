"""A device for tests without a GPU: its memory is the host's, and tensors on it do not mix with the CPU's.

``pytest --device rehearsal`` runs on it what ``--device cuda`` runs on a GPU: results are those of the CPU, but a test
(or the library) that mixes tensors of two devices, draws with the CPU's generator or hands a tensor to NumPy fails here
as it would fail there. It is compiled at first use (needs g++ and the headers in torch's wheel).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")
SOURCE = Path(__file__).with_name("device.cpp")


def rehearsable(names: Iterable[str], lacking: Mapping[str, str]) -> list[Any]:
    """Return names as a test's parameters, marked where the device lacks what they need.

    Sparse tensors have no kernels there, and gradients of Fourier transforms end in PyTorch with a segmentation fault.
    """
    marks = {name: pytest.mark.not_rehearsed(what) for name, what in lacking.items()}
    return [pytest.param(name, marks=[marks[name]] if name in marks else []) for name in names]


class Module:
    """What ``torch.rehearsal`` is: the functions that torch expects of a device's module."""

    device = nullcontext  # the one there is

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch.ops.rehearsal.seed(seed - 2**64 if seed >= 2**63 else seed)

    manual_seed = manual_seed_all

    @staticmethod
    def get_rng_state(device: object = None) -> Tensor:
        return torch.ops.rehearsal.get_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: object = None) -> None:
        torch.ops.rehearsal.set_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def memory_allocated(device: object = None) -> int:
        return int(torch.ops.rehearsal.allocated())

    @staticmethod
    def max_memory_allocated(device: object = None) -> int:
        return int(torch.ops.rehearsal.peak())

    @staticmethod
    def reset_peak_memory_stats(device: object = None) -> None:
        torch.ops.rehearsal.reset_peak()

    @staticmethod
    def set_sync_debug_mode(mode: str) -> None:
        torch.ops.rehearsal.forbid_waits(mode == "error")

    @staticmethod
    def synchronize(device: object = None) -> None:
        pass


def start() -> str:
    """Make the device known to torch; return its name."""
    if not hasattr(torch, "rehearsal"):
        torch.ops.load_library(_compiled())
        torch._register_device_module("rehearsal", Module())
        torch.utils.generate_methods_for_privateuse1_backend()
        LIBRARY.impl("_thnn_fused_lstm_cell", lstm_cell, "AutogradPrivateUse1")
        LIBRARY.impl("_thnn_fused_gru_cell", gru_cell, "AutogradPrivateUse1")
    return "rehearsal"


def lstm_cell(x: Tensor, h: Tensor, cx: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the CPU does step by step; every other device must have it as one operator."""
    gates = sum((b for b in biases if b is not None), x + h)
    i, f, g, o = gates.chunk(4, 1)
    cy = f.sigmoid() * cx + i.sigmoid() * g.tanh()
    return o.sigmoid() * cy.tanh(), cy, gates.detach()


def gru_cell(x: Tensor, h: Tensor, hx: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute a step of a GRU, as :func:`lstm_cell`."""
    x, h = (gates if bias is None else gates + bias for gates, bias in zip((x, h), biases or (None, None), strict=True))
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (hx - n), x.detach()


def _compiled() -> Path:
    """Compile the device, or find what an earlier run compiled from the same source for the same torch."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"wplfast-rehearsal-{os.getuid()}-{key}.so"
    if path.exists():
        return path
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the rehearsal device needs a C++ compiler: install g++, or set CXX")
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    partial = path.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *includes, str(SOURCE), "-o", str(partial)]
    subprocess.run([*command, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
    partial.rename(path)
    return path
