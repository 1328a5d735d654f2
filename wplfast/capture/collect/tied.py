"""A table that rows are taken from and that also multiplies: an embedding tied to the head of a language model.

A sample's gradient is then E_n + H_n, where E_n has rows for the sample's own tokens alone and H_n = G_n^T A_n has all.
Rows outside the sample's tokens are those of H_n: with the tokens' columns of G_n set to zero, the fused operator sums
their squares. The tokens' own rows, few, are computed one by one, and squared with what was looked up. Nothing of the
size of the table is made for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...ops.layout import flat_dtype
from ..rules.embedding import LookupGradSample
from ..rules.grad_sample import FactoredGradSample, GradSample, chunks, weights_of, widened


def accumulate(group: Sequence[GradSample], fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
    """Add squares of uses of both kinds to ``fisher`` [V, D]; False where there are others or nothing is to be gained.

    Args:
        group: uses of one parameter.
        fisher: its accumulator.
        gradient: optional accumulator of the plain gradient [V, D].
        weights: optional weights [N], float64.
    """
    if fisher.dim() != 2 or not fisher.is_contiguous():
        return False
    lookups = [use for use in group if isinstance(use, LookupGradSample) and _is_whole(use, fisher)]
    products = [found for use in group if (found := _product(use, fisher)) is not None]
    if not lookups or not products or len(lookups) + len(products) < len(group):
        return False
    looked_up, product = lookups[0].joined(lookups[1:]), products[0].joined(products[1:])
    assert isinstance(looked_up, LookupGradSample)
    assert isinstance(product, FactoredGradSample)
    tokens = looked_up.indices
    if 2 * tokens.shape[1] > len(fisher):
        return False
    own, first = _own_rows(tokens, len(fisher))
    others = torch.where(own.unsqueeze(1), 0, product.grad_outputs)
    FactoredGradSample(product.operand, product.rule, product.activations, others).accumulate(fisher, gradient, weights)
    steps = product.activations.shape[1]
    for samples in chunks(len(tokens), max(steps, fisher.shape[1]) * tokens.shape[1]):
        part = slice(samples.start, samples.stop)
        rows = _rows(product.activations[part], product.grad_outputs[part], tokens[part])
        copies = widened(looked_up.grad_outputs[part], fisher).to(rows.dtype)
        # A token's row of H_n counts once, with every row that was looked up for it.
        both = torch.cat([tokens[part], torch.where(first[part], tokens[part], -1)], 1)
        ops.fisher_embedding_(fisher, both, torch.cat([copies, rows], 1), weights_of(weights, samples), gradient)
    return True


def _is_whole(use: GradSample, fisher: Tensor) -> bool:
    """Tell whether a use is of the parameter itself."""
    return use.operand.graph is None and use.operand.value.shape == fisher.shape


def _product(use: GradSample, fisher: Tensor) -> FactoredGradSample | None:
    """Return a use that is a product, of the parameter or of its transpose, as a product of the parameter."""
    if not isinstance(use, FactoredGradSample):
        return None
    if _is_whole(use, fisher):
        return use
    transposed = fisher.t()
    region = use.operand.region
    if region is not None and region[1:] == (transposed.shape, transposed.stride(), 0):
        return FactoredGradSample(use.operand, use.rule, use.grad_outputs, use.activations)
    return None


def _own_rows(tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return which rows a sample looked up, bool [N, V], and which of its tokens [N, T] are the first of their kind."""
    valid = torch.where(tokens < 0, size, tokens)
    own = torch.zeros(len(tokens), size + 1, dtype=torch.bool, device=tokens.device)
    own.scatter_(1, valid, True)
    ordered, order = valid.sort(dim=1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.empty_like(fresh).scatter_(1, order, fresh)
    return own[:, :size], first & (tokens >= 0)


def _rows(activations: Tensor, grad_outputs: Tensor, tokens: Tensor) -> Tensor:
    """Return the tokens' rows of G_n^T A_n, [N, T, D]; any row for a token that is negative."""
    wide = flat_dtype(activations.dtype)
    index = tokens.clamp_min(0).unsqueeze(1).expand(-1, grad_outputs.shape[1], -1)
    columns = grad_outputs.gather(2, index).to(wide)
    return columns.transpose(1, 2) @ activations.to(wide)
