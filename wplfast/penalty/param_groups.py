"""ParamGroups: what the penalty is evaluated on, made once and checked at every call.

Parameters stay where the user's optimizer has them; a group refers to them and to the anchors' flat buffers. PyTorch
lets a parameter's memory be exchanged silently (``.to``, ``.double``, ``p.data = ...``), so every call compares
address, dtype, device, shape and stride with what the group was made from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .. import backends
from ..errors import StaleParameterError
from ..ops.layout import is_dense
from ..ops.prepared import PreparedPenalty, check_parameter_grads
from .anchors import Anchors, by_kind
from .autograd import differentiable
from .coefficients import scalar
from .references import References

_MAX_ACTIVE_SETS = 32  # active sets whose groups are kept


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
        theta = references.tensors()
        self._theta = [theta[i] for i in indices]
        for i in indices:
            if theta[i].numel() and not theta[i].data_ptr():
                raise StaleParameterError(f"{references.names[i]!r} has no memory: its storage was freed")
        self._links = references.links(indices)
        device = self._theta[0].device
        chosen = alpha if alpha.dim() == 0 else alpha[self.indices]
        self._alpha = chosen.to(device)  # the penalty's own where that is on this device
        self._one = scalar(1.0, device)
        self._coefficients = self._alpha, scalar(l2, device), anchors.constants(indices, alpha.dim() == 0, device)
        self._columns = anchors.columns(indices)
        self._gaps = any(not is_dense(p) for p in self._theta)
        kind = PreparedPenalty if self._gaps else backends.prepared_penalty(device.type)
        self._prepared = kind(self._theta, *self._columns, *self._coefficients)
        self._prepared.remember()

    def set_alpha(self, alpha: Tensor) -> None:
        """Take over alpha's values."""
        chosen = alpha if alpha.dim() == 0 else alpha[self.indices]
        if chosen is not self._alpha:
            self._alpha.copy_(chosen)

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
        for p, gradient in zip(self._theta, prepared.views(packed), strict=True):
            if p.requires_grad:
                step = (factor * gradient).to(p.dtype)
                p.grad = step if p.grad is None else p.grad.add_(step)
        return value

    def check_parameter_grads(self) -> None:
        """Check every ``.grad`` before anything is written to one."""
        check_parameter_grads(self._theta)

    def _dense(self) -> PreparedPenalty:
        """Return the penalty over copies of the parameters that have gaps in memory."""
        theta = [p if is_dense(p) else p.contiguous() for p in self._theta]
        return PreparedPenalty(theta, *self._columns, *self._coefficients)


class ParamGroups:
    """The most recently used active sets' groups, one for each device and dtype."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, ...] | None, list[ParamGroup]] = OrderedDict()

    def __iter__(self) -> Iterator[ParamGroup]:
        """Yield all groups."""
        return (group for groups in self._groups.values() for group in groups)

    def find(self, key: tuple[str, ...] | None) -> list[ParamGroup] | None:
        """Return an active set's groups, or None if there are none or a parameter is not what and where it was."""
        groups = self._groups.get(key)
        if groups is None or torch.compiler.is_compiling():
            return groups  # addresses cannot be looked at while tracing; shapes and dtypes are guarded
        for group in groups:
            if not group.unchanged():
                return None
        with suppress(KeyError):  # another thread may have made all groups anew
            self._groups.move_to_end(key)
        return groups

    def make(
        self,
        key: tuple[str, ...] | None,
        indices: Sequence[int],
        references: References,
        anchors: Anchors,
        alpha: Tensor,
        l2: float,
    ) -> list[ParamGroup]:
        """Make and keep an active set's groups; see :class:`ParamGroup` for the arguments."""
        theta = references.tensors()
        kinds = by_kind(theta[i] for i in indices).values()
        groups = [ParamGroup([indices[k] for k in positions], references, anchors, alpha, l2) for positions in kinds]
        self._groups[key] = groups
        if len(self._groups) > _MAX_ACTIVE_SETS:
            with suppress(KeyError):  # another thread dropped the same one at this moment
                self._groups.popitem(last=False)
        return groups

    def clear(self) -> list[tuple[str, ...] | None]:
        """Forget all; return the active sets that there were."""
        keys = list(self._groups)
        self._groups.clear()
        return keys
