"""The local backward pass of one call: run again on its saved data, with its operands requiring grad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call
from ..sample_layout import AxisLayout, SampleLayout

#: How far the call on one sample may be from its part of the whole call: rounding, not another function.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class LocalBackward:
    """A call run again with its operands requiring grad."""

    def __init__(self, call: Call, inputs: Sequence[Tensor]) -> None:
        """Run the call."""
        with torch.enable_grad():
            self.operands = [operand.value.detach().requires_grad_() for operand in call.operands]
            self.outputs = call.run(self.operands, [tensor.detach() for tensor in inputs])

    def __call__(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the operands for gradients of the outputs."""
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
        self.works = False
        if call.random_state is not None or not isinstance(first, AxisLayout):
            return
        if all(isinstance(layout, AxisLayout) and layout.outer == layout.inner == 1 for layout in layouts):
            self.dims = [_dimension(tensor, first.n_samples, first.dim) for tensor in inputs]
            if any(dim is not None for dim in self.dims):
                self.works = self._agrees_elsewhere(first.n_samples)

    def __call__(self, sample: int, grads: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Return the gradients of the operands for one sample; None, from now on, if the guess is wrong."""
        part = LocalBackward(self.call, self._cut(sample))
        if not self._agree(part.outputs, self.whole.outputs, sample):
            self.works = False
            return None
        own: list[Tensor | None] = []
        for gradient, layout in zip(grads, self.layouts, strict=True):
            owned = gradient is not None and isinstance(layout, AxisLayout)
            own.append(gradient.narrow(layout.dim, sample, 1) if owned else None)  # type: ignore[union-attr]
        return part(own)

    def _cut(self, sample: int) -> list[Tensor]:
        """Return one sample's data."""
        pairs = zip(self.inputs, self.dims, strict=True)
        return [tensor if dim is None else tensor.narrow(dim, sample, 1) for tensor, dim in pairs]

    def _agree(self, part: Sequence[Tensor], whole: Sequence[Tensor], sample: int) -> bool:
        """Tell whether the outputs for one sample are its part of all outputs, up to rounding."""
        for output, full, layout in zip(part, whole, self.layouts, strict=True):
            if isinstance(layout, AxisLayout):
                expected = full.detach().narrow(layout.dim, sample, 1)
                if output.shape != expected.shape:
                    return False
                tolerance = TOLERANCE[expected.dtype] * expected.abs().amax()
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


def _dimension(tensor: Tensor, n_samples: int, preferred: int) -> int | None:
    """Return the dimension of a data tensor that has the batch's size, the output's sample axis first."""
    dims = [preferred, *(dim for dim in range(tensor.dim()) if dim != preferred)]
    return next((dim for dim in dims if dim < tensor.dim() and tensor.shape[dim] == n_samples), None)
