"""Convolutions of 1 to 3 dimensions, transposed ones too: strided, padded, dilated, grouped, depthwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.contract import kernel
from ...ops.layout import flat_dtype
from ..accumulators import Accumulators
from ..call import Call, Operand
from ..sample_layout import AxisLayout, OneSample, SampleLayout
from .base import OneOutputRule, by_batch, channel_rows, channels_of, row_sums
from .grad_sample import GradSample, SummedGradSample, add_squares, padded, widened
from .projection import Direction, projected_affine
from .recipe import Recipe

#: function -> (spatial dimensions, transposed)
_FORMS: dict[Callable[..., Any], tuple[int, bool]] = {
    torch.conv1d: (1, False),
    torch.conv2d: (2, False),
    torch.conv3d: (3, False),
    torch.conv_transpose1d: (1, True),
    torch.conv_transpose2d: (2, True),
    torch.conv_transpose3d: (3, True),
}
#: number of spatial dimensions -> the convolution
_SLIDE: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution runs over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool
    output_padding: list[int]
    sides: Sequence[int] = ()  # of the zeros that an input gets first, as F.pad takes them; none where both are alike

    def padded(self, x: Tensor) -> Tensor:
        """Return an input with zeros where padding differs from side to side."""
        return F.pad(x, self.sides) if self.sides else x

    def weight_gradient(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return the ordinary weight gradient of [B, C, *S] inputs and their outputs' gradients."""
        _, found, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups,
            [False, True, False],
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found


class ConvUse(GradSample):
    """Gradients of a convolution's weight, from its input and its output's gradient."""

    def __init__(
        self,
        operand: Operand,
        rule: str,
        layout: AxisLayout | OneSample,
        x: Tensor,
        grad_outputs: Tensor,
        geometry: ConvGeometry,
    ) -> None:
        """Take x [B, C_in, *S] and G [B, C_out, *L]; samples own slices along B."""
        super().__init__(operand, layout.n_samples, rule)
        self.layout, self.x, self.grad_outputs, self.geometry = layout, x, grad_outputs, geometry

    @property
    def source(self) -> tuple[int, ...]:
        """Input and gradient."""
        return id(self.x), id(self.grad_outputs)

    def per_sample(self, samples: range) -> Tensor:
        """Run the ordinary weight gradient of one sample at a time."""
        wide = flat_dtype(self.x.dtype)
        weight = self.operand.value.to(wide)
        parts = [self.layout.split(t) for t in (self.x, self.grad_outputs)]
        found = []
        for n in samples:
            x, gradient = (part[n].flatten(0, 1).to(wide) for part in parts)
            found.append(self.geometry.weight_gradient(x, gradient, weight))
        return torch.stack(found)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weigh the outputs' gradients; then one ordinary weight gradient serves all."""
        wide = flat_dtype(self.x.dtype)
        scaled = self.layout.scale(self.grad_outputs.to(wide), weights.to(self.x.device))
        return self.geometry.weight_gradient(self.x.to(wide), scaled, self.operand.value.to(wide))

    def projected(self, direction: Direction) -> Tensor | None:
        """Slide the columns over the input as kernels of one channel each; multiply by the projected channels of G."""
        rows, columns = direction
        form, kernel, k = self.geometry, self.operand.value.shape[2:], rows.shape[1]
        slid, fixed = self._slid_and_fixed
        channels, n_channels = fixed.shape[1] // form.groups, slid.shape[1] // form.groups
        if (len(rows), len(columns)) != (fixed.shape[1], n_channels * kernel.numel()) or not slid.is_floating_point():
            return None
        fixed = fixed.to(rows.dtype)
        seen = self._seen(columns.t().reshape(k, n_channels, *kernel).repeat(form.groups, *[1] * (1 + len(kernel))))
        places = fixed.reshape(len(fixed), form.groups, channels, -1)
        led = rows.view(form.groups, channels, k).transpose(1, 2) @ places  # [B, groups, k, L]; einsum is slow here
        products = (led * seen.reshape(led.shape)).sum((1, 3))  # [B, k]
        return self.layout.split(products).flatten(1, 2).sum(1)

    def contracted(self, factor: Tensor, shape: torch.Size) -> Tensor | None:
        """Slide the factors over the input as kernels, where rows of the weight, or all of it, are summed."""
        weight, wide = self.operand.value, flat_dtype(self.x.dtype)
        sizes, _, fixed = padded(shape, weight.dim()), *self._slid_and_fixed
        if torch.Size(sizes[1:]).numel() > 1 or fixed.is_complex():
            return None
        products = (fixed.to(wide) * self._seen(factor.expand(weight.shape).to(wide))).flatten(2).sum(2)  # [B, C]
        sums = self.layout.split(products).flatten(1, 2).sum(1)
        return (sums if sizes[0] > 1 else sums.sum(1)).reshape(len(sums), *shape)

    def weighed(self, factors: Tensor) -> Tensor | None:
        """Weigh the channels that rows of the weight stand for; then one ordinary weight gradient serves all."""
        weight, wide = self.operand.value, flat_dtype(self.x.dtype)
        sizes = padded(factors.shape[1:], weight.dim())
        if torch.Size(sizes[1:]).numel() > 1 or self.x.is_complex():
            return None
        slid, fixed = (self.layout.split(t).to(wide) for t in self._slid_and_fixed)  # [N, outer, inner, C, *S]
        fixed = fixed * factors.to(wide).view(len(factors), 1, 1, -1, *[1] * (weight.dim() - 2))
        slid, fixed = slid.flatten(0, 2), fixed.flatten(0, 2)
        pair = (fixed, slid) if self.geometry.transposed else (slid, fixed)
        return self.geometry.weight_gradient(*pair, weight.to(wide))

    def _seen(self, kernels: Tensor) -> Tensor:
        """Slide kernels [groups * k, C, *K] over what this one slides over."""
        form, (slid, fixed) = self.geometry, self._slid_and_fixed
        slide = _SLIDE[kernels.dim() - 2]
        seen = slide(slid.to(kernels.dtype), kernels, None, form.stride, form.padding, form.dilation, form.groups)
        for dim, size in enumerate(fixed.shape[2:], 2):
            seen = seen.narrow(dim, 0, size)  # a transposed convolution may pad its output
        return seen

    @property
    def _slid_and_fixed(self) -> tuple[Tensor, Tensor]:
        """What a kernel slides over, and what comes of it: a transposed convolution goes from outputs to inputs."""
        return (self.grad_outputs, self.x) if self.geometry.transposed else (self.x, self.grad_outputs)

    def accumulate(self, fisher: Tensor, gradient: Tensor | None, weights: Tensor | None) -> bool:
        """Call the fused operator."""
        if not fisher.is_contiguous():
            return False
        slid, fixed = (images(self.layout, widened(t, fisher)) for t in self._slid_and_fixed)
        form = self.geometry
        ops.fisher_conv_(
            fisher, slid, fixed, weights, gradient,
            stride=form.stride, padding=form.padding, dilation=form.dilation, groups=form.groups,
        )  # fmt: skip
        return True


class ConvRule(OneOutputRule):
    """The weight's gradient correlates input and G; the bias's is G summed over positions."""

    name = "conv"

    def matches(self, call: Call) -> bool:
        """Match convolutions of batched data."""
        form = _FORMS.get(call.func)
        if form is None or not call.is_input(0, "input"):
            return False
        slot = call.argument(0, "input")
        return len(call.input_shapes[slot.index]) == form[0] + 2

    def needs_inputs(self, call: Call) -> bool:
        """The bias alone does not need the input."""
        return call.operand_at(1, "weight") is not None

    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return one use for the weight, and the summed gradient of the bias."""
        weight, bias = call.operand_at(1, "weight"), call.operand_at(2, "bias")
        if not by_batch(layout):
            return None if bias is None or weight is not None else [channels_of(bias, self.name, layout, gradient)]
        found: list[GradSample] = []
        if weight is not None:
            x = inputs[call.argument(0, "input").index].to(gradient.dtype)
            geometry = _geometry(call, weight.value)
            found.append(ConvUse(weight, self.name, layout, geometry.padded(x), gradient, geometry))
        if bias is not None:
            found.append(SummedGradSample(bias, self.name, row_sums(channel_rows(layout, gradient))))
        return found

    def recipe(
        self,
        call: Call,
        layouts: Sequence[SampleLayout | None],
        shapes: Sequence[torch.Size],
        accumulators: Accumulators,
    ) -> Recipe | None:
        """Bind the fused kernel for the weight, and the squares of sums for the bias."""
        weight, bias, layout = call.operand_at(1, "weight"), call.operand_at(2, "bias"), layouts[0]
        parts = [operand for operand in (weight, bias) if operand is not None]
        if weight is None or layout is None or not by_batch(layout) or len(call.input_shapes) != 1:
            return None
        if call.is_complex or not call.has_plain_inputs or not all(operand.is_parameter for operand in parts):
            return None
        of_bias = None if bias is None else bias.parameters[0]
        geometry = _geometry(call, weight.value)
        return ConvRecipe(self.name, accumulators, layout, geometry, weight.parameters[0], of_bias)

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the weight gradient without running the call again."""
        gradient, weight = grads[0], call.operand_at(1, "weight")
        if gradient is None:
            return [None] * len(call.operands)
        found: list[Tensor | None] = []
        for operand in call.operands:
            if operand is weight:
                x = inputs[call.argument(0, "input").index].to(gradient.dtype)
                geometry = _geometry(call, operand.value)
                value = operand.value.to(gradient.dtype)
                found.append(geometry.weight_gradient(geometry.padded(x), gradient, value))
            else:
                found.append(gradient.movedim(1, -1).flatten(0, -2).sum(0))
        return found

    def projected(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        directions: Sequence[Direction],
    ) -> list[Tensor] | None:
        """Project the weight's gradient as if all images were one sample's, and the sum of G for the bias."""
        gradient, weight = grads[0], call.operand_at(1, "weight")
        if gradient is None or weight is None or not call.has_plain_inputs or call.is_complex:
            return None
        geometry = _geometry(call, weight.value)
        x = geometry.padded(inputs[call.argument(0, "input").index].to(gradient.dtype))
        use = ConvUse(weight, self.name, OneSample(), x, gradient, geometry)

        def of_weight(direction: Direction) -> Tensor | None:
            part = use.projected(direction)
            return None if part is None else part[0]

        are_weights = [operand is weight for operand in call.operands]
        return projected_affine(directions, are_weights, gradient.movedim(1, -1), of_weight)


class ConvRecipe:
    """The recipe of a convolution whose weight and bias are whole parameters.

    Args:
        name: of the rule.
        accumulators: what squares are added to.
        layout: of the output; samples own whole images.
        geometry: of the convolution.
        weight: index of the weight.
        bias: index of the bias; None if there is none.
    """

    def __init__(
        self,
        name: str,
        accumulators: Accumulators,
        layout: AxisLayout | OneSample,
        geometry: ConvGeometry,
        weight: int,
        bias: int | None,
    ) -> None:
        self._accumulators, self._layout, self._geometry = accumulators, layout, geometry
        self._weight, self._bias = weight, bias
        self._fisher_conv_ = kernel("fisher_conv_", accumulators.like[weight].device.type)
        for index in (weight, bias):
            if index is not None:
                accumulators.rules[index].add(name)

    def __call__(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Square one batch's gradients."""
        (x,), gradient = inputs, grads[0]
        if gradient is None:
            return
        into, form = self._accumulators, self._geometry
        fisher, of_weight = into.fisher[self._weight], into.gradient_of(self._weight)
        pair = (form.padded(x.to(gradient.dtype)), gradient)
        slid, fixed = (images(self._layout, widened(t, fisher)) for t in (reversed(pair) if form.transposed else pair))
        options = form.stride, form.padding, form.dilation, form.groups
        self._fisher_conv_(fisher, slid, fixed, into.weights, of_weight, *options)
        if self._bias is not None:
            sums = row_sums(channel_rows(self._layout, gradient))
            add_squares(sums, into.fisher[self._bias], into.gradient_of(self._bias), into.weights)


def images(layout: AxisLayout | OneSample, tensor: Tensor) -> Tensor:
    """View [B, C, *S] as [N, M, *S, C]; a copy where a sample's images lie apart."""
    return layout.split(tensor.movedim(1, -1)).flatten(1, 2)


def _geometry(call: Call, weight: Tensor) -> ConvGeometry:
    """Read a convolution's options."""
    n_spatial, transposed = _FORMS[call.func]

    def option(position: int, name: str, default: int) -> list[int]:
        value = call.argument(position, name)
        values = [default] if value is None else [value] if isinstance(value, int) else list(value)
        return values * n_spatial if len(values) == 1 else values

    def groups(position: int) -> int:
        value = call.argument(position, "groups")
        return 1 if value is None else int(value)

    stride = option(3, "stride", 1)
    if transposed:
        padding, dilation = option(4, "padding", 0), option(7, "dilation", 1)
        return ConvGeometry(stride, padding, dilation, groups(6), True, option(5, "output_padding", 0))
    zeros = [0] * n_spatial
    geometry = ConvGeometry(stride, zeros, option(5, "dilation", 1), groups(6), False, zeros)
    mode = call.argument(4, "padding")
    if mode == "valid":
        return geometry
    if mode == "same":
        totals = [d * (k - 1) for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
            return replace(geometry, sides=sides)
        return replace(geometry, padding=[total // 2 for total in totals])
    return replace(geometry, padding=option(4, "padding", 0))


CONV = ConvRule()
