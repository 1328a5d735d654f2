"""Complex numbers as pairs of real ones, so that rules and kernels need know of real gradients alone.

A loss is real. The gradient that autograd gives of a complex tensor z = a + ib is dL/da + i dL/db: as a pair, that of
the tensor's real view. A complex product is a real one with a letter more for the operand's parts and one for the
output's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...ops.layout import as_real
from ..call import Operand, region_of
from ..sample_layout import AxisLayout, OneSample, SampleLayout, SegmentIds

#: Letters of the operand's parts and of the output's.
_OF_OPERAND, _OF_OUTPUT = "\x01", "\x02"


def real_operand(operand: Operand) -> Operand:
    """Return the operand that a complex one is as [*shape, 2]: its graph goes one step further."""
    if not operand.value.is_complex():
        return operand
    value = as_real(operand.value)
    if operand.graph is None:  # a complex parameter, whose accumulators are of that shape
        return replace(operand, value=value, base=None, made_by=None)
    with torch.enable_grad():
        graph = as_real(operand.graph)
    region = region_of(graph, operand.leaves, operand.parameters)
    return replace(operand, value=value, graph=graph, base=None, region=region, made_by=None)


def real_gradient(operand: Operand, layout: SampleLayout, gradient: Tensor) -> tuple[Operand, SampleLayout, Tensor]:
    """Return an operand that was broadcast to the shape of ``gradient``, and both, as real ones."""
    if not operand.value.is_complex():
        return operand, layout, gradient.real
    if isinstance(layout, SegmentIds) and gradient.dim() > 1:  # rows are pairs then
        layout = SegmentIds(layout.ids.repeat_interleave(gradient.shape[-1]), layout.n_samples)
    return real_operand(operand), layout, as_real(gradient)


def real_product(
    operand: Operand, terms: tuple[str, str, str], x: Tensor, gradient: Tensor, layout: SampleLayout
) -> tuple[Operand, tuple[str, str, str], Tensor, Tensor, SampleLayout]:
    """Return the arguments of :func:`.contraction.contraction` as real ones; the output's are complex."""
    inputs, letters, output = terms
    gradient = as_real(gradient)
    if operand.value.is_complex():
        x = x.resolve_conj() + 0j
        x = torch.stack([as_real(x), as_real(x * 1j)], -2)  # what its real and its imaginary part are multiplied with
        inputs, letters = inputs + _OF_OPERAND, letters + _OF_OPERAND
        operand = real_operand(operand)
    else:
        x = as_real(x)
    inputs += _OF_OUTPUT
    if len(output) < 2:
        return operand, (inputs, letters, output + _OF_OUTPUT), x, gradient, layout
    if isinstance(layout, AxisLayout):
        layout = replace(layout, dim=layout.dim + 1)
    elif isinstance(layout, SegmentIds):
        layout = SegmentIds(layout.ids.repeat(2), layout.n_samples)
    else:
        assert isinstance(layout, OneSample)
    return operand, (inputs, letters, _OF_OUTPUT + output), x, gradient.movedim(-1, 0), layout
