"""The Fisher kernels of convolutions, embeddings, scales and biases, beside PyTorch's gradient of that layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wplfast import ops

from .kernels import DTYPES, TOLERANCE, Kernel, Operands, measure
from .plumbing.parts import Cases


@dataclass(frozen=True)
class Conv:
    """A convolution over N images of a side, padded by half a kernel."""

    c_in: int
    c_out: int
    side: int
    kernel: int
    stride: int = 1
    groups: int = 1
    n: int = 64

    @property
    def out(self) -> int:
        """Side of the output."""
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1


#: ResNet-50's, by how often they occur, and depthwise and grouped ones.
CONVS = {
    "3x3, 64, 56x56": Conv(64, 64, 56, 3),
    "3x3, 128, 28x28": Conv(128, 128, 28, 3),
    "3x3, 256, 14x14": Conv(256, 256, 14, 3),
    "3x3, 512, 7x7": Conv(512, 512, 7, 3),
    "1x1, 256 to 64, 56x56": Conv(256, 64, 56, 1),
    "1x1, 64 to 256, 56x56": Conv(64, 256, 56, 1),
    "1x1, 1024 to 256, 14x14": Conv(1024, 256, 14, 1),
    "1x1, 512 to 2048, 7x7": Conv(512, 2048, 7, 1),
    "7x7 stem, 3 to 64, 224x224": Conv(3, 64, 224, 7, 2),
    "3x3 stride 2, 128, 56x56": Conv(128, 128, 56, 3, 2),
    "1x1 stride 2, 256 to 512, 56x56": Conv(256, 512, 56, 1, 2),
    "3x3 depthwise, 384, 14x14": Conv(384, 384, 14, 3, 1, 384),
    "7x7 depthwise, 96, 56x56": Conv(96, 96, 56, 7, 1, 96),
    "3x3 grouped by 32, 256, 28x28": Conv(256, 256, 28, 3, 1, 32),
}
#: Those that are measured in float32 too.
FLOATS = ("3x3, 64, 56x56", "3x3, 256, 14x14", "1x1, 256 to 64, 56x56", "7x7 stem, 3 to 64, 224x224")


def tiny(form: Conv) -> Conv:
    """Return a small convolution of the same kind."""
    return replace(form, c_in=8, c_out=8, side=6, n=2, groups=8 if form.groups > 32 else 1)


def conv(generator: torch.Generator, form: Conv, dtype: str) -> Kernel:
    """Return ``fisher_conv_``, beside cuDNN's gradient of the weight."""
    device, kind = generator.device, DTYPES[dtype]
    padding, stride, c_in = [form.kernel // 2] * 2, [form.stride] * 2, form.c_in // form.groups
    shape = (form.c_out, c_in, form.kernel, form.kernel)
    weight = torch.randn(shape, device=device).to(kind, memory_format=torch.channels_last)

    def draw() -> Operands:
        sizes = ((form.n, form.side, form.side, form.c_in), (form.n, form.out, form.out, form.c_out))
        return tuple(torch.randn(size, device=device, generator=generator).to(kind) for size in sizes)

    def exact(x: Tensor, g: Tensor) -> list[Tensor]:
        total = torch.zeros(form.groups, form.c_out // form.groups, weight[0].numel(), device=device).double()
        for n in range(form.n):
            columns = F.unfold(x[n].permute(2, 0, 1)[None].double(), form.kernel, 1, padding, stride)
            outputs = g[n].reshape(form.out**2, form.groups, -1).permute(1, 2, 0).double()
            total += (outputs @ columns.view(form.groups, weight[0].numel(), -1).mT).square_()
        return [total.view(shape)]

    def ours(accumulators: Sequence[Tensor], x: Tensor, g: Tensor) -> None:
        ops.fisher_conv_(
            accumulators[0], x[:, None], g[:, None],
            stride=stride, padding=padding, dilation=[1, 1], groups=form.groups,
        )  # fmt: skip

    def plain(x: Tensor, g: Tensor) -> None:
        torch.ops.aten.convolution_backward(
            g.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None,
            stride, padding, [1, 1], False, [0, 0], form.groups, [False, True, False],
        )  # fmt: skip

    moved = kind.itemsize * form.n * (form.side**2 * form.c_in + form.out**2 * form.c_out) + 8 * weight.numel()
    flops = 2 * form.n * form.out**2 * weight.numel()
    tolerance = TOLERANCE["half" if dtype != "fp32" else "bf16x6"]
    return Kernel(vars(form) | {"dtype": dtype}, draw, exact, ours, plain, moved, flops, tolerance)


def embedding(generator: torch.Generator, rows: int, dtype: str, n: int = 8, t: int = 512, width: int = 768) -> Kernel:
    """Return ``fisher_embedding_`` of a table, beside PyTorch's dense gradient."""
    device, kind = generator.device, DTYPES[dtype]

    def draw() -> Operands:
        indices = torch.randint(rows, (n, t), device=device, generator=generator)
        return indices, torch.randn(n, t, width, device=device, generator=generator).to(kind)

    def exact(indices: Tensor, g: Tensor) -> list[Tensor]:
        total = torch.zeros(rows, width, device=device, dtype=torch.float64)
        for sample, gradients in zip(indices, g, strict=True):
            total += torch.zeros_like(total).index_add_(0, sample, gradients.double()).square_()
        return [total]

    def ours(accumulators: Sequence[Tensor], indices: Tensor, g: Tensor) -> None:
        ops.fisher_embedding_(accumulators[0], indices, g)

    def plain(indices: Tensor, g: Tensor) -> None:
        torch.ops.aten.embedding_dense_backward(g, indices, rows, -1, False)

    used = rows * (1 - (1 - 1 / rows) ** (n * t))  # rows, as expected of uniform indices
    moved = n * t * (kind.itemsize * width + 8) + 8 * width * used
    return Kernel({"rows": rows, "width": width, "n": n, "t": t, "dtype": dtype}, draw, exact, ours, plain, moved)


def scale(generator: torch.Generator, n: int, t: int, width: int, dtype: str) -> Kernel:
    """Return ``scale_grads``, which makes new tensors, beside the product and sum that PyTorch writes."""
    device, kind = generator.device, DTYPES[dtype]

    def draw() -> Operands:
        return tuple(torch.randn(n, t, width, device=device, generator=generator).to(kind) for _ in range(2))

    return Kernel(
        {"n": n, "t": t, "width": width, "dtype": dtype},
        draw,
        lambda a, g: [(a.double() * g.double()).sum(1)],
        lambda accumulators, a, g: ops.scale_grads(a, g),
        lambda a, g: (a * g).sum((0, 1), dtype=torch.float32),
        2 * n * t * width * kind.itemsize + 4 * n * width,
    )


def squares(generator: torch.Generator, n: int, numel: int) -> Kernel:
    """Return the sum of squares of gradients that are in memory already, beside PyTorch's formula."""
    plain = torch.zeros(numel, device=generator.device)
    return Kernel(
        {"n": n, "elements": numel},
        lambda: (torch.randn(n, numel, device=generator.device, generator=generator),),
        lambda grads: [sum((row.double().square() for row in grads), torch.zeros_like(grads[0]).double())],
        lambda accumulators, grads: ops.accumulate_squares_(accumulators[0], grads),
        lambda grads: plain.add_(grads.square().sum(0)),
        4 * n * numel + 8 * numel,
    )


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    convs = {name: tiny(form) if quick else form for name, form in CONVS.items()}
    made = {f"conv {name}, bf16": partial(conv, form=form, dtype="bf16") for name, form in convs.items()}
    for rows, dtype in ((50257, "bf16"), (512, "bf16"), (10000, "fp32")):
        sizes = {"rows": 11, "n": 2, "t": 9, "width": 16} if quick else {"rows": rows}
        made[f"embedding {rows}x768, {dtype}"] = partial(embedding, dtype=dtype, **sizes)
    for name, *sizes in (("LayerNorm", 8, 512, 768), ("BatchNorm", 64, 3136, 256), ("BatchNorm", 64, 49, 2048)):
        n, t, width = (2, 5, 12) if quick else sizes
        full = f"scale, {name} {sizes[2]}, N={sizes[0]} T={sizes[1]}, bf16"
        made[full] = partial(scale, n=n, t=t, width=width, dtype="bf16")
    for name, numel in (("4 M", 1 << 22), ("2048", 2048)):
        made[f"squares, N=64, {name}"] = partial(squares, n=3 if quick else 64, numel=100 if quick else numel)
    made |= {f"conv {name}, fp32": partial(conv, form=convs[name], dtype="fp32") for name in FLOATS}
    return {name: partial(measure, make, device, quick) for name, make in made.items()}
