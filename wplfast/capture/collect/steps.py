"""Steps of a loop on the same parameters: their gradients wait for one another, and are squared as one call's."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..accumulators import Accumulators
from ..call_site import TappedCall
from ..rules.recipe import Recipe
from ..sample_layout import SampleLayout, is_row_a_sample


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors along dimension 1; a view where they lie one after the other in one tensor, as slices of it do."""
    first, second = tensors[0], tensors[min(1, len(tensors) - 1)]
    start, step = first.storage_offset(), second.storage_offset() - first.storage_offset()
    memory = first.untyped_storage().data_ptr()
    if step > 0 and all(
        tensor.storage_offset() == start + index * step
        and tensor.shape == first.shape
        and tensor.stride() == first.stride()
        and tensor.dtype == first.dtype
        and tensor.untyped_storage().data_ptr() == memory
        for index, tensor in enumerate(tensors)
    ):
        (n, *rest), (row, *strides) = first.shape, first.stride()
        return first.as_strided((n, len(tensors), *rest), (row, step, *strides), start)
    return torch.stack(list(tensors), 1)


class GradientStack:
    """The last stack of gradients: what is added up (``x W + h U + b``) has one gradient for all its terms."""

    def __init__(self) -> None:
        self._of: Sequence[Tensor] = ()
        self._stacked: Tensor | None = None

    def of(self, grads: Sequence[Tensor]) -> Tensor:
        """Return these gradients stacked along dimension 1."""
        alike = len(grads) == len(self._of) and all(map(operator.is_, grads, self._of))
        if self._stacked is None or not alike:
            self._of, self._stacked = grads, torch.stack(list(grads), 1)
        return self._stacked

    def clear(self) -> None:
        """Forget it."""
        self._of, self._stacked = (), None


class Steps:
    """The steps of one loop on the same parameters: their gradients wait for one another.

    Args:
        first: one of the calls, which stands for all.
        n_steps: how many there are.
        recipe: what squares the gradients of that call on [N, T, D], steps along T.
        seconds: name of a rule -> wall time that it took.
        stack: of gradients, which several parameters may have in common.
    """

    def __init__(
        self, first: TappedCall, n_steps: int, recipe: Recipe, seconds: dict[str, float], stack: GradientStack
    ) -> None:
        self._call, self._name, self._recipe, self._seconds = first.call, first.rule.name, recipe, seconds
        self._n_steps = self._left = n_steps
        self._inputs: list[Sequence[Tensor]] = []
        self._grads: list[Tensor] = []
        self._stack = stack

    @staticmethod
    def of(
        taps: Sequence[TappedCall],
        layouts: Sequence[Sequence[SampleLayout | None]],
        accumulators: Accumulators,
        stack: GradientStack,
    ) -> Steps | None:
        """Return the steps that some calls are; None if they are no steps, or have no recipe.

        Args:
            taps: all the calls that use some parameters.
            layouts: of each one's outputs.
            accumulators: what to add to.
            stack: of gradients.
        """
        first = taps[0]
        call, layout = first.call, layouts[0][0]
        if len(first.shapes) != 1 or len(first.shapes[0]) != 2 or not is_row_a_sample(layout):
            return None
        alike = (
            first.rule is other.rule
            and first.shapes == other.shapes
            and call.step_key == other.call.step_key
            and call.input_shapes == other.call.input_shapes
            and (call.args, call.kwargs) == (other.call.args, other.call.kwargs)
            for other in taps
        )
        if any(found != layouts[0] for found in layouts) or not all(alike) or not first.rule.stackable(call):
            return None
        n, width = first.shapes[0]
        recipe = first.rule.recipe(call, layouts[0], [torch.Size((n, len(taps), width))], accumulators)
        return None if recipe is None else Steps(first, len(taps), recipe, accumulators.seconds, stack)

    def start(self) -> None:
        """Begin a pass."""
        self._left = self._n_steps
        self._inputs.clear()
        self._grads.clear()

    def take(self, inputs: Sequence[Tensor], gradient: Tensor | None) -> None:
        """Take the gradient of one step; square all with that of the last."""
        if gradient is not None:
            self._inputs.append(inputs)
            self._grads.append(gradient)
        self._left -= 1
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """Square what waits: steps that no gradient reached did not report."""
        if not self._grads:
            return
        started = time.perf_counter()
        inputs = [stacked(tensors[::-1]) for tensors in zip(*self._inputs, strict=True)]
        self._recipe(self._call, inputs, [self._stack.of(self._grads[::-1])])
        self.start()
        self._seconds[self._name] += time.perf_counter() - started
