"""References to parameters that belong to someone else, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..distributed.engines import check_engine, inner_module, is_replica
from ..errors import NameMismatchError, StaleParameterError
from ..ops.prepared import Link
from ..params import Params, check_names, is_fully_sharded, is_sharded, named, some, suggest_prefix

if TYPE_CHECKING:
    from ..distributed.shards import Alias


class Registrations:
    """How many parameters and submodules any modules registered: as long as it stays, no module got another one."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        """Count from now on."""
        if not self._watching:
            self._watching = True
            hooks.register_module_parameter_registration_hook(self._one_more)
            hooks.register_module_module_registration_hook(self._one_more)

    def _one_more(self, *_: object) -> None:
        """Count; what is registered stays as it is."""
        self.count += 1


_registrations = Registrations()


class References:
    """Tensors by name, and where a module holds them, so that one that was replaced is noticed, and one that joined.

    A copy that was pickled has names alone; a deep copy refers to what the same deep copy made of the tensors.

    Args:
        params: see :class:`wplfast.WeightPlasticityLoss`.
        names: which of them, in this order; default: all. A module's frozen parameters may be among them.

    Raises:
        NameMismatchError: if params lacks a name.
    """

    def __init__(self, params: Params, names: Sequence[str] | None = None) -> None:
        #: Whether an engine keeps the same parameters on all ranks.
        self.are_replicas = is_replica(params)
        check_engine(params, "params")
        params = inner_module(params)
        if isinstance(params, nn.Module):
            _registrations.watch()
        self._counted = _registrations.count  # of registrations that the module is known to have no part in
        if is_fully_sharded(params):
            from ..distributed.blocks import modules_of  # not with the package

            for module in modules_of(cast(nn.Module, params)):
                module.reshard()  # to what optimizers hold
        parameters = named(params if names is None else _with_frozen(params, names), sharded_too=True)
        if names is not None:
            check_names(parameters, names, "params")
            parameters = {name: parameters[name] for name in names}
        self.names = list(parameters)
        self.index = {name: i for i, name in enumerate(self.names)}
        self._tensors: list[Tensor] | None = list(parameters.values())
        self._root = params if isinstance(params, nn.Module) else None
        #: What the module has beside: parameters that do not require grad. They may later, and are not new then.
        self._others = {name for name, p in _parameters(self._root) if not p.requires_grad}
        self._copied: dict[int, Any] | None = None  # id -> copy, until this copy is used
        self._paths: list[list[Link]] = []
        #: Whether some are DTensors, of which a part lies on this rank.
        self.is_sharded = any(map(is_sharded, self._tensors))
        self._aliases: dict[int, Alias] = {}

    def again(self, params: Params, new: Literal["error", "add"], missing: Literal["error", "drop"]) -> References:
        """Return references to other tensors by the same names.

        Args:
            params: the tensors by name.
            new: what to do about names that these references lack: ``"add"`` puts them at the end.
            missing: what to do about names that params lacks.

        Raises:
            NameMismatchError: if a name is new or missing and must not be, or none is left.
        """
        given_as, params = params, inner_module(params)
        params = params if isinstance(params, nn.Module) else named(params, sharded_too=True)
        given = named(_with_frozen(params, self.names), sharded_too=True)
        kept = [name for name in self.names if name in given]
        more = [name for name in given if name not in self.index]
        if len(kept) < len(self.names) and (prefix := suggest_prefix(list(given), self.names)) is not None:
            raise NameMismatchError(
                f"params has this penalty's parameters as {prefix + self.names[0]!r} and the like: "
                f"pass that part alone, model.{prefix.rstrip('.')} or a mapping without {prefix!r}"
            )
        if missing == "error" or not kept:
            check_names(given, self.names, "params")
        if more and new == "error":
            raise NameMismatchError(
                f"params has {len(more)} names that this penalty does not cover: {some(more)}; new='add' lets them "
                "join, not anchored until the next consolidate. If they are not meant to, pass the others alone: a "
                "submodule, or {name: tensor}"
            )
        return References(given_as if isinstance(given_as, nn.Module) else params, [*kept, *more])

    def followed(self) -> References:
        """Return references to what the module holds now, these if it holds the same or there is none.

        Raises:
            NameMismatchError: if it lacks a name, or got another one.
        """
        try:
            self.tensors()
        except StaleParameterError:
            if self._root is None:
                raise
            return self.again(self._root, "error", "error")
        return self

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
            pairs = zip(self.names, self._tensors, strict=True)
            self._paths = [[] if is_sharded(t) else _path(self._root, name, t) for name, t in pairs]
        for name, path in zip(self.names, self._paths, strict=True):
            for holder, key, value in path:
                held = holder.get(key)
                if held is None:
                    raise StaleParameterError(
                        f"the module no longer holds {name!r}; call rebind(module, missing='drop') if it is gone"
                    )
                if held is not value:
                    raise StaleParameterError(
                        f"the module holds another tensor as {name!r} than when this penalty was made; "
                        "call rebind(module)"
                    )
        if not self.complete():
            more = self._newcomers()
            raise StaleParameterError(
                f"the module got {len(more)} parameters since this penalty was made, which it does not cover: "
                f"{some(more)}; call rebind(module, new='add') to let them join, not anchored until the next "
                "consolidate, or rebind({name: tensor}) with those that are meant"
            )
        return self._tensors

    def parts(self) -> list[Tensor]:
        """Return what the penalty computes on: the tensors, or leaves on the memory of their parts on this rank.

        Raises:
            StaleParameterError: as :meth:`tensors`.
        """
        tensors = self.tensors()
        if not self.is_sharded:
            return tensors
        return [self.alias(i).tensor if is_sharded(t) else t for i, t in enumerate(tensors)]

    def by_name(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return dict(zip(self.names, self.tensors(), strict=True))

    def placed(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return tensors that lie beside :meth:`parts`, by name, as what the parameters are: shards for shards."""
        if not self.is_sharded:
            return dict(zip(self.names, parts, strict=True))
        from ..distributed.shards import like

        return {name: like(part, t) for name, part, t in zip(self.names, parts, self.tensors(), strict=True)}

    def together(self, what: str) -> AbstractContextManager[None]:
        """Let all ranks succeed in something, or none, where parameters are shards."""
        if not self.is_sharded:
            return nullcontext()
        from ..distributed.shards import together

        return together(self.tensors(), what)

    def alias(self, index: int) -> Alias:
        """Return what stands for the part of a sharded tensor on this rank."""
        from ..distributed.shards import Alias  # not with the package

        found = self._aliases.get(index)
        if found is None or not found.fits():
            assert self._tensors is not None
            found = self._aliases[index] = Alias(cast(Any, self._tensors[index]))
        return found

    def complete(self) -> bool:
        """Tell whether the module got no parameter since these references were made."""
        if self._counted != _registrations.count:
            count = _registrations.count
            if self._newcomers():
                return False
            self._counted = count
        return True

    def numel(self) -> int:
        """Return the number of elements, whatever became of the tensors; 0 if there are none since unpickling."""
        return sum(tensor.numel() for tensor in self._tensors or ())

    def _newcomers(self) -> list[str]:
        """Return the names of parameters that require grad and that the module did not have."""
        known = {id(tensor) for tensor in self._tensors or ()}
        pairs = _parameters(self._root)
        known_names = self._others | (set(self.names) if self.is_sharded else set())  # FSDP2 gathers them for a while
        return [name for name, p in pairs if p.requires_grad and id(p) not in known and name not in known_names]

    def links(self, indices: Iterable[int]) -> list[Link]:
        """Return what must hold in the module as long as it has these tensors."""
        links = {(id(holder), key): (holder, key, value) for i in indices for holder, key, value in self._paths[i]}
        return list(links.values())

    def chosen(self, active: Iterable[str] | None) -> list[str]:
        """Return the active names, checked; None stands for all.

        Raises:
            TypeError: if it is a string, a tensor or no iterable, or an entry is no string.
            ValueError: if a name occurs twice.
            NameMismatchError: if a name is unknown.
        """
        if active is None:
            return self.names
        active = listed(active)
        strange = next((name for name in active if not isinstance(name, str)), None)
        if strange is not None:
            raise TypeError(f"active must hold names, which are strings, got an entry of {type(strange).__name__}")
        check_names(self.names, active, "the penalty")
        if len(set(active)) != len(active):
            raise ValueError("active must name each parameter once")
        return list(active)

    def copied(self, memo: dict[int, Any]) -> References:
        """Return a deep copy's references: to what the same deep copy makes of the tensors, else to the same ones."""
        twin = References.__new__(References)
        twin.__dict__ = {**self.__dict__, "_copied": memo, "_paths": [], "_counted": -1, "_aliases": {}}
        if self._copied is not None:  # a copy of a copy that has not been used
            self.tensors()
            twin.__dict__ |= {"_tensors": self._tensors, "_root": self._root}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Keep the names alone."""
        return {**self.__dict__, "_tensors": None, "_root": None, "_copied": None, "_paths": [], "_aliases": {}}


def listed(active: Iterable[str]) -> tuple[str, ...]:
    """Return active names as a tuple, whatever holds them: a list, a set, an iterator.

    Raises:
        TypeError: if it is a string, a tensor or no iterable.
    """
    if isinstance(active, tuple):
        return active
    if isinstance(active, str):
        raise TypeError(f"active must be a sequence of names, got the string {active!r}")
    if isinstance(active, Tensor):
        raise TypeError("active must be a sequence of names, got a Tensor: the penalty takes no inputs, call wpl()")
    if not isinstance(active, Iterable):
        raise TypeError(f"active must be a sequence of names, got {type(active).__name__}")
    return tuple(active)


def _parameters(root: nn.Module | None) -> Iterable[tuple[str, Tensor]]:
    """Return a module's parameters by name, if there is a module."""
    return () if root is None else root.named_parameters()


def _with_frozen(params: Params, names: Iterable[str]) -> Params:
    """Return params, of a module also those of some names that do not require grad."""
    if not isinstance(params, nn.Module):
        return params
    wanted = set(names)
    return [(name, p) for name, p in params.named_parameters() if p.requires_grad or name in wanted]


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
