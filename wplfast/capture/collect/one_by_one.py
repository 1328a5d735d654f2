"""Parameters that cannot be captured: one ordinary backward pass for each sample, exact and slow."""

from __future__ import annotations

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
) -> None:
    """Accumulate the squares of some parameters of a batch.

    Args:
        batch: the batch, whose graph is kept; ``batch.one_by_one`` are parameters to accumulate.
        unseen: more of them.
        run: runs a backward pass over losses, with weights, for a listener, and keeps the graph or not.
        leaf_grads: where ordinary gradients arrive.
        accumulators: what to add to.
        directions: what a single sample's gradients are projected on.
    """
    wanted = batch.one_by_one | unseen
    if not wanted:
        return
    started, listener = time.perf_counter(), OrdinaryPass(wanted)
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
            ops.accumulate_squares_(accumulators.fisher[index], wide, weight)
            if batch.single_sample is not None and sample == batch.single_sample.sample:
                batch.of_single_sample[index] = directions[index].of(wide)[0]
            if plain is not None:
                plain += wide[0] if weight is None else wide[0] * weight.to(wide.dtype)
        leaf_grads.drop()
    for index in wanted:
        accumulators.rules[index].add("one by one")
    accumulators.seconds["one by one"] += time.perf_counter() - started
