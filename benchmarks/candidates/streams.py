"""Cases of the kernels that wait for memory: penalty, embedding, scale; work and warps of a program."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product

import torch
from torch import Tensor

from wplfast.backends.triton import fisher_embedding, penalty_launch, scale
from wplfast.backends.triton.prepared import TritonPenalty

from .contest import DEFAULT, Contest
from .overrides import constants

#: Elements of a block and warps of the penalty's programs, and blocks that a program walks through.
BLOCKS = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))
WALKS = (1, 4, 8, 32)
#: Parameters from which on a program walks through more than one: their tables are long.
LONG = 10**8
#: Bytes a parameter that the penalty reads and writes when it adds to gradients.
PENALTY_BYTES = 20


def _with(change: Callable[[], AbstractContextManager[None]], run: Callable[[], object]) -> Callable[[], None]:
    """Return ``run`` under a change of constants."""

    def changed() -> None:
        with change():
            run()

    return changed


def _copy(n_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a copy that reads and writes so many bytes in all."""
    source, target = torch.zeros(2, max(1, n_bytes // 8), device=device).unbind()
    return lambda: target.copy_(source)


def penalty(numel: int, device: torch.device) -> Contest:
    """Return the case of ``add_grad_`` on one tensor, beside a copy of as many bytes."""
    theta = torch.nn.Parameter(torch.randn(numel, device=device))
    theta_hat, fisher = torch.randn(numel, device=device), torch.rand(numel, device=device)
    theta.grad = torch.zeros(numel, device=device)
    one, nothing = (
        torch.ones((), dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )

    def way(block: int, warps: int, walk: int) -> Callable[[], None]:
        def change() -> AbstractContextManager[None]:
            return constants(penalty_launch, BLOCK=block, WARPS=warps, FEW_BLOCKS=walk, MANY_BLOCKS=walk)

        found: list[TritonPenalty] = []  # made where it first runs, so that one that cannot be is left out

        def run() -> None:
            if not found:
                found.append(TritonPenalty([theta], [theta_hat], [], [fisher], one, nothing, one))
            found[0].add_grad_(one)

        return _with(change, run)

    walks = WALKS if numel < LONG else WALKS[1:]
    default = TritonPenalty([theta], [theta_hat], [], [fisher], one, nothing, one)
    ways: dict[str, Callable[[], object]] = {DEFAULT: lambda: default.add_grad_(one)}
    ways |= {f"block {b} w{w}, {walk} a program": way(b, w, walk) for (b, w), walk in product(BLOCKS, walks)}

    def expected() -> Tensor:
        return fisher.double() * (theta.detach().double() - theta_hat.double())

    n_bytes = PENALTY_BYTES * numel
    return Contest(
        f"penalty, {numel:,} parameters", theta.grad, ways, expected, 1e-6, ("copy", _copy(n_bytes, device)),
        threads=False,
    )  # fmt: skip


def embedding(rows: int, width: int, n: int, t: int, device: torch.device) -> Contest:
    """Return the case of an embedding, beside a copy of its gradients."""
    indices = torch.randint(rows, (n, t), device=device)
    g = torch.randn(n, t, width, device=device).bfloat16()
    result = torch.zeros(rows, width, device=device)

    def run() -> None:
        fisher_embedding.fisher_embedding_(result, indices, g, None, None)

    ways: dict[str, Callable[[], object]] = {DEFAULT: run}
    for block, span, warps in product((128, 256, 512, 1024), (16, 32, 64), (2, 4)):
        change = {"BLOCK": block, "SPAN": span, "WARPS": warps}
        ways[f"block {block}, span {span}, w{warps}"] = _with(
            lambda change=change: constants(fisher_embedding, **change), run
        )

    def expected() -> Tensor:
        total = torch.zeros(rows, width, dtype=torch.float64, device=device)
        for sample in range(n):
            one = torch.zeros_like(total).index_add_(0, indices[sample], g[sample].double())
            total += one.square_()
        return total

    copied = _copy(2 * g.nbytes, device)
    return Contest(
        f"embedding {rows}x{width}, N={n}, T={t}", result, ways, expected, 1e-5, ("copy", copied), threads=False
    )


def scaled(width: int, n: int, t: int, device: torch.device) -> Contest:
    """Return the case of a norm's scale, beside a copy of as many bytes as it reads."""
    a, g = torch.randn(2, n, t, width, device=device).bfloat16().unbind()
    result = torch.zeros(n, width, device=device)

    def run() -> None:
        result.add_(scale.scale_grads(a, g))

    ways: dict[str, Callable[[], object]] = {DEFAULT: run}
    for tile, warps, steps in product((1024, 2048, 4096), (4, 8), (32, 64, 128)):
        change = {"TILE": tile, "WARPS": warps, "MIN_STEPS": steps}
        ways[f"tile {tile}, w{warps}, {steps} steps"] = _with(lambda change=change: constants(scale, **change), run)

    def expected() -> Tensor:
        return (a.double() * g.double()).sum(1)

    return Contest(
        f"scale {width}, N={n}, T={t}", result, ways, expected, 1e-5, ("copy", _copy(2 * a.nbytes, device)),
        threads=False,
    )  # fmt: skip
