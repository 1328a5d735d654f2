"""What the hardware gives: memory bandwidth, and the rate of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch

from .plumbing.parts import Cases
from .timing import Contender, Spread, interleave, rotating

BYTES = 1 << 33  # that one pass over memory moves
QUICK_BYTES = 1 << 22
SIDE, QUICK_SIDE = 8192, 64
ROUNDS = 30
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions of float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def copy(device: torch.device, n_bytes: int) -> Contender:
    """Return a copy that moves so many bytes, half of them read and half written; of random numbers."""
    source = torch.randn(n_bytes // 8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), alone=True)


def memory(device: torch.device, quick: bool) -> dict:
    """Measure copy, triad and fill over buffers of several gigabytes; bytes read plus bytes written."""
    n_bytes = QUICK_BYTES if quick else BYTES
    a, b = (torch.randn(n_bytes // 12, device=device) for _ in range(2))
    c = torch.empty_like(a)
    contenders = {
        "copy": copy(device, n_bytes),
        "triad": Contender(lambda: torch.add(a, b, alpha=1e-3, out=c), alone=True),
        "triad in place": Contender(lambda: a.add_(b, alpha=1e-9), alone=True),
        "read (sum)": Contender(lambda: a.sum(), alone=True),
    }
    moved = {"copy": n_bytes, "triad": n_bytes, "triad in place": n_bytes, "read (sum)": n_bytes // 3}
    times = interleave(contenders, ROUNDS, 3.0, device)
    return {
        name: {
            "milliseconds": asdict(Spread.of(measured, 1e3)),
            "bytes": moved[name],
            "gigabytes_per_second": moved[name] / Spread.of(measured).median / 1e9,
        }
        for name, measured in times.items()
    }


def product(device: torch.device, quick: bool, precision: str) -> dict:
    """Measure a product of square matrices of random numbers."""
    side, dtype = QUICK_SIDE if quick else SIDE, PRECISIONS[precision]
    with tf32(precision == "tf32"):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = interleave({"product": Contender(lambda: torch.mm(a, b, out=out), alone=True)}, ROUNDS, 3.0, device)[
            "product"
        ]
    spread = Spread.of(times, 1e3)
    rate = 2 * side**3 / spread.median / 1e9
    return {"side": side, "milliseconds": asdict(spread), "teraflops_per_second": rate}


def launches(device: torch.device, quick: bool) -> dict:
    """Measure what the host and the GPU take for an operation on nearly no data."""
    sets = [[torch.ones(16, device=device)] for _ in range(2)]
    contenders = {
        "on the host": Contender(rotating(lambda x: x.add_(1.0), sets)),
        "on the device": Contender(rotating(lambda x: x.add_(1.0), sets), alone=True),
    }
    times = interleave(contenders, ROUNDS, 1.0, device)
    return {name: {"microseconds": asdict(Spread.of(measured, 1e6))} for name, measured in times.items()}


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    products = {f"{name} product": partial(product, device, quick, name) for name in ("bf16", "fp32", "tf32")}
    return {
        "memory": partial(memory, device, quick),
        **products,
        "smallest operation": partial(launches, device, quick),
    }


def table(found: dict) -> str:
    """Return a few lines for people."""
    lines = []
    if "memory" in found:
        parts = [f"{k} {v['gigabytes_per_second']:.0f}" for k, v in found["memory"].items() if isinstance(v, dict)]
        lines.append(f"GB/s: {', '.join(parts)}")
    rates = [f"{k[:4]} {v['teraflops_per_second']:.1f}" for k, v in found.items() if "teraflops_per_second" in v]
    if rates:
        lines.append(f"TFLOP/s of square products: {', '.join(rates)}")
    if small := found.get("smallest operation"):
        host, alone = (small[k]["microseconds"]["median"] for k in ("on the host", "on the device"))
        lines.append(f"an operation on 16 numbers: {host:.2f} us as enqueued, {alone:.2f} us on the device")
    return "\n".join(lines)
