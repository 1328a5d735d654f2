"""A buffer times a factor that only the GPU knows: where it is 1, nothing is read or written.

The incoming gradient of a penalty is 1 unless a loss is scaled. Looking at it on the host would synchronise; here every
program looks, and leaves. There are as many programs as run at a time, so that leaving is soon done.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .kernel import kernel
from .launch import OPTIONS, n_processors, on_device, written

BLOCK, WARPS = 4096, 8
#: Programs of 8 warps for each processor: 16 elements a thread keep 32 KB or more of a processor's loads in flight.
_PROGRAMS = 4


@kernel(do_not_specialize=["numel"], do_not_specialize_on_alignment=["factor"])
def scale_unless_one_kernel(tensor, factor, numel, BLOCK: tl.constexpr):
    """Tensor *= factor, in float32, or float64 where the tensor is."""
    stored: tl.constexpr = tensor.dtype.element_ty
    wide: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
    times = tl.load(factor).to(wide)
    if times != 1:  # NaN is not one either
        n_blocks = (numel // BLOCK).to(tl.int32)
        lanes = tl.arange(0, BLOCK)
        for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
            target = tensor + tl.cast(block, tl.int64) * BLOCK + lanes
            tl.store(target, (tl.load(target).to(wide) * times).to(stored))
        if tl.program_id(0) == 0:  # what is left, less than a block
            target = tensor + tl.cast(n_blocks, tl.int64) * BLOCK + lanes
            mask = lanes < numel % BLOCK
            tl.store(target, (tl.load(target, mask=mask, other=0.0).to(wide) * times).to(stored), mask=mask)


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous buffer in place by a 0-d factor."""
    numel = tensor.numel()
    if numel == 0:
        return
    with on_device(tensor.device):
        programs = min(triton.cdiv(numel, BLOCK), _PROGRAMS * n_processors(tensor.device))
        scale_unless_one_kernel[(programs,)](tensor, factor, numel, BLOCK, num_warps=WARPS, **OPTIONS)
    written(tensor)
