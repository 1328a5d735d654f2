"""Sum the uses of one parameter per sample, square, and accumulate over samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.layout import is_run
from ..call import Operand
from ..rules.grad_sample import GradSample, add_squares, chunks
from . import tied


def accumulate(
    parameter: int, uses: Sequence[GradSample], fisher: Tensor, gradient: Tensor | None, weights: Tensor | None
) -> None:
    """Add ``sum_n w_n (sum_uses g_n)^2`` to ``fisher`` and, if wanted, ``sum_n w_n sum_uses g_n`` to ``gradient``.

    Args:
        parameter: index of the parameter; operands derived from several parameters hold uses of each.
        uses: all uses that one batch made of it.
        fisher: contiguous accumulator of the parameter's shape.
        gradient: optional accumulator likewise.
        weights: optional weights [N], float64 on the parameter's device.
    """
    for region, group in _regions(uses, fisher).items():
        target = _view(fisher, region)
        plain = None if gradient is None else _view(gradient, region)
        whole = region is not None or all(use.operand.graph is None for use in group)
        fused = whole and _fused(group, target, plain, weights)
        if not fused and not tied.accumulate(group, target, plain, weights):
            _materialised(parameter, group, target, plain, weights, direct=region is not None)


def weighted_sum(parameter: int, uses: Sequence[GradSample], weights: Tensor, like: Tensor) -> Tensor:
    """Return ``sum_n weights[n] sum_uses g_n`` in the shape of ``like``."""
    total = torch.zeros_like(like)
    for same in _by_source(uses):
        found = sum(use.weighted_sum(weights) for use in same)
        assert isinstance(found, Tensor)
        total += _push(same[0].operand, parameter, found.unsqueeze(0))[0]
    return total


def gradient_of(parameter: int, uses: Sequence[GradSample], sample: int, like: Tensor) -> Tensor:
    """Return one sample's gradient, in the shape of ``like``."""
    total = torch.zeros_like(like)
    for use in uses:
        total += _push(use.operand, parameter, use.per_sample(range(sample, sample + 1)))[0]
    return total


def _by_source(uses: Sequence[GradSample]) -> list[list[GradSample]]:
    """Group the uses of one derived tensor, whose gradients can be summed before they are pushed down its graph."""
    groups: dict[int, list[GradSample]] = {}
    for use in uses:
        groups.setdefault(id(use.operand.leaf if use.operand.graph is None else use.operand.graph), []).append(use)
    return list(groups.values())


_Region = tuple[torch.Size, tuple[int, ...], int]


def _view(accumulator: Tensor, region: _Region | None) -> Tensor:
    """View the part of a parameter's accumulator that corresponds to a view of the parameter."""
    if region is None:
        return accumulator
    size, stride, offset = region
    return accumulator.as_strided(size, stride, accumulator.storage_offset() + offset)


def _regions(uses: Sequence[GradSample], fisher: Tensor) -> dict[_Region | None, list[GradSample]]:
    """Group uses of disjoint views of a parameter (chunks of a packed projection); else one group, under None."""
    regions: dict[_Region | None, list[GradSample]] = {}
    for use in uses:
        view = use.operand.region
        regions.setdefault(None if view is None else view[1:], []).append(use)
    if None in regions:
        return {None: list(uses)}
    spans = []
    for size, stride, offset in (region for region in regions if region is not None):
        if size.numel() == 0 or not is_run(size, stride):
            return {None: list(uses)}
        spans.append((offset, offset + size.numel()))
    spans.sort()
    disjoint = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    return regions if disjoint else {None: list(uses)}


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
    for samples in chunks(group[0].n_samples, fisher.numel()):
        total = fisher.new_zeros((len(samples), *fisher.shape))
        for same in _by_source(group):
            grads = same[0].per_sample(samples)
            for use in same[1:]:
                grads = grads + use.per_sample(samples)
            total += grads if direct else _push(same[0].operand, parameter, grads)
        chosen = None if weights is None else weights[samples.start : samples.stop].contiguous()
        add_squares(total, total_fisher, gradient, chosen)
    if total_fisher is not fisher:
        fisher += total_fisher


def _push(operand: Operand, parameter: int, grads: Tensor) -> Tensor:
    """Send gradients [n, *operand.shape] down the parameter-only graph to one parameter."""
    if operand.graph is None:
        return grads
    leaf = operand.leaves[operand.parameters.index(parameter)]
    found = grads.new_zeros((len(grads), *leaf.shape))
    for row, gradient in zip(found, grads, strict=True):
        (down,) = torch.autograd.grad(
            operand.graph, leaf, gradient.to(operand.graph.dtype), retain_graph=True, allow_unused=True
        )
        if down is not None:
            row.copy_(down)
    return found
