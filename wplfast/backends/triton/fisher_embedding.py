"""The Fisher of a table that rows are taken from: a sample's gradients of one row are summed, then squared.

A stable sort brings the uses of a token together, those of one sample side by side. Programs own fixed spans of the
sorted uses, so that frequent tokens keep as many programs busy as rare ones; a program takes the samples' runs that
start in its span. A token whose uses lie in one span is added to its row at once; of one that goes on, each span leaves
a partial result, which the program of its first span adds up in a second launch. Each row has one writer in each
launch, and every sum a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import kernel
from .launch import OPTIONS, on_device, written
from .split import OCTET

#: Sorted uses a program owns; rows it reads at once where a sample repeats a token; columns; spans summed at once.
SPAN, ROWS, BLOCK, SPANS = 32, 16, 256, 8
WARPS, _MIN_BLOCK = 2, 32
#: Uses in one launch; more go in several.
MAX_USES = (1 << 31) - 1 - SPAN


@triton.jit
def _use(order, p, n_steps):
    """Return the sorted use at p, a row of G, and the sample that owns it; 32 bits spare a long division."""
    use = tl.load(order + p).to(tl.int32)
    return use, use // n_steps


@triton.jit
def _add_partials(
    fisher, gradient, partials, mean_partials, token, slot, columns, width, squares, mean, to_table,
    HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Add what a span found for one token to its row, or leave it in the span's slot."""
    inside = columns < width
    if to_table:
        target = tl.cast(token, tl.int64) * width + columns
        tl.store(fisher + target, tl.load(fisher + target, mask=inside, other=0.0) + squares, mask=inside)
        if HAS_GRADIENT:
            tl.store(gradient + target, tl.load(gradient + target, mask=inside, other=0.0) + mean, mask=inside)
    else:
        target = tl.cast(slot, tl.int64) * width + columns
        tl.store(partials + target, squares, mask=inside)
        if HAS_GRADIENT:
            tl.store(mean_partials + target, mean, mask=inside)


@kernel(do_not_specialize=["n_uses", "n_steps", "units"])
def fisher_embedding_kernel(
    fisher, gradient, grad_outputs, weights, tokens, order, partials, mean_partials, n_uses, n_steps, units,
    UNIT: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One span of sorted uses, one block of columns; slot 2 b of the partials continues a token, 2 b + 1 opens one.

    Rows are ``units`` times UNIT wide, which tells the compiler where they start on 16-byte boundaries.
    """
    width = units * UNIT
    span = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    wide: tl.constexpr = fisher.dtype.element_ty
    start = span * SPAN
    end = tl.minimum(start + SPAN, n_uses)
    before, after = tl.maximum(start - 1, 0), tl.minimum(end, n_uses - 1)
    # A sample's run that starts in an earlier span belongs to it; negative tokens come first and belong to nobody.
    lanes = start + tl.arange(0, SPAN)
    lane_tokens = tl.load(tokens + lanes, mask=lanes < end, other=-1)
    lane_samples = tl.load(order + lanes, mask=lanes < end, other=0).to(tl.int32) // n_steps
    _, sample = _use(order, before, n_steps)
    taken = (lane_tokens == tl.load(tokens + before)) & (lane_samples == sample)
    taken = taken & (start > 0)
    p = start + tl.sum(((taken | (lane_tokens < 0)) & (lanes < end)).to(tl.int64))
    # Whether the span's first token comes from before it, and whether its last one goes on behind it.
    opening, closing = tl.load(tokens + start), tl.load(tokens + end - 1)
    continues = (start > 0) & (tl.load(tokens + before) == opening)
    goes_on = (end < n_uses) & (tl.load(tokens + after) == closing)
    squares, mean, total = tl.zeros((BLOCK,), wide), tl.zeros((BLOCK,), wide), tl.zeros((BLOCK,), wide)
    token = tl.load(tokens + tl.minimum(p, n_uses - 1))
    use, sample = _use(order, tl.minimum(p, n_uses - 1), n_steps)
    busy = p < end
    # The second launch reads this slot even if none of the token's runs starts here. If one does, it is written below,
    # perhaps by other threads: never write it twice.
    if continues & (opening >= 0) & ((p >= end) | (token != opening)):
        _add_partials(
            fisher, gradient, partials, mean_partials, opening, 2 * span, columns, width, squares, mean, False,
            HAS_GRADIENT,
        )  # fmt: skip
    while busy:
        far = tl.minimum(p + ROWS - 1, n_uses - 1)
        _, far_sample = _use(order, far, n_steps)
        if (p + ROWS <= n_uses) & (tl.load(tokens + far) == token) & (far_sample == sample):
            uses = tl.load(order + p + tl.arange(0, ROWS))
            rows = tl.load(grad_outputs + uses[:, None] * width + columns[None, :], mask=inside[None, :], other=0.0)
            total += tl.sum(rows.to(wide), axis=0)
            p += ROWS
        else:
            row = grad_outputs + tl.cast(use, tl.int64) * width
            total += tl.load(row + columns, mask=inside, other=0.0).to(wide)
            p += 1
        following = tl.minimum(p, n_uses - 1)
        next_token = tl.load(tokens + following)
        use, next_sample = _use(order, following, n_steps)
        other_token = (p == n_uses) | (next_token != token)
        if other_token | (next_sample != sample):
            scaled = total
            if HAS_WEIGHTS:
                scaled = total * tl.load(weights + sample).to(wide)
            squares += scaled * total
            if HAS_GRADIENT:
                mean += scaled
            total = tl.zeros((BLOCK,), wide)
            busy = p < end
            if other_token | (p >= end):
                head = continues & (token == opening)
                tail = goes_on & (token == closing)
                _add_partials(
                    fisher, gradient, partials, mean_partials, token, tl.where(head, 2 * span, 2 * span + 1),
                    columns, width, squares, mean, (head | tail) == 0, HAS_GRADIENT,
                )  # fmt: skip
                squares, mean = tl.zeros((BLOCK,), wide), tl.zeros((BLOCK,), wide)
        token, sample = next_token, next_sample


@kernel(do_not_specialize=["n_uses", "units"])
def fold_spans_kernel(
    fisher, gradient, tokens, partials, mean_partials, n_uses, units,
    UNIT: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, BLOCK: tl.constexpr, HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Add up what the spans of a token left, where it starts in this span and goes on in the next."""
    width = units * UNIT
    span = tl.program_id(0).to(tl.int64)
    start, end = span * SPAN, span * SPAN + SPAN
    token = tl.load(tokens + end - 1)
    opened = (start == 0) | (tl.load(tokens + tl.maximum(start - 1, 0)) != token)
    if opened & (token >= 0) & (tl.load(tokens + end) == token):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        own = (2 * span + 1) * width + columns
        total = tl.load(partials + own, mask=inside, other=0.0)
        if HAS_GRADIENT:
            mean = tl.load(mean_partials + own, mask=inside, other=0.0)
        n_spans = tl.cdiv(n_uses, SPAN)
        following = span + 1
        going = following < n_spans
        while going:
            spans = following + tl.arange(0, SPANS)
            there = spans < n_spans
            there &= tl.load(tokens + spans * SPAN, mask=there, other=-1) == token
            offsets = (2 * spans)[:, None] * width + columns[None, :]
            mask = there[:, None] & inside[None, :]
            total += tl.sum(tl.load(partials + offsets, mask=mask, other=0.0), axis=0)
            if HAS_GRADIENT:
                mean += tl.sum(tl.load(mean_partials + offsets, mask=mask, other=0.0), axis=0)
            following += SPANS
            going = (following < n_spans) & (tl.sum(there.to(tl.int32)) == SPANS)
        target = token * width + columns
        tl.store(fisher + target, tl.load(fisher + target, mask=inside, other=0.0) + total, mask=inside)
        if HAS_GRADIENT:
            tl.store(gradient + target, tl.load(gradient + target, mask=inside, other=0.0) + mean, mask=inside)


def fisher_embedding_(
    fisher: Tensor, indices: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Fisher[v] += sum_n w_n (sum_{t: indices[n, t] = v} G[n, t])^2, and the plain gradient beside it where wanted."""
    n, n_steps = indices.shape
    if indices.numel() == 0 or fisher.numel() == 0:
        return
    step = max(1, MAX_USES // n_steps)
    with on_device(fisher.device):
        for start in range(0, n, step):
            chunk = slice(start, start + step)
            w = None if weights is None else weights[chunk]
            _add_uses(fisher, indices[chunk], grad_outputs[chunk], w, gradient)
    written(fisher, gradient)


def _add_uses(
    fisher: Tensor, indices: Tensor, grad_outputs: Tensor, weights: Tensor | None, gradient: Tensor | None
) -> None:
    """Sort the uses and run both kernels."""
    n_steps, width = grad_outputs.shape[1:]
    n_uses, has_gradient = indices.numel(), gradient is not None
    unit = OCTET if width % OCTET == 0 else 1
    block = max(_MIN_BLOCK, min(BLOCK, triton.next_power_of_2(width)))
    n_spans, n_blocks = triton.cdiv(n_uses, SPAN), triton.cdiv(width, block)
    tokens, order = torch.sort(indices.view(-1), stable=True)
    partials = fisher.new_empty((2 * n_spans, width))
    mean_partials = torch.empty_like(partials) if has_gradient else None
    fisher_embedding_kernel[(n_spans, n_blocks)](
        fisher, gradient, grad_outputs, weights, tokens, order, partials, mean_partials, n_uses, n_steps,
        width // unit, UNIT=unit, SPAN=SPAN, ROWS=ROWS, BLOCK=block, HAS_WEIGHTS=weights is not None,
        HAS_GRADIENT=has_gradient, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    if n_spans > 1:
        fold_spans_kernel[(n_spans - 1, n_blocks)](
            fisher, gradient, tokens, partials, mean_partials, n_uses, width // unit,
            UNIT=unit, SPAN=SPAN, SPANS=SPANS, BLOCK=block, HAS_GRADIENT=has_gradient, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
