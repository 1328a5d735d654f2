"""Parameters that cannot be captured: one ordinary backward pass for each sample, exact and slow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ... import ops
from ..accumulators import Accumulators
from ..call_site import Listener
from ..rules.projection import Directions
from .batch import Batch
from .leaf_grads import LeafGrads
from .passes import OrdinaryPass


def one_by_one(
    batch: Batch,
    unseen: set[int],
    run: Callable[[Tensor, Tensor | None, Listener, bool], None],
    leaf_grads: LeafGrads,
    accumulators: Accumulators,
    directions: Directions,
) -> set[int]:
    """Accumulate the squares of some parameters of a batch.

    A sample's gradient is what arrives where all other losses have weight 0.

    Args:
        batch: the batch, whose graph is kept; ``batch.one_by_one`` are parameters to accumulate.
        unseen: more of them.
        run: runs a backward pass over losses, with weights, for a listener, and keeps the graph or not.
        leaf_grads: where ordinary gradients arrive.
        accumulators: what to add to.
        directions: what a single sample's gradients are projected on.

    Returns:
        Parameters whose gradients do not add up to that of the whole batch.
    """
    wanted = batch.one_by_one | unseen
    if not wanted:
        return set()
    started, listener = time.perf_counter(), OrdinaryPass(wanted)
    rest: dict[int, Tensor] = {}  # of the whole batch's gradient, once the samples' own are taken off
    squares: dict[int, Tensor | int] = {}
    overflown: set[int] = set()
    run(batch.losses, None, listener, True)
    for index, gradient in enumerate(leaf_grads.take()):
        if index in wanted and gradient is not None:
            rest[index] = gradient.to(accumulators.fisher[index].dtype, copy=True)
            squares[index] = rest[index].square().sum()
            if not bool(torch.isfinite(rest[index].sum())):
                overflown.add(index)
    leaf_grads.drop()
    for sample in range(len(batch.losses)):
        one = torch.zeros(len(batch.losses), device="cpu")
        one[sample] = 1
        run(batch.losses, one, listener, True)
        gradients = leaf_grads.take()
        weight = None if accumulators.weights is None else accumulators.weights[sample : sample + 1]
        for index in wanted:
            gradient, plain = gradients[index], accumulators.gradient_of(index)
            if gradient is None:
                continue
            wide = gradient.to(accumulators.fisher[index].dtype).unsqueeze(0).contiguous()
            rest[index] = rest.get(index, torch.zeros_like(wide[0])).sub_(wide[0])
            squares[index] = squares.get(index, 0) + wide.square().sum()
            ops.accumulate_squares_(accumulators.fisher[index], wide, weight)
            if batch.single_sample is not None and sample == batch.single_sample.sample:
                batch.of_single_sample[index] = directions[index].of(wide)[0]
            if plain is not None:
                plain += wide[0] if weight is None else wide[0] * weight.to(wide.dtype)
        leaf_grads.drop()
    for index in wanted:
        accumulators.rules[index].add("one by one")
    accumulators.seconds["one by one"] += time.perf_counter() - started
    tolerance = 1e-6 if batch.losses.dtype == torch.float64 else 5e-2
    # Gradients that are zero but for rounding (a gain before a norm) are compared with those of the whole model.
    of_model = map(float, accumulators.sums())
    floor = 1e-6 * max((size for size in (*map(float, squares.values()), *of_model) if math.isfinite(size)), default=0)
    sizes = {index: max(float(square), floor) ** 0.5 for index, square in squares.items()}
    return {i for i, size in sizes.items() if not float(rest[i].norm()) <= tolerance * size} - overflown
