"""What every launch of this backend shares: the device to launch on, its size, and compiler options."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

#: Products and sums may fuse (one rounding instead of two); Triton 3.10 changes its default, so it is said here.
OPTIONS = {"enable_fp_fusion": True}

#: True where kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

#: Pretended size of the CPU under the interpreter: small, so that tests reach the paths of both small and large grids.
_INTERPRETED_PROCESSORS = 4


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that makes ``device`` current: Triton launches on the current device, whatever the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def written(*tensors: Tensor | None) -> None:
    """Tell autograd, which sees no kernel, that one wrote to tensors: what saved them for a backward pass can know."""
    increment_version([tensor for tensor in tensors if tensor is not None])


@lru_cache
def n_processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def capability(device: torch.device) -> int:
    """Return the compute capability as one number, such as 90; the interpreter passes for a Hopper GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
