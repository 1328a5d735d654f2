"""A part of a penalty, as a handle for hot loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .loss import WeightPlasticityLoss


class Subset:
    """The penalty over a fixed set of names; see :meth:`WeightPlasticityLoss.subset`.

    Iterating over it yields the names with their parameters, as ``params`` takes them.
    """

    def __init__(self, penalty: WeightPlasticityLoss, names: tuple[str, ...]) -> None:
        """Refer to a penalty."""
        self.penalty, self.names = penalty, names

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield pairs of name and parameter.

        Raises:
            NameMismatchError: if the penalty dropped a name since.
        """
        references = self.penalty._groups.references
        names, tensors = references.chosen(self.names), references.tensors()
        return ((name, tensors[references.index[name]]) for name in names)

    def __call__(self) -> Tensor:
        """Return the penalty over the names."""
        value: Tensor = self.penalty(active=self.names)
        return value

    def add_grad_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add its gradient; see :meth:`WeightPlasticityLoss.add_grad_`."""
        return self.penalty.add_grad_(scale, active=self.names)
