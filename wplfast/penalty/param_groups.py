"""Groups of parameters: what the penalty is evaluated on, made once and checked at every call.

Parameters stay where the user's optimizer has them; a group refers to them and to the anchors' flat buffers. PyTorch
lets a parameter's memory be exchanged silently (``.to``, ``.double``, ``p.data = ...``), so every call compares
address, dtype, device, shape and stride with what the group was made from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import backends
from ..errors import StaleParameterError
from ..ops.arguments import PenaltyArguments
from ..ops.layout import by_kind, is_dense
from ..ops.prepared import PreparedPenalty, check_parameter_grads, grad_dtype
from .anchors import Anchors
from .autograd import differentiable
from .coefficients import scalar
from .consolidate import Options
from .references import References

_MAX_ACTIVE_SETS = 32  # whose groups are kept

#: Names of parameters; None stands for all of them.
ActiveSet: TypeAlias = tuple[str, ...] | None


class ParamGroup:
    """Parameters of one device and dtype, with their anchors.

    Args:
        indices: which of all parameters.
        references: to all parameters.
        anchors: of all parameters.
        alpha: 0-d, or one entry for each of all parameters.
        l2: strength of the weight decay term.
    """

    def __init__(
        self, indices: Sequence[int], references: References, anchors: Anchors, alpha: Tensor, l2: float
    ) -> None:
        self.indices = list(indices)
        theta = references.parts()
        self.theta = [theta[i] for i in indices]
        self._take(indices, references)
        for i in indices:
            if theta[i].numel() and not theta[i].data_ptr():
                raise StaleParameterError(f"{references.names[i]!r} has no memory: its storage was freed")
        self._links = references.links(indices)
        device = self.theta[0].device
        chosen = alpha if alpha.dim() == 0 else alpha[self.indices]
        self._alpha = chosen.to(device)  # the penalty's own where that is on this device
        self._one = scalar(1.0, device)
        self._arguments = PenaltyArguments(self.theta, *anchors.columns(indices), self._alpha, scalar(l2, device))
        self._constant = anchors.constants(indices, alpha.dim() == 0, device)
        self._gaps = any(not is_dense(p) for p in self.theta)
        kind = PreparedPenalty if self._gaps else backends.prepared_penalty(device.type)
        self._prepared = kind(*self._arguments, self._constant)
        self._prepared.remember()

    def _take(self, indices: Sequence[int], references: References) -> None:
        """Take what a subclass keeps of the parameters."""

    def set_alpha(self, alpha: Tensor) -> None:
        """Take over alpha's values."""
        chosen = alpha if alpha.dim() == 0 else alpha[self.indices]
        if chosen is not self._alpha:
            self._alpha.copy_(chosen)

    def trains(self) -> bool:
        """Tell whether a parameter requires grad."""
        return any(p.requires_grad for p in self.theta)

    def unchanged(self) -> bool:
        """Tell whether the parameters are what and where they were, and their modules still hold them."""
        return self._prepared.unchanged(self._links)

    def value(self) -> Tensor:
        """Return the differentiable value."""
        return differentiable(self._dense() if self._gaps else self._prepared)

    def add_grad_(self, scale: float | Tensor) -> Tensor:
        """Add ``scale`` times the gradient to ``.grad`` and return the value."""
        factor = self._one if isinstance(scale, float) and scale == 1 else scalar(scale, self._one.device)
        if not self._gaps:
            return self._prepared.add_grad_(factor)
        self.check_parameter_grads()
        prepared = self._dense()
        value, packed = prepared.with_grad()
        for p, gradient in zip(self.theta, prepared.views(packed), strict=True):
            if p.requires_grad:
                step = (factor * gradient).to(p.dtype)
                p.grad = step.to(grad_dtype(p)) if p.grad is None else p.grad.add_(step)
        return value

    def check_parameter_grads(self) -> None:
        """Check every ``.grad`` before anything is written to one."""
        check_parameter_grads(self.theta)

    def _dense(self) -> PreparedPenalty:
        """Return the penalty over copies of the parameters that have gaps in memory."""
        theta = [p if is_dense(p) else p.contiguous() for p in self.theta]
        return PreparedPenalty(*self._arguments._replace(theta=theta), self._constant)


class ParamGroups:
    """All that a penalty's value depends on, and the groups made of it: one for each active set, device and dtype.

    A penalty holds one of these at a time. References, anchors and the form of alpha never change in it: who changes
    them makes another one, with the groups of all active sets that were in use, and puts it in the place of the first.
    That one assignment, with what a consolidation does to buffers, is the change, so that an interrupt or an error
    leaves the old whole or the new whole. Groups are made ahead of it because compiled code takes what it finds.

    Args:
        references: to all parameters.
        anchors: of all parameters and beside them, or None where there is nothing to evaluate.
        alpha: strength of the anchors, 0-d or one entry per parameter; what is written to it counts.
        l2: strength of the weight decay term.
        active_sets: those to make groups of; tuples of names. All parameters together are one in any case.
    """

    def __init__(
        self,
        references: References,
        anchors: Anchors | None,
        alpha: Tensor,
        l2: float,
        active_sets: Iterable[ActiveSet] = (),
    ) -> None:
        self.references, self.anchors, self.alpha, self.l2 = references, anchors, alpha, l2
        self.anchored = anchors is not None and anchors.n_anchors > 0
        self._alpha_version = alpha._version
        self._groups: OrderedDict[ActiveSet, list[ParamGroup]] = OrderedDict()
        if anchors is not None:
            for key in dict.fromkeys((*active_sets, None)):
                if key is None or all(name in references for name in key):
                    self.make(key)

    @property
    def active_sets(self) -> list[ActiveSet]:
        """The most recently used active sets, the last one last."""
        return list(self._groups)

    def with_anchors(self, anchors: Anchors) -> ParamGroups:
        """Return groups of the same parameters with other anchors."""
        if not anchors.evaluates_as(self.anchors):
            return ParamGroups(self.references, anchors, self.alpha, self.l2, self.active_sets)
        return self._twin(anchors=anchors, anchored=anchors.n_anchors > 0)

    def rebound(self, references: References, strengths: Callable[[Sequence[str]], Tensor]) -> ParamGroups:
        """Return groups of other parameters, which have names of these or are not anchored.

        Args:
            references: to the other parameters; those that join come last.
            strengths: alpha of those that have no name of these, if it has one entry per parameter.

        Raises:
            ValueError: if a parameter is smaller than its anchor or has another number of dimensions, or a name
                matches no prefix of alpha.
        """
        sources = [self.references.index.get(name) for name in references.names]
        theta, anchors, alpha = references.parts(), self.anchors, self.alpha
        with torch.inference_mode(False), torch.no_grad():
            if anchors is not None:
                if references.is_sharded and not self.references.is_sharded:
                    pairs = zip(sources, references.tensors(), strict=True)
                    anchors = anchors.cut({source: shard for source, shard in pairs if source is not None})
                for name, parameter, source in zip(references.names, theta, sources, strict=True):
                    if source is None:
                        continue
                    old, new = list(anchors.fisher[source].shape), list(parameter.shape)
                    if new != old and references.is_sharded:
                        raise ValueError(
                            f"params[{name!r}] is sharded and must have its anchor's shape, {old} on this rank, got "
                            f"{new}; to let it grow, save the penalty and load it with strict=False where it is whole"
                        )
                    if len(new) != len(old) or any(a < b for a, b in zip(new, old, strict=True)):
                        raise ValueError(f"params[{name!r}] must have at least its anchor's shape {old}, got {new}")
                anchors = anchors.moved(theta, sources)
            if alpha.dim():
                joined = [name for name, source in zip(references.names, sources, strict=True) if source is None]
                alpha = alpha[[source for source in sources if source is not None]]
                alpha = torch.cat([alpha, strengths(joined).to(alpha).expand(len(joined))]) if joined else alpha
        return ParamGroups(references, anchors, alpha, self.l2, self.active_sets)

    def outlast(self, options: Options) -> bool:
        """Tell whether groups stay as they are in a consolidation of some parameters: no constant changes."""
        return options.anchor == "replace" and not (self.anchors and bool(self.anchors.constant.any()))

    def anchors_beside(self, theta: Sequence[Tensor], indices: Sequence[int] | None = None) -> Anchors:
        """Return the anchors, or copies of them where a parameter is on another device or of another dtype now.

        Args:
            theta: all parameters.
            indices: of those that are looked at; default: all. Groups may only be made if all were.

        Raises:
            StaleParameterError: if a parameter changed its shape.
        """
        anchors = self.anchors
        assert anchors is not None
        if anchors.fits(theta, range(len(theta)) if indices is None else indices):
            return anchors
        for name, parameter, fisher in zip(self.references.names, theta, anchors.fisher, strict=True):
            if parameter.shape != fisher.shape:
                expected, got = list(fisher.shape), list(parameter.shape)
                raise StaleParameterError(
                    f"{name!r} had shape {expected} when it was anchored and now has {got}; use rebind or reset"
                )
        return anchors.moved(theta)

    def find(self, key: ActiveSet) -> list[ParamGroup] | None:
        """Return an active set's groups, or None if there are none or a parameter is not what and where it was."""
        groups = self._groups.get(key)
        if torch.compiler.is_compiling():  # addresses cannot be looked at while tracing; shapes and dtypes are guarded
            return groups
        if self.alpha._version != self._alpha_version:
            self.take_alpha()  # somebody wrote to it
        if groups is None or not self.references.complete():
            return None
        for group in groups:
            if not group.unchanged():
                return None
        with suppress(KeyError):  # another thread may have made all groups anew
            self._groups.move_to_end(key)
        return groups

    def make(self, key: ActiveSet) -> list[ParamGroup]:
        """Make and keep an active set's groups, of anchors that are beside the parameters."""
        assert self.anchors is not None
        with torch.inference_mode(False):
            names = self.references.names if key is None else key
            indices, theta = [self.references.index[name] for name in names], self.references.parts()
            groups = [
                kind(chosen, self.references, self.anchors, self.alpha, self.l2)
                for positions in by_kind(theta[i] for i in indices).values()
                for kind, chosen in self._split([indices[k] for k in positions])
            ]
        self._groups[key] = groups
        if len(self._groups) > _MAX_ACTIVE_SETS:
            with suppress(KeyError):  # another thread dropped the same one at this moment
                self._groups.popitem(last=False)
        return groups

    def _split(self, indices: list[int]) -> list[tuple[type[ParamGroup], list[int]]]:
        """Split parameters of one device and dtype by what they are evaluated as."""
        if not self.references.is_sharded:
            return [(ParamGroup, indices)]
        from ..distributed.shards import ShardedParamGroup, key_of  # not with the package

        tensors = self.references.tensors()
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i in indices:
            kinds.setdefault(key_of(tensors[i]), []).append(i)
        return [(ShardedParamGroup if key else ParamGroup, chosen) for key, chosen in kinds.items()]

    def take_alpha(self) -> None:
        """Bring what was written to alpha to the groups."""
        version = self.alpha._version
        for groups in list(self._groups.values()):
            for group in groups:
                group.set_alpha(self.alpha)
        self._alpha_version = version  # last, so that the next call makes up for an interrupt

    def _twin(self, **changes: Any) -> ParamGroups:
        """Return one that shares all but some attributes."""
        twin = ParamGroups.__new__(ParamGroups)
        twin.__dict__ = {**self.__dict__, **changes}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Pickle names, anchors and alpha: a copy elsewhere must be bound to parameters there."""
        return {**self.__dict__, "_groups": OrderedDict(), "_alpha_version": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamGroups:
        """Copy anchors and alpha; refer to copied parameters where the same deepcopy copied them."""
        with torch.inference_mode(False), torch.no_grad():
            anchors = None if self.anchors is None else self.anchors.moved(self.anchors.theta_hat)
            copies = {"anchors": anchors, "alpha": self.alpha.clone(), "references": self.references.copied(memo)}
        return self._twin(**copies, _groups=OrderedDict(), _alpha_version=None)
