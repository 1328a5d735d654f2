"""Each Fisher kernel beside what PyTorch runs for the plain gradient of that operation, and beside a copy.

Linear layers are set beside cuBLAS's plain product ``G^T A``, convolutions beside cuDNN's gradient of the weight. A
kernel is checked against float64, sample by sample, and for equal bits in two runs, then timed on the device alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from wplfast import ops

from .plumbing.parts import Cases, WrongCaseError
from .roofs import copy, tf32
from .timing import Budget, Contender, quartiles, ratio, rotating, rotations

OURS, PLAIN = "wplfast", "plain gradient"
COPIED, QUICK_COPIED = 1 << 30, 1 << 16  # bytes that the copy moves
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Largest error relative to the norm: products of half types are exact in float32, and summed in it.
TOLERANCE = {"bf16x6": 1e-5, "bf16x3": 1e-4, "tf32": 2e-3, "ieee": 1e-5, "half": 5e-5}
MODE, DEFAULT_MODE = "WPLFAST_TRITON_FP32", "bf16x6"  # how float32 operands are multiplied
ROUNDS, SECONDS = 25, 0.8
MATERIALISED = 8 << 30  # bytes of per-sample gradients up to which the way that makes them takes part

Operands = tuple[Tensor, ...]


@dataclass
class Kernel:
    """One operator on operands of one shape, and what it is compared with.

    Args:
        about: sizes, for the record.
        draw: makes operands.
        exact: what the operator adds to each accumulator, in float64, from operands.
        ours: ``ours(accumulators, *operands)`` adds that to accumulators, or returns what is to be added to the first.
        plain: what PyTorch runs for the plain gradient, from operands.
        n_bytes: that a call must move at least.
        flops: of one call.
        tolerance: largest error relative to the norm.
        others: further contenders with the arguments of ours, unchecked.
        variants: other ways of ours, which are checked, and left out where they are wrong or fail.
        mode: how float32 operands are multiplied.
    """

    about: dict[str, Any]
    draw: Callable[[], Operands]
    exact: Callable[..., Sequence[Tensor]]
    ours: Callable[..., object]
    plain: Callable[..., object]
    n_bytes: float
    flops: float | None = None
    tolerance: float = 1e-5
    others: dict[str, Callable[..., object]] = field(default_factory=dict)
    variants: dict[str, Callable[..., object]] = field(default_factory=dict)
    mode: str = DEFAULT_MODE


def fresh(device: torch.device) -> tuple[torch.Generator, int]:
    """Return a generator on a device with a seed that no run before had, and the seed."""
    seed = int.from_bytes(os.urandom(4), "little")
    return torch.Generator(device).manual_seed(seed), seed


def check(kernel: Kernel, run: Callable[..., object], operands: Operands) -> dict[str, Any]:
    """Run what adds to accumulators twice; return its errors and whether both runs gave the same bits."""
    expected = kernel.exact(*operands)
    runs = []
    for _ in range(2):
        accumulators = [torch.ones_like(e, dtype=torch.float32) for e in expected]  # what is there is added to
        made = run(accumulators, *operands)
        if isinstance(made, Tensor):
            accumulators[0] += made
        runs.append(accumulators)
    errors = {}
    for name, found, exact in zip(("fisher", "gradient"), runs[0], expected, strict=False):
        errors[name] = ((found.double() - exact - 1).norm() / (exact + 1).norm()).nan_to_num(torch.inf).item()
    right, same = all(error <= kernel.tolerance for error in errors.values()), all(map(torch.equal, *runs))
    return {"relative_error": errors, "tolerance": kernel.tolerance, "right": right, "same_bits_twice": same}


def measure(make: Callable[[torch.Generator], Kernel], device: torch.device, quick: bool) -> dict[str, Any]:
    """Check a kernel and time it on inputs in turn, interleaved with the plain gradient and a copy.

    Raises:
        WrongCaseError: if it is wrong; the record goes with it.
    """
    generator, seed = fresh(device)
    kernel = make(generator)
    with mock.patch.dict(os.environ), tf32(False):
        os.environ |= {MODE: kernel.mode}
        operands = kernel.draw()
        record = {**kernel.about, "seed": seed, **check(kernel, kernel.ours, operands), "left_out": {}}
        runs = {OURS: kernel.ours, PLAIN: lambda _, *operands: kernel.plain(*operands), **kernel.others}
        for name, variant in kernel.variants.items():
            try:
                found = check(kernel, variant, operands)
                if found["right"] and found["same_bits_twice"]:
                    runs[name] = variant
                else:
                    record["left_out"][name] = f"wrong: {found}"
            except Exception as error:  # of the compiler or of a launch
                record["left_out"][name] = f"{type(error).__name__}: {error}"[:200]
        accumulators = [torch.zeros_like(e, dtype=torch.float32) for e in kernel.exact(*operands)]
        n_sets = rotations(sum(x.nbytes for x in operands), device)
        sets = [operands, *(kernel.draw() for _ in range(n_sets - 1))]
        contenders = {
            name: Contender(rotating(partial(run, accumulators), sets), alone=True) for name, run in runs.items()
        }
        copied = QUICK_COPIED if quick else COPIED
        contenders["copy"] = copy(copied, device)
        seconds = SECONDS * (1 + len(kernel.variants))
        times = Budget(device, 3 if quick else ROUNDS, 0.0 if quick else seconds).time(contenders)
    record |= {"rounds": len(times[OURS]), "bytes": kernel.n_bytes}
    record["share_of_copy"] = ratio(times["copy"], times[OURS], kernel.n_bytes / copied)
    if kernel.flops is not None:
        record["teraflops_per_second"] = kernel.flops / quartiles(times[OURS])["median"] / 1e12
    record["times"] = {
        name: {
            "milliseconds": quartiles(taken, 1e3),
            "host_microseconds": 1e6 * contenders[name].host,
            "share_of_plain": ratio(times[PLAIN], taken),
            "gain": ratio(times[OURS], taken),
        }
        for name, taken in times.items()
    }
    if not record["right"]:
        raise WrongCaseError(f"relative error {record['relative_error']}, tolerance {record['tolerance']}", record)
    return record


@dataclass(frozen=True)
class Layer:
    """A linear layer [D_out, D_in] over N samples of T rows; ``target`` is a share of the plain product's rate."""

    n: int
    t: int
    d_out: int
    d_in: int
    target: float | None = None


LAYERS = {
    "3072x768": Layer(8, 512, 3072, 768, 0.65),
    "768x3072": Layer(8, 512, 768, 3072, 0.65),
    "4096x4096": Layer(8, 512, 4096, 4096, 0.65),
    "768x768": Layer(8, 512, 768, 768, 0.4),
    "50257x768": Layer(8, 512, 50257, 768),
    "ViT 768x768": Layer(32, 197, 768, 768),
    "1024x1024 T=16": Layer(256, 16, 1024, 1024),
    "RNN 1000x1000 T=35": Layer(64, 35, 1000, 1000),
    "RNN 10000x1000 T=35": Layer(64, 35, 10000, 1000),
    "MLP 1024x1024 T=1": Layer(256, 1, 1024, 1024),
    "MLP 4096x4096 T=1": Layer(256, 1, 4096, 4096),
    "MLP 1024x784 T=1": Layer(256, 1, 1024, 784),
}
QUICK, QUICK_ROW = Layer(3, 17, 24, 40, 0.5), Layer(5, 1, 24, 40)


def linear(generator: torch.Generator, layer: Layer, dtype: str, mode: str = DEFAULT_MODE, extras: str = "") -> Kernel:
    """Return ``fisher_linear_`` with what ``extras`` names: "", "weights", "gradient" or both."""
    device, kind, with_gradient = generator.device, DTYPES[dtype], "gradient" in extras
    weights = torch.rand(layer.n, device=device, generator=generator) if "weights" in extras else None
    out = torch.empty(layer.d_out, layer.d_in, device=device, dtype=kind)

    def draw() -> Operands:
        widths = (layer.d_out, layer.d_in)
        return tuple(torch.randn(layer.n, layer.t, w, device=device, generator=generator).to(kind) for w in widths)

    def exact(g: Tensor, a: Tensor) -> list[Tensor]:
        fisher, gradient = torch.zeros(2, layer.d_out, layer.d_in, device=device, dtype=torch.float64).unbind()
        for n in range(layer.n):
            product, w = g[n].double().t() @ a[n].double(), 1.0 if weights is None else weights[n].double()
            gradient += w * product
            fisher += w * product.square_()
        return [fisher, gradient][: 1 + with_gradient]

    def ours(accumulators: Sequence[Tensor], g: Tensor, a: Tensor) -> None:
        ops.fisher_linear_(accumulators[0], a, g, weights, accumulators[1] if with_gradient else None)

    def plain(g: Tensor, a: Tensor) -> None:
        torch.mm(g.flatten(0, 1).t(), a.flatten(0, 1), out=out)

    def materialised(accumulators: Sequence[Tensor], g: Tensor, a: Tensor) -> None:
        accumulators[0].add_(torch.bmm(g.transpose(1, 2), a).float().square_().sum(0))

    fits = layer.n * out.numel() * (kind.itemsize + 4) <= MATERIALISED and not extras
    return Kernel(
        vars(layer) | {"dtype": dtype, "fp32_mode": mode, "extras": extras}
        | {"target": layer.target if dtype == "bf16" and not extras else None},  # the contract's rows
        draw, exact, ours, plain,
        layer.n * layer.t * (layer.d_out + layer.d_in) * kind.itemsize + (8 + 8 * with_gradient) * out.numel(),
        2 * layer.n * layer.t * out.numel(),
        TOLERANCE["half" if dtype != "fp32" else mode],
        {"materialised": materialised} if fits else {}, mode=mode,
    )  # fmt: skip


def linear_cases(device: torch.device, quick: bool) -> Cases:
    """Return linear layers, the contract's rows first."""
    rows = [(name, "bf16") for name in list(LAYERS)[:4]] + [(name, "fp32") for name in ("3072x768", "768x768")]
    rows += [(name, "bf16") for name in list(LAYERS)[4:]]
    made = {f"{name}, {dtype}": (name, {"dtype": dtype}) for name, dtype in rows}
    for extras in ("weights", "gradient", "weights, gradient"):
        made[f"3072x768, bf16, {extras}"] = ("3072x768", {"dtype": "bf16", "extras": extras})
    rows = [("3072x768", "fp16"), ("4096x4096", "fp32"), ("MLP 1024x1024 T=1", "fp32"), ("RNN 1000x1000 T=35", "fp32")]
    made |= {f"{name}, {dtype}": (name, {"dtype": dtype}) for name, dtype in rows}
    for mode in ("bf16x3", "tf32", "ieee"):
        made[f"3072x768, fp32, {mode}"] = ("3072x768", {"dtype": "fp32", "mode": mode})
    found = {}
    for shown, (name, options) in made.items():
        layer = LAYERS[name] if not quick else QUICK if LAYERS[name].t > 1 else QUICK_ROW
        found[shown] = partial(measure, partial(linear, layer=layer, **options), device, quick)
    return found
