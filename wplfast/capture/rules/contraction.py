"""Sums of products of data and one operand, told by letters as in ``torch.einsum``: the core of several rules.

The operand's letters are contracted with the data (D_in), go to the output alone (D_out), or stand in all three terms:
then the operand is many matrices, *blocks*, each with rows of its own. All other letters of the output are rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.layout import flat_dtype
from ..call import Operand
from ..sample_layout import AxisLayout, SampleLayout, SegmentIds
from .blocks import BlockGradSample, Rows, in_shape
from .complex import real_product
from .grad_sample import FactoredGradSample, GradSample, SummedGradSample

#: More blocks than this are not served one by one where all samples' gradients have few elements.
MANY, FEW_ELEMENTS = 64, 1 << 22


def contraction(
    operand: Operand, rule: str, terms: tuple[str, str, str], x: Tensor, gradient: Tensor, layout: SampleLayout
) -> GradSample | None:
    """Return the use of an operand in ``einsum("inputs,operand->output", x, operand)``.

    Args:
        operand: the operand.
        rule: for the report.
        terms: letters of the data, of the operand and of the output, none twice in a term; sizes of 1 are broadcast.
        x: the data.
        gradient: that of the output.
        layout: who owns its elements.

    Returns:
        Its per-sample gradients in factors; None where they are no products of rows.
    """
    if gradient.is_complex() and len(terms[2]) == gradient.dim():
        operand, terms, x, gradient, layout = real_product(operand, terms, x, gradient, layout)
    inputs, letters, output = terms
    if len(output) != gradient.dim() or not (x.numel() and gradient.numel() and operand.value.numel()):
        return None
    sizes: dict[str, int] = {}
    for term, shape in ((inputs, x.shape), (letters, operand.value.shape), (output, gradient.shape)):
        for a, size in zip(term, shape, strict=True):
            sizes[a] = max(sizes.get(a, 1), size)
    if operand.base is not None and set(letters) <= set(inputs + output):
        letters, operand = letters[len(letters) - operand.base.value.dim() :], operand.base
    spread = [dim for dim, a in enumerate(letters) if operand.value.shape[dim] != sizes[a]]
    order = {a: dim for dim, a in enumerate(letters) if dim not in spread}
    for dim in reversed([dim for dim, a in enumerate(inputs) if x.shape[dim] != sizes[a]]):
        x, inputs = x.squeeze(dim), inputs[:dim] + inputs[dim + 1 :]
    alone = [a for a in inputs if a not in order and a not in output]
    if alone:  # summed over before it is multiplied
        x, inputs = x.sum([inputs.index(a) for a in alone]), "".join(a for a in inputs if a not in alone)
    of_gradient = output
    for a in order:
        if a not in inputs and a not in output:  # summed over in the operand: each of its elements takes the same G
            gradient = gradient.unsqueeze(-1).expand(*gradient.shape, sizes[a])
            of_gradient += a
    rows = [a for a in output if a not in order]
    by_rows = output if len(output) == 1 else output[:-1]  # what a table of samples is about
    if isinstance(layout, AxisLayout) and output[layout.dim] not in rows:
        return None
    if isinstance(layout, SegmentIds) and not set(rows) <= set(by_rows):
        return None
    blocks = {a for a in order if a in inputs and a in of_gradient}
    if isinstance(layout, SegmentIds):
        blocks |= set(by_rows) & set(order)
    runs = _runs([a for a in order if a not in blocks], of_gradient)
    d_out, d_in = ([a for run in runs for a in run if (a in of_gradient) == out] for out in (True, False))
    leading = [*rows, *(a for a in order if a in blocks)]
    pair = _arranged(x, inputs, leading, d_in, sizes), _arranged(gradient, of_gradient, leading, d_out, sizes)
    if runs and runs[0] == d_in and len(runs) < 3:  # the operand lies as [D_in, D_out]
        pair, d_out, d_in = (pair[1], pair[0]), d_in, d_out
    if isinstance(layout, AxisLayout):
        layout = AxisLayout(rows.index(output[layout.dim]), layout.outer, layout.n_samples, layout.inner)
    if not blocks and len(runs) < 3:
        return FactoredGradSample(operand, rule, layout.rows(pair[0]), layout.rows(pair[1]))
    dims = [*spread, *(order[a] for a in [*leading[len(rows) :], *d_out, *d_in])]
    n_blocks = math.prod(sizes[a] for a in blocks)
    few = n_blocks > MANY and layout.n_samples * operand.value.numel() <= FEW_ELEMENTS
    if not (d_out or d_in) or few:  # small for each sample, and no matrices to speak of
        if not isinstance(layout, SegmentIds) or not blocks & set(by_rows):
            factors = (layout.rows(t.flatten(len(rows))).unflatten(2, (n_blocks, -1)) for t in pair)
            return SummedGradSample(operand, rule, in_shape(_products(*factors), operand.value.shape, dims))
        if not (d_out or d_in):
            return None
    each = (t.flatten(len(rows), -2) if blocks else t.unsqueeze(-2) for t in pair)
    many_x, many_g = (t.movedim(-2, 0) for t in each)  # [blocks, *rows, D]
    if isinstance(layout, SegmentIds):
        table = _arranged(layout.ids.view([sizes[a] for a in by_rows]), by_rows, leading, [], sizes)
        owners = table.reshape(-1, len(many_x)).t()
        both = zip(many_x.flatten(1, -2), many_g.flatten(1, -2), owners, strict=True)
        found = [Rows(one_x, one_g, own) for one_x, one_g, own in both]
    else:
        found = [Rows(layout.rows(one_x), layout.rows(one_g)) for one_x, one_g in zip(many_x, many_g, strict=True)]
    return BlockGradSample(operand, rule, layout.n_samples, found, dims)


def _products(a: Tensor, g: Tensor) -> Tensor:
    """Return ``sum_t G[n, t, b, o] A[n, t, b, i]``, [N, blocks, D_out, D_in], in float32 or wider."""
    wide = flat_dtype(a.dtype)
    a, g = a.to(wide), g.to(wide)
    if a.shape[3] == g.shape[3] == 1:
        return (a * g).sum(1).unsqueeze(3)
    products: Tensor = torch.einsum("ntbo,ntbi->nboi", g, a)
    return products


def _runs(letters: Sequence[str], output: str) -> list[list[str]]:
    """Group neighbours that are all of the output, or none is."""
    runs: list[list[str]] = []
    for a in letters:
        if runs and (runs[-1][0] in output) == (a in output):
            runs[-1].append(a)
        else:
            runs.append([a])
    return runs


def _arranged(
    tensor: Tensor, letters: str, leading: Sequence[str], columns: Sequence[str], sizes: dict[str, int]
) -> Tensor:
    """View a tensor as [*leading, columns], expanded along leading letters that it lacks; columns are flattened."""
    kept = [a for a in leading if a in letters]
    tensor = tensor.permute([letters.index(a) for a in (*kept, *columns)])
    for dim, a in enumerate(leading):
        if a not in letters:
            tensor = tensor.unsqueeze(dim)
    tensor = tensor.expand(*(sizes[a] for a in leading), *tensor.shape[len(leading) :])
    return tensor.flatten(len(leading)) if columns else tensor.unsqueeze(-1)


def fitted(terms: Sequence[str], output: str, ndims: Sequence[int]) -> tuple[list[str], str] | None:
    """Replace the ellipses of terms of so many dimensions by letters; None if a term has letters twice, or too few."""
    missing = [n - len(term.replace("...", "")) for term, n in zip(terms, ndims, strict=True)]
    if any(m < 0 or (m > 0 and "..." not in term) for m, term in zip(missing, terms, strict=True)):
        return None
    most = max((m for m, term in zip(missing, terms, strict=True) if "..." in term), default=0)
    fill = "".join(chr(0x100 + i) for i in range(most))
    filled = [term.replace("...", fill[most - m :]) for m, term in zip(missing, terms, strict=True)]
    output = output.replace("...", fill)
    if any(len(set(term)) != len(term) for term in (*filled, output)):
        return None
    return filled, output
