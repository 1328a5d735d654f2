"""``fisher_linear_`` beside cuBLAS's plain product ``G^T A`` of the same operands, which sums samples unsquared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wplfast import ops

from .plumbing.kernel_case import OURS, checked, fresh, judged, timed
from .plumbing.parts import Cases
from .roofs import tf32
from .timing import rotating, rotations

PLAIN = "plain product"
#: Largest error relative to the norm: products of half types are exact in float32, and summed in it.
TOLERANCE = {"bf16x6": 1e-5, "bf16x3": 1e-4, "tf32": 2e-3, "ieee": 1e-5, "half": 5e-5}
MODE = "WPLFAST_TRITON_FP32"
MATERIALISED = 8 << 30  # bytes of per-sample gradients up to which the materialised way takes part
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """A linear layer [D_out, D_in] over N samples of T rows; ``target`` is a share of the plain product's rate."""

    name: str
    n: int
    t: int
    d_out: int
    d_in: int
    target: float | None = None

    @property
    def flops(self) -> int:
        """Of one plain product."""
        return 2 * self.n * self.t * self.d_out * self.d_in

    def least_bytes(self, itemsize: int, gradient: bool) -> int:
        """Return what must move: both operands read, the Fisher read and written, a gradient likewise."""
        return self.n * self.t * (self.d_out + self.d_in) * itemsize + (8 + 8 * gradient) * self.d_out * self.d_in


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("3072x768", 8, 512, 3072, 768, 0.65),
        Layer("768x3072", 8, 512, 768, 3072, 0.65),
        Layer("4096x4096", 8, 512, 4096, 4096, 0.65),
        Layer("768x768", 8, 512, 768, 768, 0.4),
        Layer("50257x768", 8, 512, 50257, 768),
        Layer("ViT 768x768", 32, 197, 768, 768),
        Layer("1024x1024 T=16", 256, 16, 1024, 1024),
        Layer("RNN 1000x1000 T=35", 64, 35, 1000, 1000),
        Layer("RNN 10000x1000 T=35", 64, 35, 10000, 1000),
        Layer("MLP 1024x1024 T=1", 256, 1, 1024, 1024),
        Layer("MLP 4096x4096 T=1", 256, 1, 4096, 4096),
        Layer("MLP 1024x784 T=1", 256, 1, 1024, 784),
    )
}
QUICK = Layer("tiny", 3, 17, 24, 40, 0.5)


@contextmanager
def fp32_mode(mode: str | None) -> Iterator[None]:
    """Choose how float32 operands are multiplied."""
    before = os.environ.pop(MODE, None)
    try:
        if mode is not None:
            os.environ[MODE] = mode
        yield
    finally:
        os.environ.pop(MODE, None)
        if before is not None:
            os.environ[MODE] = before


def exact(g: Tensor, a: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return Fisher and gradient in float64, sample by sample."""
    fisher, gradient = (g.new_zeros(g.shape[2], a.shape[2], dtype=torch.float64) for _ in range(2))
    for n in range(len(g)):
        product = g[n].double().t() @ a[n].double()
        w = 1.0 if weights is None else weights[n].double()
        gradient += w * product
        fisher += w * product.square_()
    return fisher, gradient


def case(device: torch.device, quick: bool, layer: Layer, dtype: str, mode: str | None, extras: str) -> dict:
    """Check and time one layer; ``extras`` names what it gets: "", "weights", "gradient" or both."""
    if quick:
        layer = QUICK if layer.t > 1 else Layer("tiny", 5, 1, 24, 40)
    generator, seed = fresh(device)
    kind = DTYPES[dtype]

    def drawn(width: int) -> Tensor:
        return torch.randn(layer.n, layer.t, width, device=device, generator=generator).to(kind)

    g, a = drawn(layer.d_out), drawn(layer.d_in)
    weights = torch.rand(layer.n, device=device, generator=generator) if "weights" in extras else None
    with_gradient = "gradient" in extras
    fisher, gradient = exact(g, a, weights)
    precision = "half" if dtype != "fp32" else (mode or "bf16x6")
    with fp32_mode(mode), tf32(False):
        found = checked(
            lambda f, d: ops.fisher_linear_(f, a, g, weights, d),
            fisher,
            gradient if with_gradient else None,
            TOLERANCE[precision],
        )
        del fisher, gradient
        record = _time(device, quick, layer, (g, a), weights, with_gradient, drawn)
    about = {"n": layer.n, "t": layer.t, "d_out": layer.d_out, "d_in": layer.d_in, "dtype": dtype, "fp32_mode": mode}
    target = layer.target if dtype == "bf16" and not extras else None  # the contract's rows
    shares = {"share_of_plain": record["times"][PLAIN]["over_ours"], "target": target}
    return judged({**about, "extras": extras, "seed": seed, **found, **record, **shares})


def _time(
    device: torch.device,
    quick: bool,
    layer: Layer,
    first: tuple[Tensor, Tensor],
    weights: Tensor | None,
    with_gradient: bool,
    drawn: Callable[[int], Tensor],
) -> dict:
    """Time ours, the plain product, and where they fit per-sample gradients in memory, on inputs in turn."""
    itemsize = first[0].itemsize
    sets = [first]
    for _ in range(rotations(sum(x.nbytes for x in first), device) - 1):
        sets.append((drawn(layer.d_out), drawn(layer.d_in)))
    fisher = torch.zeros(layer.d_out, layer.d_in, device=device)
    gradient = torch.zeros_like(fisher) if with_gradient else None
    out = first[0].new_empty(layer.d_out, layer.d_in)

    def plain(g: Tensor, a: Tensor) -> None:
        torch.mm(g.flatten(0, 1).t(), a.flatten(0, 1), out=out)

    def materialised(g: Tensor, a: Tensor) -> None:
        fisher.add_(torch.bmm(g.transpose(1, 2), a).float().square_().sum(0))

    runs = {
        OURS: rotating(lambda g, a: ops.fisher_linear_(fisher, a, g, weights, gradient), sets),
        PLAIN: rotating(plain, sets),
    }
    if layer.n * layer.d_out * layer.d_in * (itemsize + 4) <= MATERIALISED and weights is None and not with_gradient:
        runs["materialised"] = rotating(materialised, sets)
    return timed(device, runs, quick, flops=layer.flops, n_bytes=layer.least_bytes(itemsize, with_gradient))


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured, the contract's rows first."""
    rows: list[tuple[str, str, str | None, str]] = [(name, "bf16", None, "") for name in list(LAYERS)[:4]]
    rows += [(name, "fp32", None, "") for name in ("3072x768", "768x768")]
    rows += [(name, "bf16", None, "") for name in list(LAYERS)[4:]]
    rows += [("3072x768", "bf16", None, extras) for extras in ("weights", "gradient", "weights, gradient")]
    rows += [("3072x768", "fp16", None, ""), ("4096x4096", "fp32", None, "")]
    rows += [("3072x768", "fp32", mode, "") for mode in ("bf16x3", "tf32", "ieee")]
    rows += [("MLP 1024x1024 T=1", "fp32", None, ""), ("RNN 1000x1000 T=35", "fp32", None, "")]
    return {
        ", ".join(filter(None, (name, dtype, mode, extras))): partial(
            case, device, quick, LAYERS[name], dtype, mode, extras
        )
        for name, dtype, mode, extras in rows
    }


def table(found: dict) -> str:
    """Return a line for each case: median time, rate, share of the plain product, error."""
    lines = [f"{'fisher_linear_':38}{'us':>8}{'TFLOP/s':>9}{'of mm':>7}{'goal':>6}{'of copy':>8}{'host us':>8}  error"]
    for name, r in found.items():
        ours = r["times"][OURS]
        goal = f"{r['target']:.0%}" if r["target"] else ""
        wrong = "" if r["right"] and r["same_bits_twice"] else " WRONG" if not r["right"] else " BITS DIFFER"
        lines.append(
            f"{name:38}{1e3 * ours['milliseconds']['median']:8.1f}{r['teraflops_per_second']:9.1f}"
            f"{r['share_of_plain']['median']:7.0%}{goal:>6}{r['share_of_copy']['median']:8.0%}"
            f"{ours['host_microseconds']:8.0f}  {r['relative_error']['fisher']['norm']:.0e}{wrong}"
        )
    return "\n".join(lines)
