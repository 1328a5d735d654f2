"""What every launch of this backend shares: the device to launch on, its size, and compiler options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from . import kernel
from .packs.archives import LOADED

logger = logging.getLogger(__name__)

#: Products and sums may fuse (one rounding instead of two); Triton 3.10 changes its default, so it is said here.
OPTIONS = {"enable_fp_fusion": True}

#: True where kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

#: What a CPU passes for, in the interpreter: a Hopper GPU, small, so that tests reach the paths of both small and large
#: grids. Precompilation changes it to what it compiles for.
PRETENDED = {"processors": 4, "capability": 90}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that makes ``device`` current: Triton launches on the current device, whatever the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def written(*tensors: Tensor | None) -> None:
    """Tell autograd, which sees no kernel, that one wrote to tensors: what saved them for a backward pass can know."""
    increment_version([tensor for tensor in tensors if tensor is not None])


class Relaunched:
    """A kernel for arguments of one kind: compiled by its first launch, from the second on launched as it was compiled.

    That is where WPLFAST_KERNELS asks for it (see ``kernel``), elsewhere every launch is as the first.

    The JIT looks at every argument of a launch to find what it compiled for their kind: more work than the launch. A
    search in a pack does the same, if faster. Here the caller vouches for the kind: the device, the dtypes, what is
    None, the constexprs, the options and, unless the kernel is specialised on neither, the alignment of pointers and
    the divisibility of numbers are those of the first launch. In the interpreter, which compiles nothing, every launch
    is a first one.

    Args:
        function: a Triton kernel; all of its arguments are given by position.
    """

    def __init__(self, function: Any) -> None:
        self._kernel = function
        self._compiled: Any = None
        self._loaded: Any = None
        self._again = True

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches a grid of programs, as a kernel does."""

        def run(*arguments: Any, **options: Any) -> None:
            try:
                if self._loaded is not None:
                    self._loaded.launch(grid, arguments)
                    return
                if self._compiled is not None:
                    self._compiled[(*grid, 1, 1)[:3]](*arguments)
                    return
            except TypeError as error:  # a version of Triton whose launcher takes other arguments
                logger.warning("a compiled kernel cannot be launched again, the JIT launches it: %s", error)
                self._compiled, self._loaded, self._again = None, None, False
            except Exception as error:
                raise kernel.failure(self._kernel.__name__, error) from error
            compiled = self._kernel[grid](*arguments, **options)
            if isinstance(compiled, LOADED) and self._again:
                self._loaded = compiled
            elif kernel.RELAUNCHES and self._again and isinstance(compiled, triton.compiler.CompiledKernel):
                self._compiled = compiled

        return run


@lru_cache
def n_processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors."""
    if device.type != "cuda":
        return PRETENDED["processors"]
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def capability(device: torch.device) -> int:
    """Return the compute capability as one number, such as 90."""
    if device.type != "cuda":
        return PRETENDED["capability"]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
