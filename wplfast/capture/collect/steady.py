"""The steady batch: calls whose layouts are known run recipes, from the gradient straight to the kernel.

Once a batch was collected, another one that made the same calls on tensors of the same sizes need not ask who owns
what, which rule serves a call or how many uses a parameter has. A call all of whose parameters are used by it alone has
a *recipe* (:meth:`Rule.recipe`); the others go the common way (:class:`.round.Round`), with layouts that are known.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import WplfastError
from ..accumulators import Accumulators
from ..call_site import TappedCall
from ..probe.weights import negligible
from ..rules.recipe import Recipe
from ..sample_layout import AxisLayout, OneSample, SampleLayout
from .round import OutputGrads, Round

Layouts = Sequence[SampleLayout | None]


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
        uses = Counter(index for tapped in taps for index in tapped.parameters)
        self._recipes: list[Recipe | None] = [
            tapped.rule.recipe(tapped.call, found, tapped.shapes, accumulators)
            if tapped.index not in asleep and all(uses[index] == 1 for index in tapped.parameters)
            else None
            for tapped, found in zip(taps, self._layouts, strict=True)
        ]
        self._is_direct = len(asleep) == sum(recipe is None for recipe in self._recipes)
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
        if not self._is_direct:
            pairs = zip(taps, self._recipes, strict=True)
            left = [tapped for tapped, recipe in pairs if recipe is None and tapped.index not in self._asleep]
            self._round = Round(left, self._accumulators, self._names)
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
        if self._round is not None:
            self._round.finish()
            self._round = None
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in parameters:
                if tensor.grad is not None:
                    return False
            return all(tensor.grad is None for tensor in derived)
