"""Rows of a table: ``F.embedding``, ``table[indices]``. A sample's repeated rows are summed before they are squared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.layout import flat_dtype
from ..accumulators import Accumulators
from ..call import Call, Operand, Slot
from ..sample_layout import AxisLayout, OneSample, SampleLayout, SegmentIds
from .base import OneOutputRule
from .grad_sample import GradSample, padded, widened
from .projection import Direction
from .recipe import Recipe


class LookupGradSample(GradSample):
    """Gradients that are zero but for the rows that a sample looked up."""

    def __init__(self, operand: Operand, rule: str, indices: Tensor, grad_outputs: Tensor) -> None:
        """Take indices [N, T], negative where there is none, and G [N, T, D] for a table [V, D] in any shape."""
        super().__init__(operand, len(indices), rule)
        self.indices, self.grad_outputs = indices, grad_outputs

    @property
    def source(self) -> tuple[int, ...]:
        """What was looked up, and its gradients."""
        return id(self.indices), id(self.grad_outputs)

    def per_sample(self, samples: range) -> Tensor:
        """Add each sample's rows into a table of its own."""
        chosen = slice(samples.start, samples.stop)
        found = self._tables(self.indices[chosen], self.grad_outputs[chosen])
        return found.view(-1, *self.operand.value.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh the rows, then add all into one table."""
        wide = flat_dtype(self.grad_outputs.dtype)
        rows = self.grad_outputs.to(wide) * weights.to(self.grad_outputs.device, wide).view(-1, 1, 1)
        found = self._tables(self.indices.reshape(1, -1), rows.flatten(0, 1).unsqueeze(0))
        return found.view(self.operand.value.shape)

    def projected(self, direction: Direction) -> Tensor:
        """Project what was looked up."""
        rows = direction.rows[self.indices.clamp_min(0)] * (self.indices >= 0).unsqueeze(-1)
        return ((self.grad_outputs.to(rows.dtype) @ direction.columns) * rows).sum(1)

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor | None:
        """Contract what was looked up with the factors of its rows."""
        table, wide = self.operand.value, flat_dtype(self.grad_outputs.dtype)
        sizes = padded(shape, 2)
        if table.dim() != 2 or sizes not in ((len(table), 1), (1, 1)):
            return None
        chosen = factor.to(wide).expand(table.shape)[self.indices.clamp_min(0)]
        dots = ((self.grad_outputs.to(wide) * chosen).sum(2)) * (self.indices >= 0)
        if sizes == (1, 1):
            return dots.sum(1).reshape(-1, *shape)
        found = dots.new_zeros(len(dots), len(table)).scatter_add_(1, self.indices.clamp_min(0), dots)
        return found.reshape(-1, *shape)

    def weighed(self, factors: Tensor) -> Tensor | None:
        """Weigh what was looked up, then add all into one table."""
        table, wide = self.operand.value, flat_dtype(self.grad_outputs.dtype)
        sizes = padded(factors.shape[1:], 2)
        if table.dim() != 2 or sizes not in ((len(table), 1), (1, 1)):
            return None
        each = factors.to(wide).reshape(len(factors), -1)
        rows = (
            self.grad_outputs.to(wide)
            * (each.gather(1, self.indices.clamp_min(0)) if sizes[0] > 1 else each)[..., None]
        )
        return self._tables(self.indices.reshape(1, -1), rows.flatten(0, 1).unsqueeze(0))[0]

    def _tables(self, indices: Tensor, rows: Tensor) -> Tensor:
        """Sum rows [n, T, D] into tables [n, V, D]."""
        size, features = len(self.operand.value), rows.shape[-1]
        wide = flat_dtype(rows.dtype)
        found = rows.new_zeros(len(indices) * size, features, dtype=wide)
        kept = rows.to(wide) * (indices >= 0).unsqueeze(-1)
        first = torch.arange(len(indices), device=indices.device).unsqueeze(1) * size
        found.index_add_(0, (indices.clamp_min(0) + first).reshape(-1), kept.reshape(-1, features))
        return found.view(-1, size, features)

    def joined(self, others: Sequence[GradSample]) -> GradSample:
        """Join what was looked up along T."""
        if not others:
            return self
        uses = [self, *(use for use in others if isinstance(use, LookupGradSample))]
        indices = torch.cat([use.indices for use in uses], 1)
        return LookupGradSample(self.operand, self.rule, indices, torch.cat([use.grad_outputs for use in uses], 1))

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Call the fused operator."""
        if not fisher.is_contiguous():
            return False
        g = widened(self.grad_outputs, fisher).contiguous()
        table = (len(fisher), g.shape[2])
        plain = None if gradient is None else gradient.view(table)
        ops.fisher_embedding_(fisher.view(table), self.indices.contiguous(), g, weights, plain)
        return True


class EmbeddingRule(OneOutputRule):
    """y = table[indices]: the gradient of a row is the sum of those of its copies."""

    name = "embedding"

    def matches(self, call: Call) -> bool:
        """Match look-ups along the first dimension of a table by integer data."""
        if call.func in (F.embedding, torch.embedding):
            return call.func is F.embedding and call.is_input(0, "input") and call.operand_at(1, "weight") is not None
        if call.name != "__getitem__" or len(call.args) != 2 or call.operand_at(0, "self") is None:
            return False
        index = call.args[1]
        if not isinstance(index, Slot) or index.kind != "input" or not call.operands[0].value.numel():
            return False
        return len(call.input_kinds) == 1 and call.input_kinds[0][1] in (torch.int64, torch.int32)

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return what was looked up, and its gradients."""
        operand = call.operands[0]
        indices, size = inputs[0].long(), len(operand.value)
        by_index = _of_indices(layout, gradient.shape, indices.dim())
        if by_index is None or not indices.dim():
            return None
        indices = torch.where(indices < 0, indices + size, indices)
        padding = call.argument(2, "padding_idx") if call.func is F.embedding else None
        if padding is not None:
            indices = indices.masked_fill(indices == padding % size, -1)
        g = gradient.reshape(*indices.shape, -1)
        return [
            LookupGradSample(operand, self.name, by_index.rows(indices.unsqueeze(-1)).squeeze(-1), by_index.rows(g))
        ]

    def recipe(
        self,
        call: Call,
        layouts: Sequence[SampleLayout | None],
        shapes: Sequence[torch.Size],
        accumulators: Accumulators,
    ) -> Recipe | None:
        """Bind the fused kernel for a table that ``F.embedding`` looks up in."""
        operand, layout = call.operands[0], layouts[0]
        if call.func is not F.embedding or not operand.is_parameter or call.is_complex or layout is None:
            return None
        by_index = _of_indices(layout, shapes[0], len(call.input_shapes[0]))
        if not isinstance(by_index, (AxisLayout, OneSample)):
            return None
        padding = call.argument(2, "padding_idx")
        padding = None if padding is None else padding % len(operand.value)
        return LookupRecipe(self.name, accumulators, by_index, operand.parameters[0], padding)


class LookupRecipe:
    """The recipe of ``y = table[indices]`` where the table is a whole parameter.

    Args:
        name: of the rule.
        accumulators: what squares are added to.
        layout: who owns the indices.
        index: of the table.
        padding: the row that takes no gradient; None if all do.
    """

    def __init__(
        self, name: str, accumulators: Accumulators, layout: AxisLayout | OneSample, index: int, padding: int | None
    ) -> None:
        self._accumulators, self._layout, self._index, self._padding = accumulators, layout, index, padding
        accumulators.rules[index].add(name)

    def __call__(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Square one batch's gradients."""
        indices, gradient = inputs[0].long(), grads[0]
        if gradient is None:
            return
        if self._padding is not None:
            indices = indices.masked_fill(indices == self._padding, -1)
        into = self._accumulators
        fisher, plain = into.fisher[self._index], into.gradient_of(self._index)
        rows = self._layout.rows(indices.unsqueeze(-1)).squeeze(-1).contiguous()
        g = widened(self._layout.rows(gradient), fisher).contiguous()
        ops.fisher_embedding_(fisher, rows, g, into.weights, plain)


def _of_indices(layout: SampleLayout, shape: torch.Size, n_dims: int) -> SampleLayout | None:
    """Return who owns the indices, the first dimensions of a result of this shape; None where samples share some."""
    if isinstance(layout, AxisLayout):
        return layout if layout.dim < n_dims else None
    if isinstance(layout, OneSample) or n_dims in (len(shape) - 1, 1 if len(shape) == 1 else -1):
        return layout
    if n_dims == len(shape):
        return SegmentIds(layout.ids.repeat_interleave(shape[-1]), layout.n_samples)
    ids = layout.ids.view(shape[:n_dims].numel(), -1)
    owners = ids.amax(1)
    same = bool(((ids == owners.unsqueeze(1)) | (ids < 0)).all())
    return SegmentIds(owners, layout.n_samples) if same else None


EMBEDDING = EmbeddingRule()
