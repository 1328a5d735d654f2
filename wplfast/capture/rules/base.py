"""What a rule offers; CONTRIBUTING.md walks through adding one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ...ops.layout import flat_dtype
from ..accumulators import Accumulators
from ..call import Call, Operand
from ..sample_layout import AxisLayout, OneSample, SampleLayout, is_summable, sum_to
from .complex import real_gradient
from .grad_sample import GradSample, MaskedGradSample, SummedGradSample
from .local import LocalBackward
from .projection import Direction
from .recipe import Recipe

#: Elements of sparse data that may be made dense in any case.
LARGE = 1 << 26


class Rule(ABC):
    """How the per-sample gradients of a call's operands follow from its data and its outputs' gradients.

    Attributes:
        name: what the report calls it.
        fast: False for the per-sample fallback.
    """

    name: str
    fast = True

    @abstractmethod
    def matches(self, call: Call) -> bool:
        """Tell whether the rule may serve a call; asked in the forward pass."""

    def needs_inputs(self, call: Call) -> bool:
        """Tell whether the rule needs the call's inputs; if not, none is kept and the rule must serve every layout."""
        return True

    @abstractmethod
    def grad_samples(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        layouts: Sequence[SampleLayout | None],
    ) -> list[GradSample] | None:
        """Return one :class:`GradSample` per operand.

        Args:
            call: the call.
            inputs: its data tensors, in the order of their slots (empty unless ``needs_inputs``).
            grads: the gradient of each floating point output; None where it took no part in the loss.
            layouts: for each output, who owns its elements (None where the gradient is None or zero).

        Returns:
            The uses; None to leave the call to the generic rule.
        """

    def stackable(self, call: Call) -> bool:
        """Tell whether calls on [N, D] with the same operands are steps of the call on [N, T, D], steps along T."""
        return False

    def product(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """Return W [D_out, D_in] and b [D_out] where the call is ``x W^T + b`` of its only data; None otherwise."""
        return None

    def term(self, call: Call) -> Tensor | None:
        """Return p where the call is ``x + p`` of its only data, whose gradient is the output's; None otherwise."""
        return None

    def recipe(
        self,
        call: Call,
        layouts: Sequence[SampleLayout | None],
        shapes: Sequence[torch.Size],
        accumulators: Accumulators,
    ) -> Recipe | None:
        """Return what squares the gradients of calls like this one, all of whose parameters are used by it alone.

        It saves what :meth:`grad_samples` and the rounds of a pass cost in Python; results are the same.

        Args:
            call: the call; those that the recipe serves have arguments, operands and sizes like it.
            layouts: of its outputs.
            shapes: of its outputs.
            accumulators: what to add to.

        Returns:
            The recipe; None where there is none, so that each call is turned into grad samples.
        """
        return None

    def ordinary(self, call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the ordinary gradients of the operands, as autograd computes them: what ``verify`` compares with."""
        return LocalBackward(call, inputs)(grads)

    def projected(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        directions: Sequence[Direction],
    ) -> list[Tensor] | None:
        """Return projections [k] of the ordinary gradients, one a direction, without computing these.

        They are what ``verify`` compares with: they follow from ``inputs`` and ``grads`` by a formula of their own, and
        not from what :meth:`grad_samples` makes of these. Asked of calls alone all of whose operands are whole
        parameters. None: :meth:`ordinary` is to be asked.
        """
        return None


class OneOutputRule(Rule):
    """A rule for calls with one floating point output."""

    @abstractmethod
    def serve(
        self, call: Call, inputs: Sequence[Tensor], gradient: Tensor, layout: SampleLayout
    ) -> list[GradSample] | None:
        """Return one :class:`GradSample` per operand; None to leave the call to the generic rule.

        Args:
            call: the call.
            inputs: its data tensors, in the order of their slots (empty unless ``needs_inputs``).
            gradient: the gradient of the output.
            layout: who owns its elements.
        """

    def grad_samples(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        layouts: Sequence[SampleLayout | None],
    ) -> list[GradSample] | None:
        """Serve the output, if it took part in the loss."""
        gradient, layout = grads[0], layouts[0]
        return [] if gradient is None or layout is None else self.serve(call, inputs, gradient, layout)


def summed(operand: Operand, rule: str, layout: SampleLayout, gradient: Tensor) -> GradSample:
    """Return the use of an operand that was broadcast to the shape of ``gradient``: the sum over what was broadcast."""
    if gradient.is_complex():
        operand, layout, gradient = real_gradient(operand, layout, gradient)
    if operand.base is not None and is_summable(layout, gradient.dim(), operand.base.value.shape):
        operand = operand.base
    shape = operand.value.shape
    if is_summable(layout, gradient.dim(), shape):
        return SummedGradSample(operand, rule, sum_to(layout, gradient, shape))
    return MaskedGradSample(operand, rule, layout, gradient)


def by_batch(layout: SampleLayout) -> TypeGuard[AxisLayout | OneSample]:
    """Tell whether samples own whole slices along dimension 0, as images do."""
    return isinstance(layout, OneSample) or (isinstance(layout, AxisLayout) and layout.dim == 0)


def channel_rows(layout: SampleLayout, tensor: Tensor) -> Tensor:
    """Arrange [B, C, *L] as rows of channels [N, T, C]; a view where a sample owns one slice."""
    return layout.rows(tensor.movedim(1, -1))


def channels_of(operand: Operand, rule: str, layout: SampleLayout, gradient: Tensor) -> GradSample:
    """Return the use of a bias per channel of [B, C, *L], whoever owns what."""
    return MaskedGradSample(operand, rule, layout, gradient, lambda whole: whole.movedim(1, -1))


def dense(data: Tensor, operand: Operand) -> Tensor | None:
    """Return data, sparse ones as a dense tensor; None where that would be much larger than the operand."""
    if data.layout == torch.strided:
        return data
    return data.to_dense() if data.numel() <= max(LARGE, 4 * operand.value.numel()) else None


def row_sums(rows: Tensor) -> Tensor:
    """Sum rows [N, T, D] to the gradients of a bias [N, D], in float32 or wider."""
    wide = flat_dtype(rows.dtype)
    return rows[:, 0].to(wide) if rows.shape[1] == 1 else rows.sum(1, dtype=wide)
