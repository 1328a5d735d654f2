"""The steady batch: calls whose layouts are known run recipes, from the gradient straight to the kernel.

Once a batch was collected, another one that made the same calls on tensors of the same sizes need not ask who owns
what, which rule serves a call or how many uses a parameter has. A call all of whose parameters are used by it alone has
a *recipe* (:meth:`Rule.recipe`), and so have the steps of a loop that alone use theirs (:class:`Steps`), as one call on
all of them; the others go the common way (:class:`.round.Round`), with layouts that are known.
"""

from __future__ import annotations

import operator
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import WplfastError
from ..accumulators import Accumulators
from ..call_site import TappedCall
from ..probe.weights import negligible
from ..rules.recipe import Recipe
from ..sample_layout import AxisLayout, OneSample, SampleLayout, is_row_a_sample
from .round import OutputGrads, Round

Layouts = Sequence[SampleLayout | None]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors along dimension 1; a view where they lie one after the other in one tensor, as slices of it do."""
    first, second = tensors[0], tensors[min(1, len(tensors) - 1)]
    start, step = first.storage_offset(), second.storage_offset() - first.storage_offset()
    if step > 0 and all(
        tensor.storage_offset() == start + index * step
        and tensor.shape == first.shape
        and tensor.stride() == first.stride()
        and tensor.dtype == first.dtype
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for index, tensor in enumerate(tensors)
    ):
        (n, *rest), (row, *strides) = first.shape, first.stride()
        return first.as_strided((n, len(tensors), *rest), (row, step, *strides), start)
    return torch.stack(list(tensors), 1)


class _Stack:
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
        self, first: TappedCall, n_steps: int, recipe: Recipe, seconds: dict[str, float], stack: _Stack
    ) -> None:
        self._call, self._name, self._recipe, self._seconds = first.call, first.rule.name, recipe, seconds
        self._n_steps = self._left = n_steps
        self._inputs: list[Sequence[Tensor]] = []
        self._grads: list[Tensor] = []
        self._stack = stack

    @staticmethod
    def of(
        taps: Sequence[TappedCall], layouts: Sequence[Layouts], accumulators: Accumulators, stack: _Stack
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


class SteadyBatch:
    """What a batch of known calls does with the gradients that it sees.

    A call whose gradient counted for nothing when its layout was to be measured is *asleep*: it is left out as long as
    its gradient is that small, which is looked at once in the end. LoRA begins with such calls, and in very deep stacks
    the first layers are some.

    Args:
        taps: the calls of such a batch.
        layouts: their outputs' layouts, by index.
        asleep: indices of calls whose gradients counted for nothing.
        accumulators: what squares are added to.
        names: of the parameters.
    """

    def __init__(
        self,
        taps: Sequence[TappedCall],
        layouts: Mapping[int, Layouts],
        asleep: set[int],
        accumulators: Accumulators,
        names: Sequence[str],
    ) -> None:
        self._accumulators, self._names = accumulators, names
        self._asleep = {index: taps[index].parameters for index in asleep}
        self._sizes: list[tuple[int, Tensor, float]] = []  # of their gradients, and up to which these are negligible
        self._layouts = [layouts[tapped.index] for tapped in taps]
        self._recipes: list[Recipe | None] = [None] * len(taps)
        self._stack = _Stack()
        self._steps: list[Steps | None] = [None] * len(taps)
        uses: dict[int, list[int]] = defaultdict(list)
        for index, tapped in enumerate(taps):
            for parameter in tapped.parameters:
                uses[parameter].append(index)
        for index, tapped in enumerate(taps):
            same = uses[min(tapped.parameters)]
            # Who else uses one of its parameters uses all of them, and no others.
            if index != same[0] or any(uses[parameter] != same for i in same for parameter in taps[i].parameters):
                continue
            found = self._layouts[index]
            if not asleep.isdisjoint(same):
                continue
            if len(same) == 1:
                self._recipes[index] = tapped.rule.recipe(tapped.call, found, tapped.shapes, accumulators)
            else:
                steps = Steps.of([taps[i] for i in same], [self._layouts[i] for i in same], accumulators, self._stack)
                for i in same:
                    self._steps[i] = steps
        self._loops = list({id(steps): steps for steps in self._steps if steps is not None}.values())
        self._others = [
            index
            for index in range(len(taps))
            if index not in asleep and self._recipes[index] is None and self._steps[index] is None
        ]
        self._round: Round | None = None

    @staticmethod
    def is_possible(taps: Sequence[TappedCall], layouts: Mapping[int, Layouts], asleep: set[int]) -> bool:
        """Tell whether all outputs of all calls have layouts that hold for every such batch, or are asleep alone."""
        if len(layouts) != len(taps):
            return False
        for tapped in taps:
            if tapped.index in asleep:
                if len(tapped.shapes) > 1:
                    return False
            elif not all(isinstance(layout, (AxisLayout, OneSample)) for layout in layouts[tapped.index]):
                return False
        uses = Counter(index for tapped in taps for index in tapped.parameters) if asleep else {}
        return all(uses[parameter] == 1 for index in asleep for parameter in taps[index].parameters)

    @property
    def may_wake(self) -> bool:
        """Whether calls are asleep, so that the graph may be needed again."""
        return bool(self._asleep)

    def woken(self) -> set[int]:
        """Return the parameters of calls that were asleep and are no longer: they were left out of the last pass."""
        sizes, self._sizes = self._sizes, []
        if not sizes:
            return set()
        device = sizes[0][1].device
        found = torch.stack([size.to(device, torch.float64) for _, size, _ in sizes]).tolist()
        awake = [index for (index, _, limit), size in zip(sizes, found, strict=True) if not size <= limit]
        return {parameter for index in awake for parameter in self._asleep[index]}

    def start(self, taps: Sequence[TappedCall]) -> SteadyBatch:
        """Begin a pass over the calls of a batch; return what listens to it."""
        for steps in self._loops:
            steps.start()
        self._stack.clear()
        if self._others:
            self._round = Round([taps[index] for index in self._others], self._accumulators, self._names)
        return self

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Square the gradient of one call, or let it wait for others."""
        index = tapped.index
        if index < 0:
            raise WplfastError(
                f"{self._names[min(tapped.parameters)]!r} is used ({tapped.call.name}) inside a backward pass, as in a "
                "checkpoint of one's own, though not in earlier batches of the same calls and the same graph; use "
                "torch.utils.checkpoint, or make the uses in there the same ones in every batch"
            )
        steps = self._steps[index]
        if steps is not None:
            steps.take(inputs, grads[0])
            return tapped.nothing
        recipe = self._recipes[index]
        if recipe is not None:
            started = time.perf_counter()
            recipe(tapped.call, inputs, grads)
            self._accumulators.seconds[tapped.rule.name] += time.perf_counter() - started
        elif index in self._asleep:
            gradient = grads[0]
            if gradient is not None and gradient.numel():
                size = torch.linalg.vector_norm(gradient, torch.inf)
                self._sizes.append((index, size, negligible(gradient.dtype)))
        elif self._round is not None:
            self._round.take(OutputGrads(tapped, inputs, grads, self._layouts[index]))
            self._round.reported(tapped)
        return tapped.nothing

    def finish(self, parameters: Sequence[Tensor], derived: Sequence[Tensor]) -> bool:
        """Square what is left; tell whether no gradient arrived at a parameter or derived tensor past the taps."""
        for steps in self._loops:
            steps.finish()
        self._stack.clear()
        if self._round is not None:
            self._round.finish()
            self._round = None
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in parameters:
                if tensor.grad is not None:
                    return False
            return all(tensor.grad is None for tensor in derived)
