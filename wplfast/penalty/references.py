"""References to parameters that belong to someone else, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import StaleParameterError
from ..ops.prepared import Link
from ..params import Params, check_names, named


class References:
    """Tensors by name, and where a module holds them, so that one that was replaced is noticed.

    A copy that was pickled has names alone; a deep copy refers to what the same deep copy made of the tensors.

    Args:
        params: see :class:`wplfast.WeightPlasticityLoss`.
        names: which of them, in this order; default: all.

    Raises:
        NameMismatchError: if params lacks a name.
    """

    def __init__(self, params: Params, names: Sequence[str] | None = None) -> None:
        parameters = named(params)
        if names is not None:
            check_names(parameters, names, "params")
            parameters = {name: parameters[name] for name in names}
        self.names = list(parameters)
        self.index = {name: i for i, name in enumerate(self.names)}
        self._tensors: list[Tensor] | None = list(parameters.values())
        self._root = params if isinstance(params, nn.Module) else None
        self._copied: dict[int, Any] | None = None  # id -> copy, until this copy is used
        self._paths: list[list[Link]] = []

    def __contains__(self, name: object) -> bool:
        """Tell whether a name is known."""
        return name in self.index

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.names)

    @property
    def bound(self) -> bool:
        """Whether there are tensors: not after unpickling."""
        return self._tensors is not None

    def tensors(self) -> list[Tensor]:
        """Return the tensors.

        Raises:
            StaleParameterError: if there are none since unpickling, or a module holds another one now.
        """
        if self._tensors is None:
            raise StaleParameterError("this penalty was unpickled without its parameters; call rebind(params) first")
        if self._copied is not None:  # by now the deep copy is complete, whatever the order of its parts was
            self._tensors = [self._copied.get(id(tensor), tensor) for tensor in self._tensors]
            self._root = self._copied.get(id(self._root), self._root)
            self._copied = None
        if not self._paths:
            self._paths = [_path(self._root, name, t) for name, t in zip(self.names, self._tensors, strict=True)]
        for name, path in zip(self.names, self._paths, strict=True):
            if not all(holder.get(key) is value for holder, key, value in path):
                raise StaleParameterError(
                    f"the module holds another tensor as {name!r} than when this penalty was made; call rebind(module)"
                )
        return self._tensors

    def links(self, indices: Iterable[int]) -> list[Link]:
        """Return what must hold in the module as long as it has these tensors."""
        links = {(id(holder), key): (holder, key, value) for i in indices for holder, key, value in self._paths[i]}
        return list(links.values())

    def chosen(self, active: Sequence[str] | None) -> list[str]:
        """Return the active names, checked; None stands for all.

        Raises:
            TypeError: if it is a string.
            ValueError: if a name occurs twice.
            NameMismatchError: if a name is unknown.
        """
        if active is None:
            return self.names
        if isinstance(active, str):
            raise TypeError(f"active must be a sequence of names, got the string {active!r}")
        check_names(self.names, active, "the penalty")
        if len(set(active)) != len(active):
            raise ValueError("active must name each parameter once")
        return list(active)

    def copied(self, memo: dict[int, Any]) -> References:
        """Return a deep copy's references: to what the same deep copy makes of the tensors, else to the same ones."""
        twin = References.__new__(References)
        twin.__dict__ = {**self.__dict__, "_copied": memo, "_paths": []}
        if self._copied is not None:  # a copy of a copy that has not been used
            self.tensors()
            twin.__dict__ |= {"_tensors": self._tensors, "_root": self._root}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Keep the names alone."""
        return {**self.__dict__, "_tensors": None, "_root": None, "_copied": None, "_paths": []}


def _path(root: nn.Module | None, name: str, tensor: Tensor) -> list[Link]:
    """Return the links from a module to one of its parameters; none if it is not found by its name."""
    *folders, leaf = name.split(".")
    module, path = root, []
    for folder in folders:
        child = None if module is None else module._modules.get(folder)
        if module is None or child is None:
            return []
        path.append((module._modules, folder, child))
        module = child
    if module is None or module._parameters.get(leaf) is not tensor:
        return []
    return [*path, (module._parameters, leaf, tensor)]
