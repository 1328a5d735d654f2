"""A buffer times a factor that only the GPU knows: where it is 1, nothing is read or written.

The incoming gradient of a penalty is 1 unless a loss is scaled. Looking at it on the host would synchronise; here every
program looks, and leaves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, on_device

BLOCK, WARPS = 4096, 8


@triton.jit
def scale_unless_one_kernel(tensor, factor, numel, BLOCK: tl.constexpr):
    """Tensor *= factor, in the factor's precision."""
    times = tl.load(factor)
    if times != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        if first + BLOCK <= numel:
            value = tl.load(tensor + first + lanes)
            tl.store(tensor + first + lanes, (value.to(times.dtype) * times).to(value.dtype))
        else:
            mask = first + lanes < numel
            value = tl.load(tensor + first + lanes, mask=mask, other=0.0)
            tl.store(tensor + first + lanes, (value.to(times.dtype) * times).to(value.dtype), mask=mask)


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous buffer in place by a 0-d factor."""
    numel = tensor.numel()
    if numel == 0:
        return
    with on_device(tensor.device):
        grid = (triton.cdiv(numel, BLOCK),)
        scale_unless_one_kernel[grid](tensor, factor, numel, BLOCK, num_warps=WARPS, **OPTIONS)
    torch.autograd.graph.increment_version(tensor)
