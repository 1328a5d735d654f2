"""The local backward pass of one call: run again on its saved data, with its operands requiring grad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call, in_order
from ..sample_layout import AxisLayout, SampleLayout
from . import vectorised

#: How far the call on one sample may be from its part of the whole call: rounding, not another function.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class LocalBackward:
    """A call run again with its operands requiring grad."""

    def __init__(self, call: Call, inputs: Sequence[Tensor]) -> None:
        """Run the call."""
        self._name = call.name
        if call.name == "group_norm":  # of channels last, without the input's gradient: a segmentation fault (2.13)
            inputs = [tensor.contiguous() for tensor in inputs]
        with torch.enable_grad():
            self.operands = [operand.value.detach().requires_grad_() for operand in call.operands]
            self.outputs = call.run(self.operands, [tensor.detach() for tensor in inputs])

    def __call__(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the operands for gradients of the outputs."""
        if self._name == "batch_norm":
            grads = [in_order(gradient) for gradient in grads]
        pairs = [(o, g) for o, g in zip(self.outputs, grads, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(self.operands)
        outputs = [output for output, _ in pairs]
        of_outputs = [gradient.reshape(output.shape) for output, gradient in pairs]
        found = torch.autograd.grad(outputs, self.operands, of_outputs, retain_graph=True, allow_unused=True)
        return list(found)


class SlicedCall:
    """A call run on one sample at a time: N times 1/N of the work, where masked gradients cost N times all of it.

    That the call treats samples apart is a guess from the sizes of its tensors. It is checked at other parameter values
    first (those at hand may be zero, and agree with anything), and then for each sample.
    """

    def __init__(
        self, call: Call, inputs: Sequence[Tensor], whole: LocalBackward, layouts: Sequence[SampleLayout | None]
    ):
        """Guess the sample axis of each tensor, and check the guess; see ``works``."""
        self.call, self.inputs, self.whole, self.layouts = call, inputs, whole, layouts
        layouts = [layout for layout in layouts if layout is not None]
        first = layouts[0]
        self.works, self._found = False, (range(0), [torch.empty(0)])
        if call.random_state is not None or not isinstance(first, AxisLayout):
            return
        if all(isinstance(layout, AxisLayout) for layout in layouts):
            self.axes = [_axis(tensor, first) for tensor in inputs]
            if any(axis is not None for axis in self.axes):
                self._key = vectorised.signature(call, inputs, self.axes, layouts)
                self.works = vectorised.agreed((self._key, "cut"), lambda: self._agrees_elsewhere(first.n_samples))

    def __call__(self, sample: int, grads: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Return the gradients of the operands for one sample; None, from now on, if the guess is wrong."""
        part = LocalBackward(self.call, self._cut(sample))
        if not self._agree(part.outputs, self.whole.outputs, sample):
            self.works = False
            return None
        own: list[Tensor | None] = []
        for gradient, layout in zip(grads, self.layouts, strict=True):
            owned = gradient is not None and isinstance(layout, AxisLayout)
            own.append(vectorised.by_sample(gradient, layout)[sample] if owned else None)  # type: ignore[arg-type]
        return part(own)

    def together(self, samples: range, grads: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Return the gradients of each operand for some samples at once, [n, *shape]; None where they cannot be had.

        The outputs are compared with those of the whole call, and at the first use of such a call the gradients of two
        samples with those that are had one by one.
        """
        if self._found[0] != samples:
            found = vectorised.gradients(self.call, self.inputs, self.axes, grads, self.layouts, samples)
            if found is None or not self._agree_together(found[1], samples):
                return None
            if not vectorised.agreed((self._key, "vmap"), lambda: self._agree_one_by_one(found[0], samples, grads)):
                return None
            self._found = samples, found[0]
        return self._found[1]

    def _agree_together(self, parts: Sequence[Tensor], samples: range) -> bool:
        """Tell whether outputs of some samples, [n, ...], are their part of all outputs, up to rounding."""
        for part, output, layout in zip(parts, self.whole.outputs, self.layouts, strict=True):
            if isinstance(layout, AxisLayout) and output.numel():
                expected = vectorised.by_sample(output.detach(), layout)[samples.start : samples.stop]
                if part.numel() != expected.numel():
                    return False
                limit = TOLERANCE[expected.dtype.to_real()] * expected.flatten(1).abs().amax(1, keepdim=True)
                difference = (part.detach().reshape(expected.shape) - expected).flatten(1).abs()
                if not bool((difference <= limit).all()):
                    return False
        return True

    def _agree_one_by_one(self, found: Sequence[Tensor], samples: range, grads: Sequence[Tensor | None]) -> bool:
        """Compare the gradients of the first and the last of some samples with those that are had one by one."""
        for sample in {samples[0], samples[-1]}:
            expected = self(sample, grads)
            if expected is None:
                return False
            for got, want in zip(found, expected, strict=True):
                own = got[sample - samples.start]
                want = torch.zeros_like(own) if want is None else want.to_dense()
                if not vectorised.is_close(own, want):
                    return False
        return True

    def _cut(self, sample: int) -> list[Tensor]:
        """Return one sample's data."""
        pairs = zip(self.inputs, self.axes, strict=True)
        return [tensor if axis is None else vectorised.by_sample(tensor, axis)[sample] for tensor, axis in pairs]

    def _agree(self, part: Sequence[Tensor], whole: Sequence[Tensor], sample: int) -> bool:
        """Tell whether the outputs for one sample are its part of all outputs, up to rounding."""
        for output, full, layout in zip(part, whole, self.layouts, strict=True):
            if isinstance(layout, AxisLayout):
                expected = vectorised.by_sample(full.detach(), layout)[sample]
                if output.shape != expected.shape:
                    return False
                tolerance = TOLERANCE[expected.dtype.to_real()] * expected.abs().amax()
                if output.numel() and not bool((output.detach() - expected).abs().amax() <= tolerance):
                    return False
        return True

    def _agrees_elsewhere(self, n_samples: int) -> bool:
        """Check the first and the last sample at other values of the operands."""
        values = []
        for operand in self.call.operands:
            generator = torch.Generator(operand.value.device).manual_seed(0)
            noise = torch.randn(operand.value.shape, generator=generator, device=operand.value.device)
            values.append(operand.value + noise.to(operand.value.dtype))
        try:
            with torch.no_grad():
                whole = self.call.run(values, self.inputs)
                return all(
                    self._agree(self.call.run(values, self._cut(sample)), whole, sample)
                    for sample in (0, n_samples - 1)
                )
        except Exception:  # the operation itself refuses a batch of one sample
            return False


def _axis(tensor: Tensor, output: AxisLayout) -> AxisLayout | None:
    """Guess the sample axis of a data tensor by its size: the output's dimension first."""
    dims = [output.dim, *(dim for dim in range(tensor.dim()) if dim != output.dim)]
    for outer, inner in dict.fromkeys([(output.outer, output.inner), (1, 1)]):
        for dim in dims:
            if dim < tensor.dim() and tensor.shape[dim] == outer * output.n_samples * inner:
                return AxisLayout(dim, outer, output.n_samples, inner)
    return None
