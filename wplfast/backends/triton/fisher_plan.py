"""Which tile a layer takes, which tiles have a program of their own, and how many programs share the samples of others.

The plan is the one whose busiest multiprocessor has least to do. Work is counted, not measured: bytes that a step of
one sample reads from the L2 cache, products of the tensor cores in what they take of the same time, waves of programs
that do not fill the device, and the bytes of partial results. With 144 tiles for 132 multiprocessors, for example, 132
are whole and the samples of the other 12 are shared out, where splitting all of them fills the device no better.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from .fisher_config import MAX_PARTIALS, Operands, Tile, generation, smaller, tiles_of
from .kernel import KernelError, TooLargeError
from .launch import n_processors

logger = logging.getLogger(__name__)

#: Multiply-adds of half types that tensor cores do while a multiprocessor reads one byte from the L2 cache, about:
#: the peak rates of A100, H100 and B200 over what their L2 caches deliver (20 to 30 bytes a cycle).
_PRODUCTS_PER_BYTE = {8: 40, 9: 70, 10: 140}
#: A smaller tile must promise more than this: it has more of the overhead that is not counted.
_CLOSE = 1.1
#: Products of terms that stand for one product.
_PAIRS = {1: 1, 2: 3, 3: 6}

#: (kernel, device, operands, whether there is a plain gradient) -> tiles that did not fit.
_UNFIT: dict[tuple[str, torch.device, Operands, bool], frozenset[Tile]] = {}


@dataclass(frozen=True)
class Layer:
    """What a launch computes: ``blocks`` matrices [d_out, d_in], each from n_samples products over n_steps.

    Args:
        d_out: rows of a matrix.
        d_in: columns of a matrix.
        n_samples: products that are squared.
        n_steps: terms of a product.
        blocks: taps and groups of a convolution.
        in_place: whether tiles that are not shared are added to the result without partials.
        plane: bytes of one split of all partials where all tiles are shared alike; None where tiles are on their own.
    """

    d_out: int
    d_in: int
    n_samples: int
    n_steps: int
    blocks: int = 1
    in_place: bool = True
    plane: int | None = None


@dataclass(frozen=True)
class Plan:
    """The first ``whole`` tiles have a program each; ``splits`` programs share the samples of each of the others."""

    tile: Tile
    whole: int
    splits: int


def n_tiles(tile: Tile, layer: Layer) -> int:
    """Return how many tiles cover a layer."""
    return int(layer.blocks * triton.cdiv(layer.d_out, tile.m) * triton.cdiv(layer.d_in, tile.n))


def _shares(tile: Tile, layer: Layer, processors: int) -> Iterator[tuple[int, int]]:
    """Yield possible numbers of whole tiles and of splits of the others."""
    tiles, slots = n_tiles(tile, layer), processors * tile.resident
    wholes = {0} if layer.plane is not None or not layer.in_place else {tiles, tiles - tiles % slots, 0}
    for whole in sorted(wholes, reverse=True):
        shared = layer.plane or 4 * tile.m * tile.n * (tiles - whole)
        if shared == 0:
            yield whole, 1
            continue
        most = min(layer.n_samples, triton.cdiv(3 * slots, tiles - whole), MAX_PARTIALS // shared)
        for splits in range(1, max(1, most) + 1):
            yield whole, splits


def cost(
    tile: Tile, layer: Layer, operands: Operands, gradient: bool, whole: int, splits: int, gpu: tuple[int, int]
) -> float:
    """Return what the busiest multiprocessor of ``gpu`` (generation, processors) has to do, in bytes from L2."""
    kind, processors = gpu
    slots, rest = processors * tile.resident, n_tiles(tile, layer) - whole
    steps = tile.k * triton.cdiv(layer.n_steps, tile.k)  # those beyond n_steps are multiplied but not read
    width = min(tile.m, layer.d_out) + min(tile.n, layer.d_in)
    read = layer.n_steps * operands.terms * operands.dtype.itemsize * width
    multiplied = steps * _PAIRS[operands.terms] * tile.m * tile.n / _PRODUCTS_PER_BYTE[kind]
    samples = triton.cdiv(whole, slots) * layer.n_samples
    samples += triton.cdiv(rest * splits, slots) * triton.cdiv(layer.n_samples, splits)
    results = rest * splits * 2 * 4 * tile.m * tile.n * (1 + gradient) / processors  # written, and read to be added up
    return float(samples * tile.resident * max(read, multiplied) + results)


def plan_for(tile: Tile, layer: Layer, operands: Operands, gradient: bool, gpu: tuple[int, int]) -> tuple[float, Plan]:
    """Return the cost and the plan of the best way to share tiles: of equal ones most whole tiles, fewest splits."""
    plans = (Plan(tile, whole, splits) for whole, splits in _shares(tile, layer, gpu[1]))
    costs = ((cost(tile, layer, operands, gradient, plan.whole, plan.splits, gpu), plan) for plan in plans)
    return min(costs, key=lambda found: found[0])


@lru_cache(maxsize=1024)
def choose_plan(
    device: torch.device, operands: Operands, layer: Layer, gradient: bool, unfit: frozenset[Tile] = frozenset()
) -> Plan:
    """Return the plan with the least cost, of the first tile that comes close to it.

    Smaller tiles stand in for ``unfit`` ones.

    Raises:
        KernelError: if there is none that could.
    """
    gpu = generation(device), n_processors(device)
    standing = (_standing_in(tile, unfit) for tile in tiles_of(gpu[0], operands, layer.n_steps, gradient))
    tiles = tuple(tile for tile in standing if tile is not None)
    if not tiles:
        raise KernelError("the Fisher's kernel", RuntimeError(f"no tile for {operands} fits {device}"))
    # What a tile has beyond the layer is multiplied for nothing: a smaller one takes its place if there is one.
    fitting = [t for t in tiles if t.m < 2 * max(64, layer.d_out) and t.n < 2 * max(64, layer.d_in)] or tiles
    best = [plan_for(tile, layer, operands, gradient, gpu) for tile in fitting]
    least = min(cost for cost, _ in best)
    return next(plan for cost, plan in best if cost <= _CLOSE * least)


def _standing_in(tile: Tile | None, unfit: frozenset[Tile]) -> Tile | None:
    """Return a tile, or the first smaller one that is not known not to fit."""
    while tile in unfit:
        tile = smaller(tile)
    return tile


def run_planned(
    kernel: str,
    device: torch.device,
    operands: Operands,
    layer: Layer,
    gradient: bool,
    run: Callable[[Plan], None],
) -> None:
    """Run with the best plan whose tile fits the device: one that does not gives way to a smaller one, for good.

    Args:
        kernel: the name of what ``run`` launches, with the same constants at each of its launches.
        device: where.
        operands: what is multiplied.
        layer: what is computed.
        gradient: whether there is a plain gradient, too.
        run: launches it, before anything else that adds to a result.
    """
    kind = kernel, device, operands, gradient
    while True:
        unfit = _UNFIT.get(kind, frozenset())
        plan = choose_plan(device, operands, layer, gradient, unfit)
        try:
            run(plan)
            return
        except TooLargeError as error:
            if error.kernel != kernel or plan.tile in unfit:  # another kernel, or a plan that was asked for
                raise
            logger.info("%s gives way to a smaller tile: %s", plan.tile, error)
            _UNFIT[kind] = unfit | {plan.tile}
