"""Cases of the linear layer's and the convolution's Fisher kernels, and which tiles are tried for them.

The tiles are those that Triton 3.6 compiles for sm_90 without spilling a register; ``tests/test_tiles.py`` checks that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from wplfast.backends import reference
from wplfast.backends.triton.fisher_config import Operands, Tile, generation
from wplfast.backends.triton.fisher_conv import fisher_conv_
from wplfast.backends.triton.fisher_linear import fisher_linear_
from wplfast.backends.triton.fisher_plan import Layer, Plan, n_tiles, plan_for
from wplfast.backends.triton.launch import n_processors

from .contest import DEFAULT, Contest
from .overrides import given
from .tma import fisher_tma_

HALF = (
    Tile(128, 128, 64, 8, 3, 1), Tile(128, 128, 64, 8, 4, 1), Tile(128, 128, 64, 8, 5, 1), Tile(128, 128, 32, 8, 4, 1),
    Tile(128, 128, 32, 8, 6, 1), Tile(128, 128, 128, 8, 3, 1), Tile(128, 128, 16, 8, 4, 1), Tile(128, 128, 16, 8, 8, 1),
    Tile(64, 256, 64, 8, 3, 1), Tile(256, 64, 64, 8, 3, 1), Tile(64, 128, 64, 8, 4, 1), Tile(128, 64, 64, 8, 4, 1),
    Tile(64, 128, 64, 4, 3, 2), Tile(128, 64, 64, 4, 3, 2), Tile(64, 128, 16, 4, 6, 2), Tile(64, 64, 64, 4, 4, 3),
    Tile(64, 64, 16, 4, 8, 4),
)  # fmt: skip
TERMS = (
    Tile(128, 128, 32, 8, 2, 1), Tile(128, 128, 32, 8, 3, 1), Tile(128, 128, 16, 8, 4, 1), Tile(64, 128, 32, 8, 3, 1),
    Tile(128, 64, 32, 8, 3, 1), Tile(64, 128, 32, 4, 3, 2), Tile(64, 64, 32, 4, 3, 3),
)  # fmt: skip
DESCRIPTORS = (
    Tile(128, 128, 64, 8, 3, 1), Tile(128, 128, 64, 8, 4, 1), Tile(128, 128, 64, 8, 5, 1), Tile(128, 128, 128, 8, 3, 1),
    Tile(64, 256, 64, 8, 3, 1), Tile(256, 64, 64, 8, 3, 1), Tile(64, 128, 64, 4, 4, 2), Tile(128, 128, 32, 8, 6, 1),
)  # fmt: skip
FLOAT = (Tile(64, 64, 32, 4, 3, 2),)
#: How float32 operands are multiplied: terms, or what the tensor cores do with float32.
MODES = {
    "bf16x6": Operands(3, torch.bfloat16),
    "bf16x3": Operands(2, torch.bfloat16),
    "tf32x3": Operands(1, torch.float32, "tf32x3"),
}
#: (d_out, d_in, N, T, dtype)
LINEAR = [
    (3072, 768, 8, 512, torch.bfloat16), (768, 3072, 8, 512, torch.bfloat16), (4096, 4096, 8, 512, torch.bfloat16),
    (768, 768, 8, 512, torch.bfloat16), (1024, 1024, 256, 16, torch.bfloat16), (1000, 1000, 64, 35, torch.bfloat16),
    (4000, 1000, 64, 35, torch.bfloat16), (768, 768, 32, 197, torch.bfloat16), (3072, 768, 8, 512, torch.float32),
    (768, 768, 8, 512, torch.float32), (1024, 1024, 256, 16, torch.float32), (1000, 1000, 64, 35, torch.float32),
]  # fmt: skip
#: ResNet-50, 3 x 3: (channels, positions), N = 64.
CONVOLUTIONS = [(64, 56), (128, 28), (256, 14), (512, 7)]
#: Norm of the error of F over its norm: operands are exact in their type, the products are summed in float32.
LIMIT = {torch.bfloat16: 1e-4, torch.float32: 2e-5}


@dataclass(frozen=True)
class Trial:
    """What a candidate is: a plan, and how operands are read and multiplied."""

    plan: Plan
    operands: Operands
    tma: bool = False
    mode: str = ""

    def __str__(self) -> str:
        """Show it in one word."""
        t, plan = self.plan.tile, self.plan
        extra = ("-tma" if self.tma else "") + (f"-{self.mode}" if self.mode else "")
        return f"{t.m}x{t.n}x{t.k}-w{t.warps}-s{t.stages}-{plan.whole}+{plan.splits}{extra}"


def trials(layer: Layer, dtype: torch.dtype, device: torch.device, tma: bool = True) -> Iterator[Trial]:
    """Yield candidates of a layer: every tile as it would be shared, and the default tile shared in other ways."""
    gpu = generation(device), n_processors(device)
    longest = max(16, triton.next_power_of_2(layer.n_steps))
    groups = [("", Operands(1, dtype), HALF, False), ("", Operands(1, dtype), DESCRIPTORS, True)]
    if dtype == torch.float32:
        groups = [(mode, operands, TERMS if operands.terms > 1 else FLOAT, False) for mode, operands in MODES.items()]
    for mode, operands, tiles, descriptors in groups:
        for tile in dict.fromkeys(replace(tile, k=min(tile.k, longest)) for tile in tiles):
            fits = tile.m < 2 * max(64, layer.d_out) and tile.n < 2 * max(64, layer.d_in)
            if not fits or (descriptors and not tma):
                continue
            plan = plan_for(tile, layer, operands, False, gpu)[1]
            yield Trial(plan, operands, descriptors, mode)
            if (tile.m, tile.n) == (128, 128) and tile.k == min(64, longest) and tile.stages == 4:
                count = n_tiles(tile, layer)
                for splits in {2, 3, 4, layer.n_samples} if layer.n_samples <= 8 else {2, 3, 4, 8}:
                    yield Trial(Plan(tile, 0, splits), operands, descriptors, mode)
                if plan.whole != count and layer.in_place:
                    yield Trial(Plan(tile, count, 1), operands, descriptors, mode)


def linear(d_out: int, d_in: int, n: int, t: int, dtype: torch.dtype, device: torch.device) -> Contest:
    """Return the case of a linear layer, beside the plain product of all steps."""
    g, a = (torch.randn(n, t, width, device=device).to(dtype) for width in (d_out, d_in))
    result = torch.zeros(d_out, d_in, device=device)

    def way(trial: Trial) -> Callable[[], None]:
        def run() -> None:
            with given(choose_plan=trial.plan, choose_operands=trial.operands):
                (fisher_tma_ if trial.tma else fisher_linear_)(result, a, g, None, None)

        return run

    ways: dict[str, Callable[[], object]] = {DEFAULT: lambda: fisher_linear_(result, a, g, None, None)}
    found = trials(Layer(d_out, d_in, n, t, in_place=d_in % 8 == 0), dtype, device)
    ways |= {str(trial): way(trial) for trial in found}
    flat_g, flat_a = g.view(n * t, d_out), a.view(n * t, d_in)
    plain = torch.empty(d_out, d_in, dtype=dtype, device=device)
    name = f"linear {d_out}x{d_in}, N={n}, T={t}, {str(dtype).removeprefix('torch.')}"
    return Contest(
        name, result, ways, lambda: _fisher(g, a), LIMIT[dtype],
        ("plain product", lambda: torch.mm(flat_g.T, flat_a, out=plain)),
    )  # fmt: skip


def _fisher(g: Tensor, a: Tensor) -> Tensor:
    """Return sum_n (G_n^T A_n)^2 in float64, a few samples at a time."""
    total = torch.zeros(g.shape[2], a.shape[2], dtype=torch.float64, device=g.device)
    for start in range(0, len(g), 8):
        products = torch.bmm(g[start : start + 8].double().mT, a[start : start + 8].double())
        total += products.square_().sum(0)
    return total


def convolution(channels: int, side: int, n: int, device: torch.device) -> Contest:
    """Return the case of a 3 x 3 convolution in bfloat16, beside its ordinary weight gradient."""
    g, x = (torch.randn(n, 1, side, side, channels, device=device).bfloat16() for _ in range(2))
    result = torch.zeros(channels, channels, 3, 3, device=device)
    geometry = ([1, 1], [1, 1], [1, 1], 1)

    def way(plan: Plan) -> Callable[[], None]:
        def run() -> None:
            with given(choose_plan=plan):
                fisher_conv_(result, x, g, None, None, *geometry)

        return run

    ways: dict[str, Callable[[], object]] = {DEFAULT: lambda: fisher_conv_(result, x, g, None, None, *geometry)}
    layer = Layer(channels, channels, n, side * side, blocks=9, plane=result.nbytes)
    ways |= {str(trial): way(trial.plan) for trial in trials(layer, torch.bfloat16, device, tma=False)}
    images, gradients = (y[:, 0].permute(0, 3, 1, 2) for y in (x, g))  # channels last

    def expected() -> Tensor:
        start = torch.zeros(result.shape, dtype=torch.float64, device=device)
        reference.fisher_conv_(start, x.double(), g.double(), None, None, *geometry)
        return start

    def plain() -> Tensor:
        return torch.nn.grad.conv2d_weight(images, result.shape, gradients, padding=1)

    name = f"conv 3x3 {channels} to {channels}, {side}x{side}, N={n}, bfloat16"
    return Contest(name, result, ways, expected, LIMIT[torch.bfloat16], ("weight gradient", plain))
