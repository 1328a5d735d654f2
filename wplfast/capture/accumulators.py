"""Where the squared per-sample gradients of a pass go, and the record of which rule served what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

#: What serves a parameter one sample at a time: local backward passes, masked gradients, whole backward passes.
SLOW_RULES = frozenset({"generic", "masked", "one by one"})


class Accumulators:
    """One accumulator for each watched parameter, by its index.

    Attributes:
        fisher: ``sum_n w_n g_n^2``, contiguous, float32 or wider, of the parameters' shapes.
        like: tensors of the same shapes, dtypes and devices, whose values count for nothing.
        gradient: ``sum_n w_n g_n``, of the same shapes; None if it is not wanted.
        weights: w of the batch at hand, float64 [N] on the losses' device; None for ones.
        rules: index -> names of the rules that served the parameter.
        seconds: name of a rule -> wall time that it took.
        n_passes: number of backward passes so far.
    """

    def __init__(
        self, fisher: Sequence[Tensor], gradient: Sequence[Tensor] | None, like: Sequence[Tensor] | None = None
    ) -> None:
        """Add to these tensors."""
        self.fisher, self.gradient, self.like = fisher, gradient, fisher if like is None else like
        self.weights: Tensor | None = None
        self.rules: list[set[str]] = [set() for _ in self.like]
        self.seconds: dict[str, float] = defaultdict(float)
        self.n_passes = 0

    def gradient_of(self, index: int) -> Tensor | None:
        """Return the accumulator of a parameter's plain gradient, if that is wanted."""
        return None if self.gradient is None else self.gradient[index]

    def sums(self) -> list[Tensor]:
        """Return the sum of all entries of each parameter's squares."""
        return [fisher.sum() for fisher in self.fisher]

    def clear(self, index: int) -> None:
        """Forget what one parameter gathered, and what served it."""
        self.fisher[index].zero_()
        self.rules[index].clear()
        if self.gradient is not None:
            self.gradient[index].zero_()
