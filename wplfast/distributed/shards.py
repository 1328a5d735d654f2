"""Parameters that are shards (DTensor): the part of them that lies on this rank, and tensors that lie as they do.

A penalty computes on local parts alone, by the kernels that serve whole tensors; what is summed over all elements is
summed over ranks once. It never gathers a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import UnsupportedParameterError, WplfastError
from ..ops.prepared import PreparedPenalty
from ..penalty.autograd import EagerPenalty
from ..penalty.param_groups import ParamGroup
from .agreement import Agreement, Group, gathered

T = TypeVar("T")

#: What all ranks are doing together.
_agreement: ContextVar[Agreement | None] = ContextVar("_agreement", default=None)


def placed(shard: Tensor) -> tuple[DeviceMesh, int, int]:
    """Return the mesh that a parameter is sharded on, along which dimension of the mesh, and of its own.

    Raises:
        UnsupportedParameterError: if it is sharded along several dimensions of the mesh, or none.
    """
    assert isinstance(shard, DTensor)
    dims = [(i, p.dim) for i, p in enumerate(shard.placements) if type(p) is Shard]
    if len(dims) != 1 or not all(type(p) in (Shard, Replicate) for p in shard.placements):
        raise UnsupportedParameterError(
            f"parameters must be sharded along one dimension of their mesh, as by FSDP2, got {shard.placements}"
        )
    return shard.device_mesh, *dims[0]


def key_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what parameters have in common that are evaluated together: nothing for whole ones, else how they lie."""
    return placed(tensor)[:2] if isinstance(tensor, DTensor) else ()


def local_part(tensor: Tensor, shard: Tensor) -> Tensor:
    """Return the part of a tensor that lies where a parameter's part on this rank does.

    Args:
        tensor: of the parameter's shape: whole on every rank, or a DTensor.
        shard: the parameter; a plain one has all of it here.
    """
    if isinstance(tensor, DTensor):
        _check_own(tensor)
    if not isinstance(shard, DTensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != shard.device_mesh or tensor.placements != shard.placements:
                tensor = tensor.redistribute(shard.device_mesh, shard.placements)
            local: Tensor = tensor.to_local()
            return local
        mesh, along, dim = placed(shard)
        size, part = shard.shape[dim], shard.to_local().shape[dim]
        first = min(size, mesh.get_local_rank(along) * -(-size // mesh.size(along)))
        return tensor.detach().narrow(dim, first, part)


def _check_own(tensor: DTensor) -> None:
    """Require that a DTensor holds this rank's part: what another rank pickled has that rank's.

    Raises:
        ValueError: if it does not.
    """
    mesh, rank = tensor.device_mesh, dist.get_rank()
    place, said = (mesh.mesh == rank).nonzero().flatten().tolist(), mesh.get_coordinate()
    if place != list(said or ()):
        raise ValueError(
            f"a DTensor of shape {list(tensor.shape)} has the part of another rank than {rank}, which saved it: a "
            "pickle of shards holds those of one rank alone, and the others' are lost. Save with "
            "torch.distributed.checkpoint, with the save() of a Fisher or penalty, or, for what keeps the state of "
            "rank 0 alone as accelerate does, register wplfast.distributed.WholeState(penalty)"
        )


def holds_constant(shard: Tensor) -> bool:
    """Tell whether this rank holds a parameter's constant: of shards the first one's does, as ranks are summed."""
    if not isinstance(shard, DTensor):
        return True
    mesh, along, _ = placed(shard)
    return mesh.get_local_rank(along) == 0


def like(part: Tensor, shard: Tensor) -> Tensor:
    """Return a local part as what the parameter is: a DTensor of its mesh and placements, or a plain tensor."""
    if not isinstance(shard, DTensor):
        return part
    options: Any = {"run_check": False, "shape": shard.shape, "stride": shard.stride()}
    return DTensor.from_local(part, shard.device_mesh, shard.placements, **options)


def localised(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a penalty's state with this rank's parts, without entries of other shapes than sharded parameters have.

    Args:
        state: named tensors, whole or DTensors.
        parameters: by name.
    """
    found = dict(state)
    for tensor in found.values():
        if isinstance(tensor, DTensor):
            _check_own(tensor)
    agreed(None)  # before what is redistributed, which is collective
    for name, shard in parameters.items():
        for kind in ("fisher", "theta_hat", "offset"):
            key = f"{kind}.{name}"
            if key in found and found[key].shape == shard.shape:
                found[key] = local_part(found[key], shard)
            elif key in found and isinstance(shard, DTensor):
                del found[key]  # a grown parameter's rows lie on other ranks now
        key = f"constant.{name}"
        if key in found and not holds_constant(shard):
            found[key] = torch.zeros_like(found[key])
    return found


def over_ranks(values: Sequence[float], shards: Sequence[Tensor], largest: bool = False) -> list[float]:
    """Return a number for each parameter, added up over the ranks that hold parts of it, or the largest of theirs.

    Raises:
        RankFailedError: if another rank failed in what all do :func:`together`.
    """
    found = list(values)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, shard in enumerate(shards):
        if isinstance(shard, DTensor):
            kinds.setdefault(key_of(shard), []).append(index)
    agreement = _agreement.get()
    for (mesh, along), indices in kinds.items():
        coordinates = mesh.get_coordinate()
        assert coordinates is not None
        replica = [c for i, c in enumerate(coordinates) if i != along]
        own = replica, [found[i] for i in indices]
        said = gathered(own, group_of(shards)) if agreement is None else agreement.exchange(own)
        parts = [told for place, told in said if place == replica]
        for k, i in enumerate(indices):
            found[i] = max(part[k] for part in parts) if largest else math.fsum(part[k] for part in parts)
    return found


def as_shards(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a penalty's state of this rank's parts as that of all: DTensors, and constants of whole parameters."""
    found = dict(state)
    held = [name for name in parameters if f"constant.{name}" in state]
    sums = over_ranks([float(state[f"constant.{n}"]) for n in held], [parameters[n] for n in held])
    for name, constant in zip(held, sums, strict=True):
        found[f"constant.{name}"] = torch.full_like(state[f"constant.{name}"], constant)
    for name, shard in parameters.items():
        for key in (f"{kind}.{name}" for kind in ("fisher", "theta_hat", "offset")):
            if key in found:
                found[key] = like(found[key], shard)
    return found


@contextmanager
def together(shards: Sequence[Tensor], what: str) -> Iterator[None]:
    """Let what all ranks do to sharded tensors be done by all of them, or by none.

    Raises:
        RankFailedError: if another rank failed in it.
    """
    with Agreement(group_of(shards), what) as agreement:
        token = _agreement.set(agreement)
        try:
            yield
        finally:
            _agreement.reset(token)
        agreement.exchange(None)


def agreed(own: T) -> list[T]:
    """Return what all ranks say, if they are doing something :func:`together`; otherwise what this one does.

    Raises:
        RankFailedError: if another rank failed in it.
    """
    agreement = _agreement.get()
    return [own] if agreement is None else agreement.exchange(own)


def group_of(tensors: Iterable[Tensor]) -> Group:
    """Return the process group of all ranks that hold parts of tensors, of which some are shards; None: all ranks.

    Raises:
        WplfastError: if they are some of the ranks alone, on a mesh of several dimensions.
    """
    mesh = next(t.device_mesh for t in tensors if isinstance(t, DTensor))
    if mesh.size() == dist.get_world_size():
        return None
    if mesh.ndim > 1:
        raise WplfastError(
            f"a mesh of {mesh.ndim} dimensions must hold all {dist.get_world_size()} ranks, got {mesh.size()}: use a "
            "process group of these ranks alone"
        )
    return mesh.get_group()


class Alias:
    """A plain leaf tensor on the memory of a parameter's local part, as long as that stays.

    Args:
        shard: the parameter.
    """

    def __init__(self, shard: DTensor) -> None:
        self._shard = shard
        with torch.no_grad():
            self._local = shard.to_local()
            self.tensor = self._local.detach().requires_grad_(shard.requires_grad)

    def fits(self) -> bool:
        """Tell whether the parameter's part is where it was; take over whether it requires grad."""
        with torch.no_grad():
            local = self._shard.to_local()
        if local is not self._local and (
            local.data_ptr() != self.tensor.data_ptr()
            or local.dtype != self.tensor.dtype
            or local.shape != self.tensor.shape
        ):
            return False
        if self.tensor.requires_grad != self._shard.requires_grad:
            self.tensor.requires_grad_(self._shard.requires_grad)
        return True


class ShardedParamGroup(ParamGroup):
    """A :class:`ParamGroup` of the local parts of shards on one mesh, with gradients as DTensors."""

    def _take(self, indices: Sequence[int], references: Any) -> None:
        """Take the local parts."""
        owned = references.tensors()
        self._shards: list[DTensor] = [owned[i] for i in indices]
        self._aliases = [references.alias(i) for i in indices]
        mesh, along, _ = placed(self._shards[0])
        self._process_group = mesh.get_group(along)

    def unchanged(self) -> bool:
        """Tell whether the local parts are what and where they were."""
        return all(alias.fits() for alias in self._aliases) and super().unchanged()

    def value(self) -> Tensor:
        """Return the value of all ranks' parts, differentiable with respect to the parameters."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            raise WplfastError("the penalty of sharded parameters cannot be compiled or transformed; call add_grad_()")
        prepared = self._dense() if self._gaps else self._prepared
        if not (torch.is_grad_enabled() and any(shard.requires_grad for shard in self._shards)):
            return self._summed(prepared.value())
        apply: Any = _ShardedPenalty.apply
        value: Tensor = apply(prepared, self._summed, *self._shards)
        return value

    def add_grad_(self, scale: float | Tensor) -> Tensor:
        """Add ``scale`` times the gradient to the local parts of ``.grad`` and return the value of all ranks' parts."""
        with self._gradients():
            value = super().add_grad_(scale)
            for shard, alias in zip(self._shards, self.theta, strict=True):
                if shard.grad is None and alias.grad is not None:
                    shard.grad = like(alias.grad, shard)
        return self._summed(value)

    def check_parameter_grads(self) -> None:
        """Check every ``.grad`` before anything is written to one."""
        with self._gradients():
            super().check_parameter_grads()

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Let the local parts have the local parts of ``.grad`` for theirs.

        Raises:
            ValueError: if one lies otherwise than its parameter.
        """
        try:
            for shard, alias in zip(self._shards, self.theta, strict=True):
                _take_grad_dtype(alias, shard)
                gradient = shard.grad if shard.requires_grad else None
                if gradient is None:
                    alias.grad = None
                    continue
                if not isinstance(gradient, DTensor) or gradient.placements != shard.placements:
                    got = getattr(gradient, "placements", type(gradient).__name__)
                    raise ValueError(f".grad must be a DTensor placed as its parameter, {shard.placements}, got {got}")
                alias.grad = gradient.to_local()
            yield
        finally:
            for alias in self.theta:
                alias.grad = None

    def _summed(self, value: Tensor) -> Tensor:
        """Add up what all ranks' parts come to."""
        dist.all_reduce(value, group=self._process_group)
        return value


def _take_grad_dtype(alias: Tensor, shard: Tensor) -> None:
    """Let a local part's ``.grad`` be of the dtype that the parameter's may be; PyTorch 2.10 has no such setting."""
    chosen = getattr(shard, "grad_dtype", shard.dtype)
    if getattr(alias, "grad_dtype", shard.dtype) != chosen:
        alias.grad = None
        alias.grad_dtype = chosen


class _ShardedPenalty(torch.autograd.Function):
    """The value of all ranks' parts; each rank's gradient is of its own, whatever the others' losses are."""

    @staticmethod
    def forward(ctx: Any, prepared: PreparedPenalty, summed: Callable[[Tensor], Tensor], *shards: Tensor) -> Tensor:
        """Evaluate."""
        ctx.shards = shards
        return summed(EagerPenalty.forward(ctx, prepared, *prepared.theta))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradient on, as DTensors."""
        if torch.is_grad_enabled():
            raise WplfastError("second derivatives of the penalty of sharded parameters are not served")
        _, *gradients = EagerPenalty.backward(ctx, upstream)
        pairs = zip(gradients, ctx.shards, strict=True)
        return (None, None, *(None if g is None else like(g, shard) for g, shard in pairs))
