"""The steady batch: calls whose layouts are known run recipes, from the gradient straight to the kernel.

Once a batch was collected, another one that made the same calls on tensors of the same sizes need not ask who owns
what, which rule serves a call or how many uses a parameter has. A call all of whose parameters are used by it alone has
a *recipe* (:meth:`Rule.recipe`), and so have the steps of a loop that alone use theirs (:class:`.steps.Steps`), as one
call on all of them; the others go the common way (:class:`.round.Round`), with layouts that are known.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import WplfastError
from ..accumulators import Accumulators
from ..call_site import TappedCall
from ..probe.weights import smallest
from ..rules.recipe import Recipe
from ..sample_layout import AxisLayout, OneSample, SampleLayout
from .round import OutputGrads, Round
from .steps import GradientStack, Steps

Layouts = Sequence[SampleLayout | None]


class SteadyBatch:
    """What a batch of known calls does with the gradients that it sees.

    A call whose gradient counted for nothing when its layout was to be measured is *asleep*: it is left out as long as
    its gradient is that small, which is looked at once in the end. LoRA begins with such calls, and in very deep stacks
    the first layers are some.

    Args:
        taps: the calls of such a batch.
        layouts: their outputs' layouts, by index; none of calls that are not in the graph behind the losses.
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
        self._layouts = [layouts.get(tapped.index, ()) for tapped in taps]
        self._reached = set(layouts)
        self._recipes: list[Recipe | None] = [None] * len(taps)
        self._stack = GradientStack()
        self._steps: list[Steps | None] = [None] * len(taps)
        self._bind(taps, asleep)
        self._loops = list({id(steps): steps for steps in self._steps if steps is not None}.values())
        self._others = [
            index
            for index in range(len(taps))
            if index in layouts and index not in asleep and self._recipes[index] is None and self._steps[index] is None
        ]
        self._round: Round | None = None

    def _bind(self, taps: Sequence[TappedCall], asleep: set[int]) -> None:
        """Find the recipes of calls, and of loops, that alone use their parameters."""
        uses: dict[int, list[int]] = defaultdict(list)
        reached = [(index, tapped) for index, tapped in enumerate(taps) if index in self._reached]
        for index, tapped in reached:
            for parameter in tapped.parameters:
                uses[parameter].append(index)
        for index, tapped in reached:
            same = uses[min(tapped.parameters)]  # who else uses one of its parameters uses all of them, and no others
            if index != same[0] or not asleep.isdisjoint(same):
                continue
            if any(uses[parameter] != same for parameter in frozenset().union(*(taps[i].parameters for i in same))):
                continue
            if len(same) == 1:
                self._recipes[index] = tapped.rule.recipe(
                    tapped.call, self._layouts[index], tapped.shapes, self._accumulators
                )
            else:
                steps = Steps.of(
                    [taps[i] for i in same], [self._layouts[i] for i in same], self._accumulators, self._stack
                )
                for i in same:
                    self._steps[i] = steps

    @staticmethod
    def is_possible(taps: Sequence[TappedCall], layouts: Mapping[int, Layouts], asleep: set[int]) -> bool:
        """Tell whether all outputs of all calls have layouts that hold for every such batch, or are asleep alone."""
        for tapped in taps:
            if tapped.index not in layouts:
                continue
            if tapped.index in asleep:
                if len(tapped.shapes) > 1:
                    return False
            elif not all(isinstance(layout, (AxisLayout, OneSample)) for layout in layouts[tapped.index]):
                return False
        reached = [tapped for tapped in taps if tapped.index in layouts]
        uses = Counter(index for tapped in reached for index in tapped.parameters) if asleep else {}
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
                self._sizes.append((index, size, smallest(gradient.dtype)))
        elif self._round is not None:
            self._round.take(OutputGrads(tapped, inputs, grads, self._layouts[index]))
            self._round.reported(tapped)
        return tapped.nothing

    def finish(self, parameters: Sequence[Tensor], derived: Sequence[Tensor]) -> bool:
        """Square what is left; tell whether no gradient arrived at a parameter or derived tensor past the taps."""
        for steps in self._loops:
            steps.finish()
        if self._loops:
            self._stack.clear()
        if self._round is not None:
            self._round.finish()
            self._round = None
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in parameters:
                if tensor.grad is not None:
                    return False
            return all(tensor.grad is None for tensor in derived)
