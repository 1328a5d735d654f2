"""The other Fisher kernels beside what PyTorch runs for the plain gradient of the same layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wplfast import ops

from .linear import DTYPES, TOLERANCE
from .plumbing.kernel_case import OURS, checked, errors_of, fresh, judged, timed
from .plumbing.parts import Cases
from .roofs import tf32
from .timing import rotating, rotations

PLAIN = "plain gradient"


@dataclass(frozen=True)
class Conv:
    """A convolution over N images of a side."""

    n: int
    c_in: int
    c_out: int
    side: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def out(self) -> int:
        """Side of the output, padded by half a kernel."""
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def taps(self) -> int:
        """Entries of the weight for each output channel."""
        return self.c_in // self.groups * self.kernel**2


#: ResNet-50's, by how often they occur, and a depthwise one.
CONVS = {
    "3x3, 64, 56x56": Conv(64, 64, 64, 56, 3),
    "3x3, 128, 28x28": Conv(64, 128, 128, 28, 3),
    "3x3, 256, 14x14": Conv(64, 256, 256, 14, 3),
    "3x3, 512, 7x7": Conv(64, 512, 512, 7, 3),
    "1x1, 256 to 64, 56x56": Conv(64, 256, 64, 56, 1),
    "1x1, 64 to 256, 56x56": Conv(64, 64, 256, 56, 1),
    "1x1, 1024 to 256, 14x14": Conv(64, 1024, 256, 14, 1),
    "1x1, 512 to 2048, 7x7": Conv(64, 512, 2048, 7, 1),
    "7x7 stem, 3 to 64, 224x224": Conv(64, 3, 64, 224, 7, 2),
    "3x3 stride 2, 128, 56x56": Conv(64, 128, 128, 56, 3, 2),
    "1x1 stride 2, 256 to 512, 56x56": Conv(64, 256, 512, 56, 1, 2),
    "3x3 depthwise, 384, 14x14": Conv(64, 384, 384, 14, 3, 1, 384),
    "7x7 depthwise, 96, 56x56": Conv(64, 96, 96, 56, 7, 1, 96),
    "3x3 grouped by 32, 256, 28x28": Conv(64, 256, 256, 28, 3, 1, 32),
}
QUICK_CONVS = {name: Conv(2, 8, 8, 6, c.kernel, c.stride, 8 if c.groups > 32 else 1) for name, c in CONVS.items()}


def conv_exact(x: Tensor, g: Tensor, form: Conv) -> Tensor:
    """Return the Fisher in float64 from NHWC tensors, sample by sample."""
    total = x.new_zeros(form.groups, form.c_out // form.groups, form.taps, dtype=torch.float64)
    for n in range(form.n):
        image = x[n].permute(2, 0, 1)[None].double()
        columns = F.unfold(image, form.kernel, padding=form.kernel // 2, stride=form.stride)
        outputs = g[n].reshape(form.out**2, form.groups, -1).permute(1, 2, 0).double()
        total += (outputs @ columns.view(form.groups, form.taps, -1).transpose(1, 2)).square_()
    return total.view(form.c_out, form.c_in // form.groups, form.kernel, form.kernel)


def conv(device: torch.device, quick: bool, name: str, dtype: str) -> dict:
    """Check and time a convolution, beside cuDNN's gradient of its weight."""
    form = (QUICK_CONVS if quick else CONVS)[name]
    generator, seed = fresh(device)
    padding, kind = form.kernel // 2, DTYPES[dtype]

    def drawn() -> tuple[Tensor, Tensor]:
        x = torch.randn(form.n, form.side, form.side, form.c_in, device=device, generator=generator)
        g = torch.randn(form.n, form.out, form.out, form.c_out, device=device, generator=generator)
        return x.to(kind), g.to(kind)

    def ours(f: Tensor, x: Tensor, g: Tensor) -> None:
        ops.fisher_conv_(
            f, x[:, None], g[:, None],
            stride=[form.stride] * 2, padding=[padding] * 2, dilation=[1, 1], groups=form.groups,
        )  # fmt: skip

    weight = torch.randn(form.c_out, form.c_in // form.groups, form.kernel, form.kernel, device=device).to(kind)
    weight = weight.to(memory_format=torch.channels_last)

    def plain(x: Tensor, g: Tensor) -> None:
        torch.ops.aten.convolution_backward(
            g.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None,
            [form.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], form.groups, [False, True, False],
        )  # fmt: skip

    with tf32(False):
        x, g = drawn()
        found = checked(
            lambda f, _: ours(f, x, g), conv_exact(x, g, form), None, TOLERANCE["half" if dtype != "fp32" else "bf16x6"]
        )
        sets = [(x, g)] + [drawn() for _ in range(rotations(x.nbytes + g.nbytes, device) - 1)]
        total = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        runs = {OURS: rotating(lambda x, g: ours(total, x, g), sets), PLAIN: rotating(plain, sets)}
        flops = 2 * form.n * form.out**2 * form.c_out * form.taps
        record = timed(device, runs, quick, flops=flops, n_bytes=x.nbytes + g.nbytes + 8 * total.numel())
    return judged({**vars(form), "dtype": dtype, "seed": seed, **found, **record})


def embedding(device: torch.device, quick: bool, vocabulary: int, dtype: str) -> dict:
    """Check and time a table of 768 columns, N=8, T=512, beside PyTorch's dense gradient."""
    n, t, width = (2, 9, 16) if quick else (8, 512, 768)
    vocabulary = min(vocabulary, 11) if quick else vocabulary
    generator, seed = fresh(device)

    def drawn() -> tuple[Tensor, Tensor]:
        indices = torch.randint(vocabulary, (n, t), device=device, generator=generator)
        return indices, torch.randn(n, t, width, device=device, generator=generator).to(DTYPES[dtype])

    indices, g = drawn()
    expected = torch.zeros(vocabulary, width, device=device, dtype=torch.float64)
    for i in range(n):
        expected += torch.zeros_like(expected).index_add_(0, indices[i], g[i].double()).square_()
    found = checked(lambda f, _: ops.fisher_embedding_(f, indices, g), expected, None, 1e-5)
    sets = [(indices, g)] + [drawn() for _ in range(rotations(g.nbytes, device) - 1)]
    total = torch.zeros(vocabulary, width, device=device)
    runs = {
        OURS: rotating(lambda i, g: ops.fisher_embedding_(total, i, g), sets),
        PLAIN: rotating(lambda i, g: torch.ops.aten.embedding_dense_backward(g, i, vocabulary, -1, False), sets),
    }
    moved = g.nbytes + indices.nbytes + 8 * width * len(indices.unique())
    record = timed(device, runs, quick, n_bytes=moved)
    return judged({"vocabulary": vocabulary, "width": width, "n": n, "t": t, "seed": seed, **found, **record})


def scale(device: torch.device, quick: bool, n: int, t: int, width: int, dtype: str) -> dict:
    """Check and time the gradients of a scale, beside the product and sum that PyTorch writes."""
    n, t, width = (2, 5, 12) if quick else (n, t, width)
    generator, seed = fresh(device)

    def drawn() -> list[Tensor]:
        kind = DTYPES[dtype]
        return [torch.randn(n, t, width, device=device, generator=generator).to(kind) for _ in range(2)]

    a, g = drawn()
    errors = errors_of(ops.scale_grads(a, g), (a.double() * g.double()).sum(1))
    same = torch.equal(ops.scale_grads(a, g), ops.scale_grads(a, g))
    sets = [(a, g)] + [tuple(drawn()) for _ in range(rotations(2 * a.nbytes, device) - 1)]
    runs = {
        OURS: rotating(ops.scale_grads, sets),
        PLAIN: rotating(lambda a, g: (a * g).sum((0, 1), dtype=torch.float32), sets),
    }
    record = timed(device, runs, quick, n_bytes=2 * a.nbytes + 4 * n * width)
    about = {"relative_error": {"fisher": errors}, "tolerance": 1e-5, "right": errors["norm"] <= 1e-5}
    about |= {"same_bits_twice": same, "seed": seed, "n": n, "t": t, "width": width, "dtype": dtype}
    return judged({**about, **record})


def squares(device: torch.device, quick: bool, n: int, numel: int) -> dict:
    """Check and time the sum of squares of gradients that are in memory already, beside PyTorch's formula."""
    n, numel = (3, 100) if quick else (n, numel)
    generator, seed = fresh(device)

    def drawn() -> Tensor:
        return torch.randn(n, numel, device=device, generator=generator)

    grads = drawn()
    expected = torch.zeros(numel, device=device, dtype=torch.float64)
    for row in grads:
        expected += row.double().square_()
    found = checked(lambda f, _: ops.accumulate_squares_(f, grads), expected, None, 1e-5)
    sets = [(grads,)] + [(drawn(),) for _ in range(rotations(grads.nbytes, device) - 1)]
    total = torch.zeros(numel, device=device)
    runs = {
        OURS: rotating(lambda x: ops.accumulate_squares_(total, x), sets),
        PLAIN: rotating(lambda x: total.add_(x.square().sum(0)), sets),
    }
    record = timed(device, runs, quick, n_bytes=grads.nbytes + 8 * numel)
    return judged({"n": n, "elements": numel, "seed": seed, **found, **record})


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    found = {f"conv {name}, bf16": partial(conv, device, quick, name, "bf16") for name in CONVS}
    found |= {
        "embedding 50257x768, bf16": partial(embedding, device, quick, 50257, "bf16"),
        "embedding 512x768, bf16": partial(embedding, device, quick, 512, "bf16"),
        "embedding 10000x768, fp32": partial(embedding, device, quick, 10000, "fp32"),
        "scale, LayerNorm 768, N=8 T=512, bf16": partial(scale, device, quick, 8, 512, 768, "bf16"),
        "scale, BatchNorm 256, N=64 T=3136, bf16": partial(scale, device, quick, 64, 3136, 256, "bf16"),
        "scale, BatchNorm 2048, N=64 T=49, bf16": partial(scale, device, quick, 64, 49, 2048, "bf16"),
        "squares, N=64, 4 M": partial(squares, device, quick, 64, 1 << 22),
        "squares, N=64, 2048": partial(squares, device, quick, 64, 2048),
    }
    few = list(CONVS)[:1] + list(CONVS)[2:3] + list(CONVS)[4:5] + list(CONVS)[8:9]
    return found | {f"conv {name}, fp32": partial(conv, device, quick, name, "fp32") for name in few}


def table(found: dict) -> str:
    """Return a line for each case: median time, over PyTorch's plain gradient, rate or bandwidth, error."""
    lines = [f"{'other Fisher kernels':40}{'us':>8}{'of plain':>9}{'TFLOP/s':>8}{'of copy':>8}{'host us':>8}  error"]
    for name, r in found.items():
        ours, plain = r["times"][OURS], r["times"][PLAIN]
        rate = f"{r['teraflops_per_second']:.1f}" if "flops" in r else ""
        wrong = "" if r["right"] and r["same_bits_twice"] else " WRONG" if not r["right"] else " BITS DIFFER"
        lines.append(
            f"{name:40}{1e3 * ours['milliseconds']['median']:8.1f}{1 / plain['over_ours']['median']:9.2f}"
            f"{rate:>8}{r['share_of_copy']['median']:8.0%}{ours['host_microseconds']:8.0f}"
            f"  {r['relative_error']['fisher']['norm']:.0e}{wrong}"
        )
    return "\n".join(lines)
