"""Sum the grad samples of parameters over their uses, square, and accumulate over samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ops.layout import as_real, is_run
from ..accumulators import Accumulators
from ..call import Operand
from ..probe.graph import fingerprint
from ..rules import vectorised
from ..rules.grad_sample import GradSample, add_squares, chunks, weights_of
from ..rules.projection import Directions, add
from . import derived, spread, tied

#: Parameter index -> the grad samples of all its uses in one batch; one of a derived operand stands under several.
Uses = Mapping[int, Sequence[GradSample]]


def accumulate(uses: Uses, accumulators: Accumulators) -> None:
    """Add ``sum_n w_n (sum_uses g_n)^2`` to each parameter's Fisher, and ``sum_n w_n sum_uses g_n`` to its gradient.

    Args:
        uses: those of one parameter, or of several that lie below common derived operands.
        accumulators: what to add to.
    """
    if len(uses) > 1 and any(len(use.operand.parameters) > 1 for samples in uses.values() for use in samples):
        _together(uses, accumulators)
        return
    weights = accumulators.weights
    for index, samples in uses.items():
        fisher, gradient = accumulators.fisher[index], accumulators.gradient_of(index)
        for region, group in _regions(samples, fisher).items():
            target = _view(fisher, region)
            plain = None if gradient is None else _view(gradient, region)
            whole = region is not None or all(use.operand.graph is None for use in group)
            fused = whole and (
                _fused(group, target, plain, weights) or spread.accumulate(group, target, plain, weights)
            )
            if not fused and not tied.accumulate(group, target, plain, weights):
                _materialised(index, group, target, plain, weights, direct=region is not None)


def apart(uses: Uses) -> Uses:
    """Return the uses of each parameter by itself, where derived tensors let them be told apart; else as they are."""
    if all(use.operand.graph is None for samples in uses.values() for use in samples):
        return uses
    once = {id(use): use for samples in uses.values() for use in samples}
    found = derived.sent_down(list(once.values()))
    if found is None:
        return uses
    by_parameter: dict[int, list[GradSample]] = {}
    for use in found:
        if use.operand.parameters[0] in uses:
            by_parameter.setdefault(use.operand.parameters[0], []).append(use)
    return by_parameter


def project(
    uses: Uses, directions: Directions, weights: Tensor, sample: int | None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Project ``sum_n weights[n] sum_uses g_n`` of each parameter, and ``sum_uses g_n`` of one sample.

    Args:
        uses: of parameters.
        directions: what to project on.
        weights: [N].
        sample: which; None: leave the second out.

    Returns:
        Two mappings from a parameter's index to k numbers.
    """
    sums: dict[int, Tensor] = {}
    alone: dict[int, Tensor] = {}
    chosen = None if sample is None else range(sample, sample + 1)
    for same in _by_operand(uses):
        operand = same[0].operand
        direction = directions[operand.parameters[0]] if operand.graph is None else None
        parts = [None if direction is None else use.projected(direction) for use in same]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            total = torch.stack(known).sum(0)
            add(sums, operand.parameters[0], weights.to(total) @ total)
            if sample is not None:
                add(alone, operand.parameters[0], total[sample])
            continue
        device = operand.value.device
        dense = [(sums, sum(use.weighted_sum(weights.to(device)) for use in same))]
        if chosen is not None:
            dense.append((alone, _summed(same, chosen)[0]))
        for found, gradient in dense:
            assert isinstance(gradient, Tensor)
            for index, part in pushed(operand, gradient.unsqueeze(0)).items():
                if index in uses:
                    add(found, index, directions[index].of(part)[0])
    return sums, alone


def _by_operand(uses: Uses) -> list[list[GradSample]]:
    """Group the uses of one operand, whose gradients can be summed before they are sent down its graph."""
    groups: dict[int, dict[int, GradSample]] = {}
    for use in itertools.chain.from_iterable(uses.values()):
        key = id(use.operand.leaf if use.operand.graph is None else use.operand.graph)
        groups.setdefault(key, {})[id(use)] = use
    return [list(group.values()) for group in groups.values()]


_Region = tuple[torch.Size, tuple[int, ...], int]


def _view(accumulator: Tensor, region: _Region | None) -> Tensor:
    """View the part of a parameter's accumulator that corresponds to a view of the parameter."""
    if region is None:
        return accumulator
    size, stride, offset = region
    return accumulator.as_strided(size, stride, accumulator.storage_offset() + offset)


def _regions(uses: Sequence[GradSample], fisher: Tensor) -> dict[_Region | None, Sequence[GradSample]]:
    """Group uses of disjoint views of a parameter (chunks of a packed projection); else one group, under None."""
    if len(uses) == 1 and uses[0].operand.region is None:
        return {None: uses}
    regions: dict[_Region | None, list[GradSample]] = {}
    for use in uses:
        view = use.operand.region
        regions.setdefault(None if view is None else view[1:], []).append(use)
    whole: dict[_Region | None, Sequence[GradSample]] = {None: uses}
    if None in regions:
        return whole
    spans = []
    for size, stride, offset in (region for region in regions if region is not None):
        if size.numel() == 0 or not is_run(size, stride):
            return whole
        spans.append((offset, offset + size.numel()))
    spans.sort()
    disjoint = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    return dict(regions) if disjoint else whole


def _fused(group: Sequence[GradSample], fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
    """Serve uses of one form without materialising their per-sample gradients; tell whether that was so."""
    if any(use.operand.value.shape != fisher.shape or type(use) is not type(group[0]) for use in group):
        return False
    use = group[0].joined(group[1:])
    return use is not None and use.accumulate(fisher, gradient, weights)


def _materialised(
    parameter: int,
    group: Sequence[GradSample],
    fisher: Tensor,
    gradient: Tensor | None,
    weights: Tensor | None,
    direct: bool,
) -> None:
    """Materialise the per-sample gradients of a few samples at a time; ``direct`` if uses have the target's shape."""
    total_fisher = fisher if fisher.is_contiguous() else torch.zeros_like(fisher, memory_format=torch.contiguous_format)
    for samples in chunks(group[0].n_samples, fisher.numel(), fisher.device.type == "cpu"):
        total = fisher.new_zeros((len(samples), *fisher.shape))
        for same in _by_operand({parameter: group}):
            grads = _summed(same, samples)
            total += grads if direct else pushed(same[0].operand, grads)[parameter]
        add_squares(total, total_fisher, gradient, weights_of(weights, samples))
    if total_fisher is not fisher:
        fisher += total_fisher


def _together(uses: Uses, accumulators: Accumulators) -> None:
    """Materialise the per-sample gradients of several parameters, a few samples at a time."""
    groups = _by_operand(uses)
    fishers = [accumulators.fisher[index] for index in uses]
    cached = fishers[0].device.type == "cpu"
    for samples in chunks(groups[0][0].n_samples, sum(fisher.numel() for fisher in fishers), cached):
        totals = {i: f.new_zeros((len(samples), *f.shape)) for i in uses for f in [accumulators.fisher[i]]}
        for same in groups:
            for index, grads in pushed(same[0].operand, _summed(same, samples)).items():
                if index in totals:
                    totals[index] += grads
        chosen = weights_of(accumulators.weights, samples)
        for index, total in totals.items():
            add_squares(total, accumulators.fisher[index], accumulators.gradient_of(index), chosen)


def _summed(same: Sequence[GradSample], samples: range) -> Tensor:
    """Return the gradients of some samples, summed over uses of one operand."""
    grads = same[0].per_sample(samples)
    for use in same[1:]:
        grads = grads + use.per_sample(samples)
    return grads


def pushed(operand: Operand, grads: Tensor) -> dict[int, Tensor]:
    """Send gradients [n, *operand.shape] down the parameter-only graph; return those of its parameters, by index."""
    if operand.graph is None:
        return {operand.parameters[0]: grads}
    down = vectorised.backward(operand.graph, operand.leaves, grads, fingerprint)
    found = [
        grads.new_zeros((len(grads), *leaf.shape, *[2] * leaf.is_complex()))
        if g is None
        else as_real(g).to(grads.dtype)
        for leaf, g in zip(operand.leaves, down, strict=True)
    ]
    return dict(zip(operand.parameters, found, strict=True))
