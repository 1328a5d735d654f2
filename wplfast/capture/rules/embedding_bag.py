"""Sums of rows of a table: ``F.embedding_bag``, whose bags may be of any lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.layout import flat_dtype
from ..call import Call, Operand, Slot
from ..sample_layout import SampleLayout, SegmentIds
from .base import OneOutputRule, summed
from .grad_sample import MAX_ELEMENTS, GradSample


class BagGradSample(GradSample):
    """Gradients whose rows are sums of rows of G: entry i adds ``scales[i] G[sources[i]]`` to row ``rows[i]``.

    Entries of one sample and one row are summed first, as bags of G's rows; what is left is a list of rows, each of one
    sample, that are squared. Nothing is padded, and G is not copied for each entry.
    """

    def __init__(
        self,
        operand: Operand,
        rule: str,
        n_samples: int,
        entries: tuple[Tensor, Tensor, Tensor],
        grad_outputs: Tensor,
        scales: Tensor | None = None,
        distinct: bool = False,
    ) -> None:
        """Take samples, rows and sources, each int64 [M], G [R, D] and optional scales [M], for a table [V, D].

        The table is the operand in some shape: with D = 1, rows are its elements. ``distinct``: no two entries are of
        one sample and one row, and there are no scales.
        """
        super().__init__(operand, n_samples, rule)
        self.samples, self.rows, self.sources = entries
        self.grad_outputs, self.scales, self.distinct = grad_outputs, scales, distinct

    def per_sample(self, samples: range) -> Tensor:
        """Sum some samples' entries into tables of their own."""
        chosen = ((self.samples >= samples.start) & (self.samples < samples.stop)).nonzero().squeeze(1)
        keys = (self.samples[chosen] - samples.start) * self._n_rows + self.rows[chosen]
        scales = None if self.scales is None else self.scales[chosen]
        wide = flat_dtype(self.grad_outputs.dtype)
        tables = self.grad_outputs.new_zeros(len(samples) * self._n_rows, self.grad_outputs.shape[1], dtype=wide)
        for found, sums in self._sums(keys, self.sources[chosen], scales, wide):
            tables[found] = sums
        return tables.view(len(samples), *self.operand.value.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh the entries, then sum all into one table."""
        wide = flat_dtype(self.grad_outputs.dtype)
        scales = weights.to(self.grad_outputs.device, wide)[self.samples]
        if self.scales is not None:
            scales = scales * self.scales
        table = self.grad_outputs.new_zeros(self._n_rows, self.grad_outputs.shape[1], dtype=wide)
        for found, sums in self._sums(self.rows, self.sources, scales, wide):
            table[found] = sums
        return table.view(self.operand.value.shape)

    def joined(self, others: Sequence[GradSample]) -> GradSample | None:
        """List the entries of all uses. Uses by rows and by elements (``mode="max"``) do not join."""
        if not others:
            return self
        uses = [self, *(use for use in others if isinstance(use, BagGradSample))]
        if len({use.grad_outputs.shape[1] for use in uses}) > 1:
            return None
        sources, scales, start = [], [], 0
        for use in uses:
            sources.append(use.sources + start)
            scales.append(
                torch.ones_like(use.rows, dtype=self.grad_outputs.dtype) if use.scales is None else use.scales
            )
            start += len(use.grad_outputs)
        entries = (torch.cat([u.samples for u in uses]), torch.cat([u.rows for u in uses]), torch.cat(sources))
        g = torch.cat([use.grad_outputs for use in uses])
        plain = all(use.scales is None for use in uses)
        return BagGradSample(self.operand, self.rule, self.n_samples, entries, g, None if plain else torch.cat(scales))

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Call the fused operator on the sums, each of which stands for a sample that looked up one row."""
        if not fisher.is_contiguous():
            return False
        table = (self._n_rows, self.grad_outputs.shape[1])
        plain = None if gradient is None else gradient.view(table)
        keys = self.samples * self._n_rows + self.rows
        if self.distinct:
            found_sums = iter([(keys, self.grad_outputs.to(fisher.dtype)[self.sources])])
        else:
            found_sums = self._sums(keys, self.sources, self.scales, fisher.dtype)
        for found, sums in found_sums:
            of_pairs = None if weights is None else weights[found // self._n_rows]
            rows = (found % self._n_rows).unsqueeze(1)
            ops.fisher_embedding_(fisher.view(table), rows, sums.unsqueeze(1), of_pairs, plain)
        return True

    @property
    def _n_rows(self) -> int:
        """V."""
        return self.operand.value.numel() // max(1, self.grad_outputs.shape[1])

    def _sums(
        self, keys: Tensor, sources: Tensor, scales: Tensor | None, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield distinct keys [K] and the sums of their entries [K, D], for as many keys at a time as memory is for."""
        g = self.grad_outputs.to(dtype)
        if not keys.numel() or not g.numel():
            return
        ordered, order = keys.sort()
        found, counts = ordered.unique_consecutive(return_counts=True)
        ends, sources = counts.cumsum(0), sources[order]
        scales = None if scales is None else scales.to(dtype)[order]
        step = max(1, MAX_ELEMENTS // g.shape[1])
        for first in range(0, len(found), step):
            part = slice(first, first + step)
            starts = ends[part] - counts[part]
            entries = slice(None)
            if len(found) > step:
                entries = slice(int(starts[0]), int(ends[part][-1]))
                starts = starts - starts[0]
            of_entries = None if scales is None else scales[entries]
            yield found[part], F.embedding_bag(sources[entries], g, starts, mode="sum", per_sample_weights=of_entries)


class EmbeddingBagRule(OneOutputRule):
    """y_b = sum, mean or maximum of a bag's rows: each entry of a bag takes the bag's gradient."""

    name = "embedding bag"

    def matches(self, call: Call) -> bool:
        """Match calls with the indices first (the order of old has the table there)."""
        slot = call.argument(0, "input")
        return call.func is F.embedding_bag and isinstance(slot, Slot) and slot.kind != "operand"

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return the entries of the table's rows, and the products that the weights of single entries take."""
        indices, table = call.tensor_at(0, "input", inputs), call.tensor_at(1, "weight", inputs)
        if not layout.has_rows(gradient.dim()) or gradient.dim() != 2 or indices is None or table is None:
            return None
        if indices.is_floating_point():  # the order of old
            return None
        rows, bags = self._entries(call, indices, inputs)
        padding = call.argument(10, "padding_idx")
        kept = None if padding is None else rows != padding % len(table)
        samples = layout.segment_ids(gradient.shape, gradient.device)
        weight, scale = call.operand_at(1, "weight"), call.operand_at(8, "per_sample_weights")
        found: list[GradSample] = []
        if weight is not None and call.argument(6, "mode") == "max":
            found.append(self._of_largest(call, weight, inputs, gradient, samples, layout.n_samples))
        elif weight is not None:
            g, scales = gradient, call.tensor_at(8, "per_sample_weights", inputs)
            if scales is not None:
                scales = scales.detach().reshape(-1)[: len(rows)]
            elif call.argument(6, "mode") in (None, "mean"):
                sizes = torch.bincount(bags if kept is None else bags[kept], minlength=len(g)).clamp_min(1)
                g = g.to(flat_dtype(g.dtype)) / sizes.unsqueeze(1)
            owners, used = samples[bags], kept
            if isinstance(layout, SegmentIds):
                used = owners >= 0 if kept is None else kept & (owners >= 0)
            entries = (owners, rows, bags)
            if used is not None:
                entries = (owners[used], rows[used], bags[used])
                scales = None if scales is None else scales[used]
            found.append(BagGradSample(weight, self.name, layout.n_samples, entries, g, scales))
        if scale is not None:
            products = torch.zeros(indices.numel(), dtype=gradient.dtype, device=gradient.device)
            products[: len(rows)] = (gradient[bags] * table.detach()[rows].to(gradient.dtype)).sum(1)
            if kept is not None:
                products[: len(rows)] *= kept
            if indices.dim() == 2:
                found.append(summed(scale, self.name, layout, products.view(indices.shape)))
            else:
                owners = torch.full_like(indices, -1, dtype=torch.int64)
                owners[: len(rows)] = samples[bags]
                found.append(summed(scale, self.name, SegmentIds(owners, layout.n_samples), products))
        return found

    @staticmethod
    def _entries(call: Call, indices: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the row and the bag of every entry that is in a bag, int64 [M]."""
        if indices.dim() == 2:
            bags = torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
            return indices.reshape(-1).long(), bags
        offsets = call.tensor_at(2, "offsets", inputs)
        assert offsets is not None
        last = offsets[-1:] if call.argument(9, "include_last_offset") else offsets.new_full((1,), len(indices))
        sizes = torch.cat([offsets, last]).diff()
        if call.argument(9, "include_last_offset"):
            sizes = sizes[:-1]
        bags = torch.arange(len(sizes), device=indices.device).repeat_interleave(sizes)
        return indices[: len(bags)].long(), bags

    def _of_largest(
        self, call: Call, weight: Operand, inputs: Sequence[Tensor], gradient: Tensor, samples: Tensor, n_samples: int
    ) -> GradSample:
        """Return the elements of the table that were the largest of their bags."""
        indices, offsets = call.tensor_at(0, "input", inputs), call.tensor_at(2, "offsets", inputs)
        assert indices is not None
        if offsets is None:
            offsets = torch.arange(0, indices.numel(), max(1, indices.shape[1]), device=indices.device)[: len(indices)]
        last, padding = bool(call.argument(9, "include_last_offset")), call.argument(10, "padding_idx")
        flat = indices.reshape(-1)
        _, _, sizes, largest = torch.embedding_bag(
            weight.value, flat, offsets.to(flat.dtype), False, 2, False, None, last, padding
        )
        bags, width = len(gradient), gradient.shape[1]
        used = ((samples >= 0) & (sizes[:bags] > 0)).nonzero().squeeze(1)
        columns = torch.arange(width, device=gradient.device)
        rows = (largest[used] * width + columns).reshape(-1)
        sources = (used.unsqueeze(1) * width + columns).reshape(-1)
        entries = (samples[used].repeat_interleave(width), rows, sources)
        return BagGradSample(weight, self.name, n_samples, entries, gradient.reshape(-1, 1), distinct=bags == n_samples)


EMBEDDING_BAG = EmbeddingBagRule()
