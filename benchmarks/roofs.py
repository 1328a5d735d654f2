"""What the hardware gives: memory bandwidth, the rate of matrix products, and the cost of a smallest operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from .timing import Budget, Contender, quartiles, rotating

BYTES, QUICK_BYTES = 1 << 33, 1 << 22  # that one pass over memory moves
SIDE, QUICK_SIDE = 8192, 64
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions of float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def copy(n_bytes: int, device: torch.device) -> Contender:
    """Return a copy that moves so many bytes, half of them read and half written; of random numbers."""
    source = torch.randn(n_bytes // 8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), alone=True)


def triad(n_bytes: int, device: torch.device) -> Contender:
    """Return ``c = a + s b`` over arrays of so many bytes in all.

    Counted are bytes read plus bytes written. A processor that reads a cache line before it writes it moves a third
    more for the triad and half as much again for the copy, and no more for the triad in place.
    """
    a, b = torch.randn(2, n_bytes // 12, device=device).unbind()
    c = torch.empty_like(a)
    return Contender(lambda: torch.add(a, b, alpha=1e-3, out=c), alone=True)


def triad_in_place(n_bytes: int, device: torch.device) -> Contender:
    """Return ``a = a + s b`` over arrays that move so many bytes in all: a is read and written."""
    a, b = torch.randn(2, n_bytes // 12, device=device).unbind()
    return Contender(lambda: a.add_(b, alpha=1e-9), alone=True)


ROOFS: Mapping[str, Callable[[int, torch.device], Contender]] = {
    "triad": triad,
    "triad in place": triad_in_place,
    "copy": copy,
}


def memory(budget: Budget) -> dict:
    """Measure copy, triad and sum over buffers of several gigabytes; bytes read plus bytes written."""
    n_bytes = QUICK_BYTES if budget.quick else BYTES
    numbers = torch.randn(n_bytes // 4, device=budget.device)
    contenders = {name: make(n_bytes, budget.device) for name, make in ROOFS.items()}
    contenders["read (sum)"] = Contender(lambda: numbers.sum(), alone=True)
    found = {name: quartiles(taken, 1e3) for name, taken in budget.time(contenders).items()}
    return {
        name: {"milliseconds": ms, "bytes": n_bytes, "gigabytes_per_second": n_bytes / ms["median"] / 1e6}
        for name, ms in found.items()
    }


def product(budget: Budget, precision: str) -> dict:
    """Measure a product of square matrices of random numbers."""
    side, dtype = QUICK_SIDE if budget.quick else SIDE, PRECISIONS[precision]
    a, b = (torch.randn(side, side, device=budget.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32(precision == "tf32"):
        times = budget.time({"product": Contender(lambda: torch.mm(a, b, out=out), alone=True)})["product"]
    spread = quartiles(times, 1e3)
    return {"side": side, "milliseconds": spread, "teraflops_per_second": 2 * side**3 / spread["median"] / 1e9}


def smallest(budget: Budget) -> dict:
    """Measure what the host and the GPU take for an operation on 16 numbers."""
    sets = [[torch.ones(16, device=budget.device)] for _ in range(2)]
    contenders = {
        "on the host": Contender(rotating(lambda x: x.add_(1.0), sets)),
        "on the device": Contender(rotating(lambda x: x.add_(1.0), sets), alone=True),
    }
    return {name: {"microseconds": quartiles(taken, 1e6)} for name, taken in budget.time(contenders).items()}


def cases(device: torch.device, quick: bool) -> dict[str, Callable[[], dict]]:
    """Return what is measured of a GPU."""
    budget = Budget(device, 30, 3.0, quick)
    products = {f"{name} product": partial(product, budget, name) for name in PRECISIONS}
    return {"memory": partial(memory, budget), **products, "smallest operation": partial(smallest, budget)}
