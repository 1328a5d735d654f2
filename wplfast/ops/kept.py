"""What a backend keeps of penalties over lists of tensors, for calls over the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from .arguments import PenaltyArguments
from .prepared import PreparedPenalty

#: What was found: it takes alpha and l2, and returns a penalty to be evaluated at once.
Found: TypeAlias = Callable[[Tensor, Tensor], PreparedPenalty]


class KeptPenalties(Protocol):
    """Checks and tables of earlier calls; no tensor of theirs. See :func:`wplfast.backends.kept_penalties`.

    Both methods are for calls that nothing needs to see (:func:`.dispatched`).
    """

    def find(self, theta: Sequence[Tensor], theta_hat: Sequence[Tensor], fisher: Sequence[Tensor]) -> Found | None:
        """Return what lists as long as each other came to, if all tensors are proven to be what and where they were.

        What was checked of them holds then. They may be other objects, and need not be tensors at all.
        """

    def penalty(
        self,
        arguments: PenaltyArguments,
        theta: Sequence[Tensor],
        theta_hat: Sequence[Tensor],
        fisher: Sequence[Tensor],
    ) -> PreparedPenalty:
        """Return the penalty of checked arguments, and keep what they came to if they are the lists' own tensors."""
