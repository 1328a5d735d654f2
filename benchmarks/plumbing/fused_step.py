"""The prototype's side in Python: compiles ``fused_step.cpp`` and calls it on tensors."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_suffix(".cpp")
CSRC = SOURCE.parents[2] / "csrc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")

#: The rules and the passes, in the order of the enumerations in ``fused_step.cpp``.
RULES = ("sgd", "momentum", "adamw")
PASSES = ("penalty", "step", "fused")
MOMENTUM = 0.9
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2  # torch.optim.AdamW's own
#: Names that torch.optim gives to what each rule remembers.
STATE = {"sgd": (), "momentum": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class CompilerError(RuntimeError):
    """The prototype cannot be compiled here."""


class _Slot(ctypes.Structure):
    """One parameter: addresses and length."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("theta", "theta_hat", "fisher", "grad", "first", "second")),
        ("numel", ctypes.c_int64),
    )


class _Coefficients(ctypes.Structure):
    """What one step multiplies with."""

    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in ("alpha", "scale", "lr", "beta1", "rest1", "beta2", "rest2", "root_correction", "eps", "shrink")
    )


def compiler() -> list[str]:
    """Return the compiler's command: CXX, or ``c++``."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Compile and load the prototype; torch must have been imported, so that both share one OpenMP runtime.

    Raises:
        CompilerError: if there is no compiler, or if it fails.
    """
    command = compiler()
    if shutil.which(command[0]) is None:
        raise CompilerError(f"fused_step needs a C++17 compiler with OpenMP: {command[0]!r} not found; set CXX to one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fused_step.so"
        line = [*command, *FLAGS, f"-I{CSRC}", str(SOURCE), "-o", str(path)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilerError(f"{shlex.join(line)} failed:\n{done.stderr[-2000:]}")
        loaded = ctypes.CDLL(str(path))
    function = loaded.wplfast_fused_step
    slots, coefficients = ctypes.POINTER(_Slot), ctypes.POINTER(_Coefficients)
    function.argtypes = (slots, ctypes.c_int64, coefficients, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_double
    return loaded


def torch_optimizer(rule: str, theta: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """Return torch's fused optimizer of a rule."""
    if rule == "adamw":
        return torch.optim.AdamW(theta, lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    return torch.optim.SGD(theta, lr=lr, momentum=MOMENTUM if rule == "momentum" else 0.0, fused=True)


class OwnStep:
    """Penalty and optimizer step by the prototype, with torch's default settings.

    Args:
        rule: one of :data:`RULES`.
        theta: contiguous float32 parameters; their ``.grad`` is looked up at every call, as it may be a new tensor.
        theta_hat: anchors.
        fisher: importances.
        state: for each parameter what the rule remembers, in the order of :data:`STATE`; written in place.
        alpha: strength of the penalty.
        lr: learning rate.
    """

    def __init__(
        self,
        rule: str,
        theta: Sequence[nn.Parameter | Tensor],
        theta_hat: Sequence[Tensor],
        fisher: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        alpha: float,
        lr: float,
    ) -> None:
        self._theta, self._held = list(theta), (list(theta_hat), list(fisher), list(state))
        self._rule, self._alpha, self._lr, self._steps = RULES.index(rule), alpha, lr, 0
        self._slots = (_Slot * len(self._theta))()
        for slot, p, p_hat, f, kept in zip(self._slots, theta, theta_hat, fisher, state, strict=True):
            for tensor in (p, p_hat, f, *kept):
                if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.numel() != p.numel():
                    raise ValueError(f"expected contiguous float32 {list(p.shape)}, got {tensor.dtype} {tensor.shape}")
            slot.theta, slot.theta_hat, slot.fisher = p.data_ptr(), p_hat.data_ptr(), f.data_ptr()
            slot.numel = p.numel()
            for name, tensor in zip(("first", "second"), kept, strict=False):
                setattr(slot, name, tensor.data_ptr())
        self._run = library().wplfast_fused_step

    def penalty(self) -> float:
        """Add the penalty's gradient to ``.grad`` and return its value."""
        return self._call("penalty")

    def step(self) -> None:
        """Take the optimizer's step."""
        self._steps += 1
        self._call("step")

    def fused(self) -> float:
        """Take the step of loss plus penalty in one pass, ``.grad`` unchanged, and return the penalty's value."""
        self._steps += 1
        return self._call("fused")

    def _call(self, which: str) -> float:
        """Run one pass."""
        for slot, p in zip(self._slots, self._theta, strict=True):
            slot.grad = p.grad.data_ptr()
        coefficients = _Coefficients(self._alpha, 1.0, self._lr, MOMENTUM)
        if RULES[self._rule] == "adamw" and which != "penalty":
            (b1, b2), t = BETAS, self._steps
            lr, root = self._lr / (1 - b1**t), 1 / math.sqrt(1 - b2**t)
            shrink = 1 - self._lr * WEIGHT_DECAY
            coefficients = _Coefficients(self._alpha, 1.0, lr, b1, 1 - b1, b2, 1 - b2, root, EPS, shrink)
        threads = torch.get_num_threads()
        value: float = self._run(self._slots, len(self._slots), coefficients, self._rule, PASSES.index(which), threads)
        return value
