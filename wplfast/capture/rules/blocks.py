"""Grad samples of many matrices in one operand, each with rows of its own: the weights of experts and of heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.layout import flat_dtype
from ..call import Operand
from .grad_sample import GradSample, widened

#: Samples whose rows in a matrix are of different number are arranged apart where padding costs more multiply-adds.
WORTH_A_PART = 1 << 21


class Rows(NamedTuple):
    """The rows of one matrix: A [N, T, D_in] and G [N, T, D_out]; or of any samples, [R, D_in] and [R, D_out]."""

    activations: Tensor
    grad_outputs: Tensor
    samples: Tensor | None = None  # int64 [R]; negative where the row counts for nothing

    def listed(self) -> Rows:
        """Return the rows with the sample of each."""
        if self.samples is not None:
            return self
        n, t = self.activations.shape[:2]
        samples = torch.arange(n, device=self.activations.device).repeat_interleave(t)
        return Rows(self.activations.flatten(0, 1), self.grad_outputs.flatten(0, 1), samples)


class BlockGradSample(GradSample):
    """Gradients that are matrices side by side: block b of sample n's is ``G_nb^T A_nb``."""

    def __init__(
        self, operand: Operand, rule: str, n_samples: int, blocks: Sequence[Rows], order: Sequence[int]
    ) -> None:
        """Take the rows of each block.

        Args:
            operand: what the blocks are of.
            rule: for the report.
            n_samples: N.
            blocks: one for each block, in order.
            order: the operand's dimensions in the order [*blocks, *D_out, *D_in].
        """
        super().__init__(operand, n_samples, rule)
        self.blocks, self.order = list(blocks), tuple(order)

    def per_sample(self, samples: range) -> Tensor:
        """Multiply the rows of some samples."""
        wide = flat_dtype(self.operand.value.dtype)
        first = self.blocks[0]
        matrix = (first.grad_outputs.shape[-1], first.activations.shape[-1])
        found = first.activations.new_zeros(len(samples), len(self.blocks), *matrix, dtype=wide)
        for index, owners, a, g in self._parts():
            if owners is None:
                chosen = slice(samples.start, samples.stop)
                found[:, index] = g[chosen].to(wide).transpose(1, 2) @ a[chosen].to(wide)
            else:
                here = ((owners >= samples.start) & (owners < samples.stop)).nonzero().squeeze(1)
                products = g[here].to(wide).transpose(1, 2) @ a[here].to(wide)
                found[owners[here] - samples.start, index] = products
        return in_shape(found, self.operand.value.shape, self.order)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum each block with one product."""
        wide = flat_dtype(self.operand.value.dtype)
        weights = weights.to(self.operand.value.device, wide)
        sums = []
        for block in self.blocks:
            a, g, samples = block.listed()
            assert samples is not None
            own = (samples >= 0).nonzero().squeeze(1)
            sums.append((g[own].to(wide) * weights[samples[own]].unsqueeze(1)).t() @ a[own].to(wide))
        return in_shape(torch.stack(sums).unsqueeze(0), self.operand.value.shape, self.order)[0]

    def joined(self, others: Sequence[GradSample]) -> GradSample | None:
        """Join the rows of each block. Uses of other blocks do not join."""
        if not others:
            return self
        uses = [self, *(use for use in others if isinstance(use, BlockGradSample))]
        if any(
            use.order != self.order or len(use.blocks) != len(self.blocks) or use._matrix != self._matrix
            for use in uses
        ):
            return None
        blocks = []
        for same in zip(*(use.blocks for use in uses), strict=True):
            by_sample = all(rows.samples is None for rows in same)
            a, g, samples = zip(*(same if by_sample else [rows.listed() for rows in same]), strict=True)
            along = 1 if by_sample else 0
            blocks.append(Rows(torch.cat(a, along), torch.cat(g, along), None if by_sample else torch.cat(samples)))
        return BlockGradSample(self.operand, self.rule, self.n_samples, blocks, self.order)

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Call the fused operator for each block, on the transposed product where the accumulator is transposed."""
        targets = [fisher] if gradient is None else [fisher, gradient]
        views = [self._in_blocks(target) for target in targets]
        if any(view is None for view in views):  # blocks that are no matrices in memory: in memory of their own, then
            own = [torch.zeros_like(t.permute(self.order), memory_format=torch.contiguous_format) for t in targets]
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            self._add([t.view(len(self.blocks), *self._matrix) for t in own], weights)
            for target, found in zip(targets, own, strict=True):
                target += found.permute(back)
        else:
            self._add([view for view in views if view is not None], weights)
        return True

    @property
    def _matrix(self) -> tuple[int, int]:
        """D_out and D_in."""
        return self.blocks[0].grad_outputs.shape[-1], self.blocks[0].activations.shape[-1]

    def _in_blocks(self, tensor: Tensor) -> Tensor | None:
        """View a tensor of the operand's shape as [blocks, D_out, D_in], each contiguous or its transpose is."""
        try:
            blocks = tensor.permute(self.order).view(len(self.blocks), *self._matrix)
        except RuntimeError:
            return None
        return blocks if blocks[0].is_contiguous() or blocks[0].t().is_contiguous() else None

    def _add(self, targets: Sequence[Tensor], weights: Tensor | None) -> None:
        """Add the squares of each block, and the plain gradients, to [blocks, D_out, D_in]."""
        straight = targets[0][0].is_contiguous()
        targets = [target if straight else target.transpose(1, 2) for target in targets]
        for index, owners, a, g in self._parts():
            fisher, gradient = targets[0][index], targets[1][index] if len(targets) > 1 else None
            a, g = (widened(t, fisher) for t in ((a, g) if straight else (g, a)))
            a, g = (t if t.stride(2) == 1 or t.shape[2] <= 1 else t.contiguous() for t in (a, g))
            of_owners = weights if owners is None or weights is None else weights[owners]
            ops.fisher_linear_(fisher, a, g, of_owners, gradient)

    def _parts(self) -> Iterator[tuple[int, Tensor | None, Tensor, Tensor]]:
        """Yield the index of a block, samples (None for all), their A [n, T, D_in] and their G [n, T, D_out]."""
        routed = [(index, listed) for index, listed in enumerate(self.blocks) if listed.samples is not None]
        for index, dense in enumerate(self.blocks):
            if dense.samples is None:
                yield index, None, dense.activations, dense.grad_outputs
        if not routed:
            return
        keys = [
            torch.where(r.samples < 0, -1, r.samples + i * self.n_samples) for i, r in routed if r.samples is not None
        ]
        places = torch.cat([torch.arange(len(k), device=k.device) for k in keys])
        ordered, order = torch.cat(keys).sort(stable=True)
        groups, counts = ordered.unique_consecutive(return_counts=True)
        starts, places, samples = counts.cumsum(0) - counts, places[order], groups % self.n_samples
        lengths: dict[int, list[tuple[int, int]]] = {}
        for at, (group, count) in enumerate(zip(groups.tolist(), counts.tolist(), strict=True)):
            if group >= 0:
                lengths.setdefault(group // self.n_samples, []).append((count, at))
        for index, found in lengths.items():
            block = self.blocks[index]
            for alike, longest in _alike(found, WORTH_A_PART // max(1, math.prod(self._matrix))):
                chosen = torch.tensor(alike, device=places.device)
                steps, last = torch.arange(longest, device=places.device), counts[chosen].unsqueeze(1) - 1
                rows = places[starts[chosen].unsqueeze(1) + torch.minimum(steps, last)]
                g = torch.where((steps <= last).unsqueeze(2), block.grad_outputs[rows], 0)
                yield index, samples[chosen], block.activations[rows], g


def in_shape(blocks: Tensor, shape: torch.Size, order: Sequence[int]) -> Tensor:
    """Bring [n, *blocks, *D_out, *D_in] to [n, *shape], whose dimensions they are in an order."""
    back = sorted(range(len(shape)), key=order.__getitem__)
    permuted = blocks.reshape(len(blocks), *(shape[dim] for dim in order))
    return permuted.permute(0, *(1 + dim for dim in back))


def _alike(lengths: list[tuple[int, int]], allowed: int) -> Iterator[tuple[list[int], int]]:
    """Group (length, index) by length, with the longest of each: padding doubles the rows, or adds ``allowed``."""
    lengths = sorted(lengths, reverse=True)
    group: list[int] = []
    longest = rows = padding = 0
    for length, index in lengths:
        if group and padding + longest - length > max(allowed, rows + length):
            yield group, longest
            group = []
        if not group:
            longest, rows, padding = length, 0, 0
        group.append(index)
        rows, padding = rows + length, padding + longest - length
    if group:
        yield group, longest
