"""The penalty over parameters that stay where they are from call to call.

A prepared penalty refers to parameters and anchors that fulfil the op contract, and evaluates. This one does so through
the dispatcher, on any device; a backend may give a subclass that remembers addresses and calls its kernels directly
(:func:`wplfast.backends.prepared_penalty`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .arguments import PenaltyArguments
from .contract import kernel
from .expect import FLOATING
from .layout import Packing, is_dense

#: Address, dtype, device, shape and stride: what must not have changed.
Location: TypeAlias = tuple[int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]

#: A dictionary, a key and the value that must be there: how a module holds its parameters and submodules.
Link: TypeAlias = tuple[dict[str, Any], str, object]

#: Tensors that no other package's code stands behind.
_PLAIN = frozenset({Tensor, nn.Parameter})

_version = attrgetter("_version")


class PreparedPenalty:
    """One evaluation's arguments for many evaluations.

    Args:
        theta: see :class:`.PenaltyArguments`, as for all others but the last.
        theta_hat: their anchors.
        offset: of the merged anchors.
        fisher: their Fishers.
        alpha: strength of the anchors.
        l2: strength of the weight decay term.
        constant: c of the merged anchors, of alpha's shape: the value has sum alpha_p c_p / 2 more. None means zero.
    """

    def __init__(
        self,
        theta: Sequence[Tensor],
        theta_hat: Sequence[Tensor],
        offset: Sequence[Tensor],
        fisher: Sequence[Tensor],
        alpha: Tensor,
        l2: Tensor,
        constant: Tensor | None = None,
    ) -> None:
        self.arguments = PenaltyArguments(theta, theta_hat, offset, fisher, alpha, l2)
        self.theta, self.constant = theta, constant
        self._packing: Packing | None = None
        self._locations: list[Location] = []
        self._prepare()

    def _prepare(self) -> None:
        """Make what a backend's subclass keeps."""

    def remember(self) -> None:
        """Remember what the parameters are now, for :meth:`unchanged`."""
        self._locations = [_location(p) for p in self.theta]

    def unchanged(self, links: Sequence[Link]) -> bool:
        """Tell whether every parameter has the address, dtype, device, shape and strides that it had.

        Args:
            links: must hold too.
        """
        return all(holder.get(key) is value for holder, key, value in links) and all(
            _location(p) == known for p, known in zip(self.theta, self._locations, strict=True)
        )

    def versions(self) -> list[int]:
        """Return the versions of all tensors: they change when one is written to."""
        *columns, alpha, l2 = self.arguments
        return list(map(_version, chain((alpha, l2), *columns)))

    def scaled(self, factor: Tensor) -> PreparedPenalty:
        """Return ``factor`` times this penalty (without its constant)."""
        arguments = self.arguments
        return PreparedPenalty(*arguments._replace(alpha=arguments.alpha * factor, l2=arguments.l2 * factor))

    def value(self) -> Tensor:
        """Return the value, 0-d."""
        value: Tensor = self._operator("penalty")(*self.arguments)
        return self.with_constant(value)

    def with_grad(self) -> tuple[Tensor, Tensor]:
        """Return the value and the packed gradient (see :meth:`views`)."""
        value, packed = self._operator("penalty_with_grad")(*self.arguments)
        return self.with_constant(value), packed

    def _operator(self, name: str) -> Callable[..., Any]:
        """Return an operator; where nothing must see it go through the dispatcher, what serves it."""
        *columns, alpha, l2 = self.arguments
        through = (
            dispatched() or forward_ad._current_level >= 0 or not plain([alpha, l2, *chain.from_iterable(columns)])
        )
        return operator(name, self.theta[0].device.type, through)

    @property
    def packing(self) -> Packing:
        """How gradients are packed."""
        if self._packing is None:
            self._packing = Packing(self.theta)
        return self._packing

    def views(self, packed: Tensor) -> list[Tensor]:
        """View a packed gradient as one tensor per parameter."""
        return self.packing.views(packed)

    def add_grad_(self, scale: Tensor) -> Tensor:
        """Return the value and add ``scale`` times the gradient to ``.grad`` of those that require it.

        Raises:
            ValueError: if a ``.grad`` is sparse, or of another dtype than its parameter or than its ``grad_dtype``.
        """
        grads, apart = _gradients(self.theta)
        value = torch.ops.wplfast.penalty_add_grad_(grads, *self.arguments, scale)
        for grad, addend in apart:
            grad.add_(addend)
        return self.with_constant(value)

    def with_constant(self, value: Tensor) -> Tensor:
        """Add what the merged anchors contribute whatever theta is."""
        if self.constant is None:
            return value
        return value + (0.5 * self.arguments.alpha * self.constant).sum().to(value.dtype)


def dispatched() -> bool:
    """Tell whether something must see operators go through the dispatcher: tracing, transforms, modes, the profiler."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )


def plain(tensors: Collection[Tensor]) -> bool:
    """Tell whether nothing stands between tensors and their memory: no other package's code, no negation to come."""
    return _PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


def operator(name: str, device_type: str, through: bool = False) -> Callable[..., Any]:
    """Return an operator; what serves it on a device type, where nothing must see it go through the dispatcher."""
    if through or dispatched():
        found: Callable[..., Any] = getattr(torch.ops.wplfast, name)
        return found
    return kernel(name, device_type)


def _location(parameter: Tensor) -> Location:
    """Return what must not change."""
    return (parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape, parameter.stride())


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a new ``.grad``: the parameter's own, or what newer versions of PyTorch let users set."""
    return _chosen_grad_dtype(parameter) or parameter.dtype


def _chosen_grad_dtype(parameter: Tensor) -> torch.dtype | None:
    """Return the dtype that a ``.grad`` must have; None for any."""
    if torch.compiler.is_compiling():  # it cannot be traced: another dtype is an error there
        return parameter.dtype
    chosen: torch.dtype | None = getattr(parameter, "grad_dtype", parameter.dtype)
    return chosen


def _may_have(parameter: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a ``.grad`` of this dtype is one that the user asked for."""
    chosen = _chosen_grad_dtype(parameter)
    return dtype in FLOATING if chosen is None else dtype == chosen


def check_parameter_grads(theta: Sequence[Tensor]) -> None:
    """Check every ``.grad`` before anything is written to one.

    Raises:
        ValueError: if one is sparse, of another dtype than its parameter (its ``grad_dtype``), without memory, or
            overlaps another one.
    """
    ranges = []
    for p in theta:
        grad = p.grad if p.requires_grad else None
        if grad is None:
            continue
        if not _may_have(p, grad.dtype) or grad.layout != torch.strided or grad.shape != p.shape:
            expected, got = f"{grad_dtype(p)}{list(p.shape)}", f"{grad.layout} {grad.dtype}{list(grad.shape)}"
            raise ValueError(f".grad must be dense and {expected} as its parameter, got {got}")
        if grad.numel() and not torch.compiler.is_compiling():  # traced tensors have no addresses
            if not grad.data_ptr():
                raise ValueError(".grad has no memory: its storage was freed")
            if is_dense(grad):
                ranges.append((grad.data_ptr(), grad.data_ptr() + grad.nbytes))
    ranges.sort()
    if any(end > begin for (_, end), (begin, _) in pairwise(ranges)):
        raise ValueError(".grad of two parameters must not overlap in memory")


def _gradients(theta: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return tensors to add the gradients to, and those that stand in for a ``.grad`` in another order or dtype."""
    check_parameter_grads(theta)
    grads, apart = [], []
    for p in theta:
        if not p.requires_grad:
            grads.append(torch.zeros_like(p))  # not the caller's: the value counts frozen parameters too
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p, dtype=grad_dtype(p))
        grad = p.grad
        if grad.dtype != p.dtype or grad.stride() != p.stride():
            apart.append((grad, torch.zeros_like(p)))
            grad = apart[-1][1]
        grads.append(grad)
    return grads, apart
