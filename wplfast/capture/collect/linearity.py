"""Do gradients scale with the losses? Not where a hook on an activation clips them, or a Function's backward pass does.

Powers of two tell nothing there of which sample a row belongs to, and the passes come in pairs
(:mod:`wplfast.capture.probe.weights`). What is collected has weights 1 in any case: a hook sees each sample's own rows
as it sees them in a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..call_site import Listener
from ..probe.hooks import called_in
from ..probe.weights import WIDE_RADIX, Projection
from .batch import Batch
from .leaf_grads import LeafGrads
from .mixed import is_about_positions
from .passes import CollectPass, ProjectionPass

#: The outermost weights of probing passes.
_LARGE, _SMALL = -(2.0 ** (WIDE_RADIX // 2)), 2.0 ** -(WIDE_RADIX // 2)


class Linearity:
    """What is known of it, and how it is found out.

    Args:
        run: runs a backward pass over losses, with weights, for a listener, and keeps the graph or not.
        leaf_grads: where ordinary gradients arrive.

    Attributes:
        is_bent: some gradient did not scale with the losses.
    """

    def __init__(self, run: Callable[[Tensor, Tensor | None, Listener, bool], None], leaf_grads: LeafGrads) -> None:
        self._run, self._leaf_grads = run, leaf_grads
        self.is_bent = False

    def explains(self, collected: CollectPass, batch: Batch) -> bool:
        """Tell whether what a pass could not collect is explained by gradients that do not scale."""
        calls = [*collected.mixed, *collected.moved]
        bare = [tapped for tapped in calls if not tapped.call.differentiable_inputs]
        positions = [tapped for tapped in bare if is_about_positions(tapped, len(batch.losses))]
        if collected.foreign:
            self.is_bent = True  # or what arrives there is foreign indeed: pairs show it
            return True
        if len(bare) == len(calls):
            return len(positions) < len(bare) and self.is_bent_in(batch)
        # What follows from positions may seem mixed: they are learnt of first.
        return not positions and self.is_bent_in(batch)

    def is_bent_in(self, batch: Batch) -> bool:
        """Tell whether some gradient of a batch is not multiplied by a large and a small factor.

        A hook that clips bends with the large one, one that rounds to a type of few exponents with the small one.
        """
        plain = self._projections(batch, 1.0)
        for factor in (_LARGE, _SMALL):
            for scaled, one in zip(self._projections(batch, factor), plain, strict=False):
                left_out = ~one.rows.isfinite()  # rows that no parameter sees, or an error of their own
                if not scaled.without(left_out).is_scaled(one.without(left_out), factor):
                    self.is_bent = True
        return self.is_bent

    def names(self, batch: Batch) -> str:
        """Name the hooks and Functions that a backward pass of the batch calls, for a message."""
        found = called_in(lambda: self._projections(batch, 1.0))
        return f". Hooks and Functions that may mix them: {', '.join(found[:6])}" if found else ""

    def _projections(self, batch: Batch, factor: float) -> list[Projection]:
        """Return projections of all gradients for losses times a factor."""
        listener = ProjectionPass(len(batch.losses))
        self._run(batch.losses, torch.full((len(batch.losses),), factor, device="cpu"), listener, True)
        self._leaf_grads.drop()
        return listener.found
