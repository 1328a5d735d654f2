"""What the output positions of a convolution with few input channels see, written out as a linear layer's operand.

A tap of an RGB image has three columns, which would leave a tile nearly empty; all taps together fill one. The columns
come in the order of the weight, so that the layer's Fisher is the convolution's as it lies in memory, and float32 is
split into its terms on the way: one pass in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_geometry import SIZES, Geometry
from .fisher_config import Operands
from .kernel import kernel
from .launch import OPTIONS
from .split import OCTET

_ELEMENTS = 1024
_WIDTHS = ("n_steps", "width", "octets", "channels", "start", "plane")


@kernel(do_not_specialize=(*_WIDTHS, "k0", *SIZES))
def unfold_kernel(
    inputs, out, n_steps, width, octets, channels, start, plane, k0,
    images, l0, l1, l2, s0, s1, s2, k1, k2,
    stride0, stride1, stride2, pad0, pad1, pad2, dilation0, dilation1, dilation2,
    TERMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[:, n T + t] = the terms of what position t of sample n sees in channels from ``start`` on, (channel, tap)."""
    pitch = octets * 8
    blocks = tl.cdiv(n_steps, ROWS)
    sample = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    image, z, y, x = t // (l0 * l1 * l2), t // (l1 * l2) % l0, t // l2 % l1, t % l2
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    taps = k0 * k1 * k2
    channel, kz, ky, kx = j // taps, j // (k1 * k2) % k0, j // k2 % k1, j % k2
    zi = (z * stride0 - pad0)[:, None] + (kz * dilation0)[None, :]
    yi = (y * stride1 - pad1)[:, None] + (ky * dilation1)[None, :]
    xi = (x * stride2 - pad2)[:, None] + (kx * dilation2)[None, :]
    seen = (zi >= 0) & (zi < s0) & (yi >= 0) & (yi < s1) & (xi >= 0) & (xi < s2)
    row = (tl.cast(sample, tl.int64) * images + image)[:, None] * s0 + zi
    source = inputs + ((row * s1 + yi) * s2 + xi) * channels + start + channel[None, :]
    present = (t < n_steps)[:, None]
    value = tl.load(source, mask=seen & present & (j < width)[None, :], other=0.0)
    target = out + (tl.cast(sample, tl.int64) * n_steps + t)[:, None] * pitch + j[None, :]
    for term in tl.static_range(TERMS):
        part = value.to(out.dtype.element_ty)
        tl.store(target + tl.cast(plane, tl.int64) * (8 * term), part, mask=present & (j < pitch)[None, :])
        if term < TERMS - 1:
            value = value.to(tl.float32) - part.to(tl.float32)


def unfold(inputs: Tensor, shape: Geometry, start: int, channels: int, operands: Operands) -> Tensor:
    """Return what all positions see in ``channels`` channels from ``start`` on, [terms, N, T, pitch]."""
    n, width = len(inputs), channels * shape.taps
    pitch = triton.cdiv(width, OCTET) * OCTET
    out = torch.empty((operands.terms, n, shape.n_steps, pitch), dtype=operands.dtype, device=inputs.device)
    columns = min(128, triton.next_power_of_2(pitch))
    rows = _ELEMENTS // columns
    unfold_kernel[(n * triton.cdiv(shape.n_steps, rows), triton.cdiv(pitch, columns))](
        inputs, out, shape.n_steps, width, pitch // OCTET, inputs.shape[-1], start, out[0].numel() // OCTET,
        shape.kernel[0], *shape.sizes(), TERMS=operands.terms, ROWS=rows, COLUMNS=columns, **OPTIONS,
    )  # fmt: skip
    return out
