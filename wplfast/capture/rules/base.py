"""What a rule offers; CONTRIBUTING.md walks through adding one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor

from ...ops.layout import flat_dtype
from ..call import Call, Source
from ..sample_layout import Layout, Ownership, Single, is_summable, sum_to
from .grad_sample import OwnedUse, SummedUse, Use
from .local import LocalBackward


class Rule(ABC):
    """How the per-sample gradients of a call's sources follow from its data and its outputs' gradients.

    Attributes:
        name: what the report calls it.
        fast: False for the per-sample fallback.
    """

    name: str
    fast = True

    @abstractmethod
    def matches(self, call: Call) -> bool:
        """Tell whether the rule may serve a call; asked in the forward pass."""

    def needs_data(self, call: Call) -> bool:
        """Tell whether the rule needs the call's data; if not, none is kept and the rule must serve every owner."""
        return True

    @abstractmethod
    def uses(
        self,
        call: Call,
        data: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        owners: Sequence[Ownership | None],
    ) -> list[Use] | None:
        """Return one use per source.

        Args:
            call: the call.
            data: its data tensors, in the order of their slots (empty unless ``needs_data``).
            grads: the gradient of each floating point output; None where it took no part in the loss.
            owners: for each output, who owns its elements (None where the gradient is None or zero).

        Returns:
            The uses; None to leave the call to the generic rule.
        """

    def stackable(self, call: Call) -> bool:
        """Tell whether calls on [N, D] with the same sources are steps of the call on [N, T, D], steps along T."""
        return False

    def product(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """Return W [D_out, D_in] and b [D_out] where the call is ``x W^T + b`` of its only data; None otherwise."""
        return None

    def ordinary(self, call: Call, data: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the ordinary gradients of the sources, as autograd computes them: what ``verify`` compares with."""
        return LocalBackward(call, data)(grads)


class OneOutputRule(Rule):
    """A rule for calls with one floating point output."""

    @abstractmethod
    def serve(self, call: Call, data: Sequence[Tensor], gradient: Tensor, owner: Ownership) -> list[Use] | None:
        """Return one use per source; None to leave the call to the generic rule.

        Args:
            call: the call.
            data: its data tensors, in the order of their slots (empty unless ``needs_data``).
            gradient: the gradient of the output.
            owner: who owns its elements.
        """

    def uses(
        self,
        call: Call,
        data: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        owners: Sequence[Ownership | None],
    ) -> list[Use] | None:
        """Serve the output, if it took part in the loss."""
        gradient, owner = grads[0], owners[0]
        return [] if gradient is None or owner is None else self.serve(call, data, gradient, owner)


def summed(source: Source, rule: str, owner: Ownership, gradient: Tensor) -> Use:
    """Return the use of a source that was broadcast to the shape of ``gradient``: the sum over what was broadcast."""
    if source.base is not None and is_summable(owner, gradient, source.base.value.shape):
        source = source.base
    shape = source.value.shape
    if is_summable(owner, gradient, shape):
        return SummedUse(source, rule, sum_to(owner, gradient, shape))
    return OwnedUse(source, rule, owner, gradient)


def by_batch(owner: Ownership) -> TypeGuard[Layout | Single]:
    """Tell whether samples own whole slices along dimension 0, as images do."""
    return isinstance(owner, Single) or (isinstance(owner, Layout) and owner.dim == 0)


def channel_rows(owner: Ownership, tensor: Tensor) -> Tensor:
    """Arrange [B, C, *L] as rows of channels [N, T, C]; a view where a sample owns one slice."""
    return owner.rows(tensor.movedim(1, -1))


def channels_of(source: Source, rule: str, owner: Ownership, gradient: Tensor) -> Use:
    """Return the use of a bias per channel of [B, C, *L], whoever owns what."""
    return OwnedUse(source, rule, owner, gradient, lambda whole: whole.movedim(1, -1))


def row_sums(rows: Tensor) -> Tensor:
    """Sum rows [N, T, D] to the gradients of a bias [N, D], in float32 or wider."""
    wide = flat_dtype(rows.dtype)
    return rows[:, 0].to(wide) if rows.shape[1] == 1 else rows.sum(1, dtype=wide)
