"""What packs are made for: calls of this backend's operators as models make them.

Each case runs an operator on tensors that nobody reads, of which only the address, dtype and shape count; what it
launches is what the pack will hold. A variant that no case reaches is compiled by Triton at run time, as all were
before, so cases are common shapes and not all that there could be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from .. import (
    accumulate_squares_,
    fisher_conv_,
    fisher_embedding_,
    fisher_linear_,
    penalty,
    penalty_add_grad_,
    penalty_with_grad,
    scale_grads,
    scale_unless_one_,
)
from ..penalty_kernel import MANY_FROM
from ..prepared import TritonPenalty
from ..reduce import SPAN, sum_partials

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A batch of one cannot be split over programs, a batch of many is.
FEW, MANY = 1, 512
Case = Callable[[], object]


def _weights(n: int, wanted: bool) -> Tensor | None:
    return torch.empty(n, dtype=torch.float64) if wanted else None


def _linear(
    dtype: torch.dtype, n: int, t: int, d_out: int, d_in: int, weighted: bool = False, gradient: bool = False
) -> None:
    fisher = torch.empty(d_out, d_in)
    a, g = torch.empty(n, t, d_in, dtype=dtype), torch.empty(n, t, d_out, dtype=dtype)
    fisher_linear_(fisher, a, g, _weights(n, weighted), torch.empty_like(fisher) if gradient else None)


#: Layers of all forms: what tile a layer gets depends on its form, on the samples and on the device.
LAYERS = (
    (10, 1024), (64, 64), (64, 256), (256, 64), (128, 512), (512, 128), (512, 512), (768, 768), (3072, 768),
    (768, 3072), (1000, 2048), (4096, 4096),
)  # fmt: skip


def linear() -> Iterator[Case]:
    """Linear layers: of samples with one row, a few, or many; narrow and wide."""
    for dtype, n, t, layer, weighted in product(DTYPES, (FEW, 8, 64, MANY), (16, 32, 64, 128), LAYERS, (False, True)):
        yield partial(_linear, dtype, n, t, *layer, weighted)
    for dtype, n, t, layer in product(DTYPES, (FEW, 64), (1, 16, 128), LAYERS):
        yield partial(_linear, dtype, n, t, *layer, gradient=True)
    # One row for each sample: as wide as layers come, with the odd width of raw features.
    for dtype, width, weighted in product(DTYPES, (8, 10, 24, 64, 128, 256, 512, 1024), (False, True)):
        yield partial(_linear, dtype, 64, 1, width, width, weighted)
    for n, (d_out, d_in) in product((64, 64 * MANY), (*LAYERS, (64, 13), (512, 301))):
        yield partial(_linear, torch.float32, n, 1, d_out, d_in)


def _conv(
    dtype: torch.dtype,
    n: int,
    channels: tuple[int, int],
    size: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    weighted: bool = False,
) -> None:
    c_in, c_out = channels
    positions = (size - 1) // stride + 1
    x = torch.empty(n, 1, size, size, c_in, dtype=dtype)
    g = torch.empty(n, 1, positions, positions, c_out, dtype=dtype)
    fisher = torch.empty(c_out, c_in // groups, kernel, kernel)
    spatial = [stride] * 2, [kernel // 2] * 2, [1] * 2
    fisher_conv_(fisher, x, g, _weights(n, weighted), None, *spatial, groups)


def conv() -> Iterator[Case]:
    """Convolutions of image models: the first one, those between few and many channels, depthwise ones."""
    for dtype, weighted in product(DTYPES, (False, True)):
        for size in (112, 56, 28, 14, 7, 32, 16, 8, 4):
            yield partial(_conv, dtype, MANY, (64, 64), size, 3, weighted=weighted)
            if size < 56:
                yield partial(_conv, dtype, MANY, (256, 256), size, 3, weighted=weighted)
        for channels, kernel, n in product((1, 3), (3, 5, 7), (FEW, MANY)):
            yield partial(_conv, dtype, n, (channels, 64), 32, kernel, weighted=weighted)
        for kernel, size in product((3, 5, 7), (56, 14, 7)):
            yield partial(_conv, dtype, MANY, (96, 96), size, kernel, groups=96, weighted=weighted)


def _embedding(dtype: torch.dtype, n: int, t: int, width: int, weighted: bool) -> None:
    tokens = torch.zeros(n, t, dtype=torch.int64)
    fisher_embedding_(
        torch.empty(64, width), tokens, torch.empty(n, t, width, dtype=dtype), _weights(n, weighted), None
    )


def embedding() -> Iterator[Case]:
    """Tables of embeddings."""
    for dtype, width, weighted in product(DTYPES, (32, 64, 128, 256), (False, True)):
        yield partial(_embedding, dtype, 4, 64, width, weighted)


def _scale(dtype: torch.dtype, n: int, t: int, d: int, steps_first: bool) -> None:
    shape = (n, d, t) if steps_first else (n, t, d)
    a, g = (torch.empty(shape, dtype=dtype) for _ in range(2))
    scale_grads(*((a.mT, g.mT) if steps_first else (a, g)))


def norms() -> Iterator[Case]:
    """Scales of normalisations, over rows [N, T, D] and over images [N, C, L]."""
    for dtype in DTYPES:
        for t, d in product((1, 8, 16, 17, 64, 197, 512), (64, 768)):
            yield partial(_scale, dtype, 64, t, d, False)
        yield partial(_scale, dtype, 1, 2048, 64, False)
        for t, d in product((16, 49, 64, 196, 256, 784), (64, 256)):
            yield partial(_scale, dtype, 64, t, d, True)
        yield partial(_scale, dtype, 1, 3136, 64, True)


def _squares(dtype: torch.dtype, n: int, numel: int, weighted: bool) -> None:
    accumulate_squares_(torch.empty(numel), torch.empty(n, numel, dtype=dtype), _weights(n, weighted))


def squares() -> Iterator[Case]:
    """Per-sample gradients in memory, of biases and of whatever has no kernel of its own."""
    for dtype, n, numel, weighted in product(DTYPES, (FEW, MANY), (10, 64), (False, True)):
        yield partial(_squares, dtype, n, numel, weighted)


def _penalty(dtype: torch.dtype, fisher_dtype: torch.dtype, numel: int, offset: bool, per_tensor: bool) -> None:
    theta = [torch.nn.Parameter(torch.empty(size, dtype=dtype)) for size in (numel, 64)]
    hats, fishers = ([torch.empty(len(p), dtype=d) for p in theta] for d in (dtype, fisher_dtype))
    offsets = [torch.empty(len(p)) for p in theta] if offset else []
    shape = (len(theta),) if per_tensor else ()
    alpha, constant = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    l2, one = (torch.empty((), dtype=torch.float64) for _ in range(2))
    for p in theta:
        p.grad = torch.empty_like(p)
    grads = [p.grad for p in theta if p.grad is not None]
    with torch.no_grad():
        penalty(theta, hats, offsets, fishers, alpha, l2)
        penalty_with_grad(theta, hats, offsets, fishers, alpha, l2)
        penalty_add_grad_(grads, theta, hats, offsets, fishers, alpha, l2, one)
    for zero in (constant, None):
        prepared = TritonPenalty(theta, hats, offsets, fishers, alpha, l2, zero)
        prepared.value()
        prepared.with_grad()
        prepared.add_grad_(one)


def penalties() -> Iterator[Case]:
    """Penalties of small and large models, with Fishers in float32 or in the parameters' own type."""
    types = [*((dtype, torch.float32) for dtype in DTYPES), (torch.float32, torch.bfloat16)]
    types.append((torch.bfloat16, torch.bfloat16))
    for (dtype, fisher_dtype), numel, offset, per_tensor in product(
        types, (4096, MANY_FROM), (False, True), (False, True)
    ):
        yield partial(_penalty, dtype, fisher_dtype, numel, offset, per_tensor)
    yield partial(sum_partials, torch.empty(SPAN + 1, dtype=torch.float64), torch.float32)
    for dtype in DTYPES:
        yield partial(scale_unless_one_, torch.empty(4096, dtype=dtype), torch.empty(()))


#: Cases by what they are cases of.
CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "linear": linear, "conv": conv, "embedding": embedding, "norms": norms, "squares": squares, "penalties": penalties,
}  # fmt: skip
