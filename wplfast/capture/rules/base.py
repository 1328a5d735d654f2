"""What a rule offers; CONTRIBUTING.md walks through adding one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..call import Call
from ..local import LocalBackward
from ..ownership import Ownership
from ..uses import Use


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

    def ordinary(self, call: Call, data: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the ordinary gradients of the sources, as autograd computes them: what ``verify`` compares with."""
        return LocalBackward(call, data)(grads)
