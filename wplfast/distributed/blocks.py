"""What FSDP2 gathers and scatters together, a *block*: its parameters in both forms, and the Fisher of a batch.

A parameter has two forms: the shard, a DTensor that the user's optimizer holds, and the whole, a plain tensor that the
module holds while it runs. FSDP2 makes the whole one once and fills its memory again and again. Squares are
accumulated in the whole shape, in memory that is there from the first square of a batch until the block's backward pass
is through; then one reduce-scatter adds the squares of all ranks to what each rank keeps: its shard of F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..capture.accumulators import Accumulators
from ..errors import UnsupportedParameterError
from ..ops.layout import flat_dtype

#: Its name since PyTorch 2.13, and before.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Parameter:
    """A parameter in both forms; ``module`` is the one that FSDP2 was applied to, None for what FSDP2 leaves alone."""

    name: str
    shard: Tensor
    whole: Tensor
    module: nn.Module | None


def modules_of(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that ``fully_shard`` was applied to, the outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Return all parameters of a model, each once; every rank calls it. One block is gathered at a time.

    Raises:
        UnsupportedParameterError: if a parameter is sharded in other ways as well.
    """
    modules = modules_of(model)
    for module in modules:
        module.reshard()
    names: dict[int, str] = {}
    for name, shard in model.named_parameters():
        names[id(shard)] = name
    found: dict[int, Parameter] = {}
    for module in modules:
        assert isinstance(module, nn.Module)
        shards = list(module.named_parameters(remove_duplicate=False))
        if not found:
            _check_whole_ones_stay(module)
        module.unshard()
        for (_, shard), (_, whole) in zip(shards, module.named_parameters(remove_duplicate=False), strict=True):
            if whole is not shard:
                found.setdefault(id(shard), Parameter(names[id(shard)], shard, whole, module))
        module.reshard()
    for name, shard in model.named_parameters():
        one = found.setdefault(id(shard), Parameter(name, shard, shard, None))
        if isinstance(one.whole, DTensor) or (one.module is not None and _shard_dim(one.shard) is None):
            placed = f"{one.shard.placements} on {one.shard.device_mesh}" if isinstance(one.shard, DTensor) else ""
            raise UnsupportedParameterError(
                f"{name!r} is sharded in other ways than by FSDP2 alone ({placed}); a Fisher pass takes fully_shard "
                "models whose parameters are sharded along one mesh dimension, and replicated along the others"
            )
        if one.whole.is_complex() and one.module is not None:
            raise UnsupportedParameterError(f"{name!r} is complex; complex parameters under FSDP2 are not served")
    return [found[key] for key in names]


def _check_whole_ones_stay(module: FSDPModule) -> None:
    """Require that a module is given the same whole parameters whenever it is gathered: they are what is watched.

    Raises:
        UnsupportedParameterError: if they are others.
    """
    assert isinstance(module, nn.Module)
    seen = []
    for _ in range(2):
        module.unshard()
        seen.append([id(p) for p in module.parameters()])
        module.reshard()
    if seen[0] != seen[1]:
        raise UnsupportedParameterError(
            f"FSDP2 of PyTorch {torch.__version__} makes other whole parameters whenever it gathers them, in which a "
            "Fisher pass would see nothing; PyTorch 2.13 was tried"
        )


def _shard_dim(shard: Tensor) -> tuple[int, int] | None:
    """Return the mesh dimension that a DTensor is sharded along, and its own; None if these are not one."""
    assert isinstance(shard, DTensor)
    dims = [(i, p.dim) for i, p in enumerate(shard.placements) if type(p) is Shard]
    rest = [p for p in shard.placements if type(p) is not Shard]
    return dims[0] if len(dims) == 1 and all(isinstance(p, Replicate) for p in rest) else None


class Block:
    """Parameters of one module, mesh and dtype: their squares of the batch at hand, and this rank's shards of F.

    Args:
        parameters: these.
        indices: of them among all watched ones.
        with_grad: plain gradients are summed too.
        staged: a batch is kept apart until :meth:`commit`.
        group: of all ranks, for parameters that FSDP2 leaves alone: these are whole on every rank.

    Attributes:
        shards: for F, and for the mean gradient: one tensor a parameter, of the shape of its local part.
    """

    def __init__(
        self, parameters: Sequence[Parameter], indices: Sequence[int], with_grad: bool, staged: bool, group: Any
    ) -> None:
        self.parameters, self.indices = list(parameters), list(indices)
        self.module, like = parameters[0].module, parameters[0].shard
        self._dim, self._group, self._others = 0, None, [group]
        if isinstance(like, DTensor):
            found = _shard_dim(like)
            assert found is not None
            along, self._dim = found
            mesh = like.device_mesh
            self._group = mesh.get_group(along)
            self._others = [mesh.get_group(i) for i in range(mesh.ndim) if i != along]
        self._n_ranks = 1 if self._group is None else dist.get_world_size(self._group)
        wholes, self._n_kinds = [p.whole for p in parameters], 1 + with_grad
        self._dtype, self._device = flat_dtype(wholes[0].dtype), wholes[0].device
        length = sum(w.numel() for w in wholes)
        flat = torch.empty(self._n_kinds * length, dtype=self._dtype, device=self._device)
        parts = iter(flat.split([w.numel() for w in wholes] * self._n_kinds))
        #: For F, and for the mean gradient: tensors of the whole shapes, whose memory comes and goes.
        self.sums = [[next(parts).view(w.shape) for w in wholes] for _ in range(self._n_kinds)]
        self._flat, self._memory = flat, flat.untyped_storage()
        self._n_bytes = flat.nbytes
        self._memory.resize_(0)
        locals_ = [p.shard.to_local() if isinstance(p.shard, DTensor) else p.shard for p in parameters]
        self._numels = [local.numel() for local in locals_]
        self.shards = [_zeros(locals_, like) for _ in range(self._n_kinds)]
        self._staged = [_zeros(locals_, like) for _ in range(self._n_kinds)] if staged else None
        self.totals = torch.zeros(len(wholes), dtype=torch.float64, device=self._device)  # of squares, of this batch

    @property
    def is_open(self) -> bool:
        """Whether squares of this batch wait to be reduced."""
        return self._memory.size() > 0

    def open(self) -> None:
        """Let there be memory for squares."""
        if not self.is_open:
            self._memory.resize_(self._n_bytes)
            self._flat.zero_()

    def close(self) -> None:
        """Forget the squares."""
        self._memory.resize_(0)

    def note_totals(self) -> None:
        """Remember the sums of the squares by parameter: the squares themselves will be gone."""
        if self.is_open:
            self.totals += torch.stack([f.sum(dtype=torch.float64) for f in self.sums[0]])

    @torch.no_grad()
    def reduce(self) -> Callable[[], None]:
        """Begin to add up the squares of all ranks, in one reduce-scatter; every rank calls it.

        Returns:
            What ends it: it waits, and adds to the shards.
        """
        pieces = [(s, _chunk(s, self._dim, self._n_ranks)) for sums in self.sums for s in sums]
        packed = torch.zeros(self._n_ranks, sum(size for _, size in pieces), dtype=self._dtype, device=self._device)
        if self.is_open:
            for part, (tensor, _) in zip(packed.split([size for _, size in pieces], 1), pieces, strict=True):
                _pack(part, tensor, self._dim)
            self.close()
        if self._group is None:
            return partial(self._add, packed.view(-1), None, packed)
        own = torch.empty(packed.shape[1], dtype=self._dtype, device=self._device)
        work = _reduce_scatter(own, packed.view(-1), group=self._group, async_op=True)
        return partial(self._add, own, work, packed)

    @torch.no_grad()
    def _add(self, own: Tensor, work: Any, packed: Tensor) -> None:
        """Add what a reduce-scatter gave this rank, once it is there; what was sent is kept until then."""
        if work is not None:
            work.wait()
        del packed
        for group in self._others:
            dist.all_reduce(own, group=group)
        found = iter(own.split([_chunk(s, self._dim, self._n_ranks) for sums in self.sums for s in sums]))
        for kind in self.shards if self._staged is None else self._staged:
            for shard, numel in zip(kind, self._numels, strict=True):
                shard += next(found)[:numel].view(shard.shape).to(shard.device)

    def is_finite(self) -> bool:
        """Tell whether F has no NaN nor inf here."""
        return all(bool(torch.isfinite(part.amax())) for part in self.parts if part.numel())

    @property
    def parts(self) -> list[Tensor]:
        """This rank's shards of F as far as they may be new."""
        return (self.shards if self._staged is None else self._staged)[0]

    def commit(self, keep: bool) -> None:
        """Take over a batch that was kept apart, or drop it."""
        for kind, staged in zip(self.shards, self._staged or (), strict=False):
            for shard, part in zip(kind, staged, strict=True):
                if keep:
                    shard += part
                part.zero_()


def _zeros(locals_: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Return a zeroed tensor, float32 or wider, for each local part."""
    return [torch.zeros(t.shape, dtype=flat_dtype(like.dtype), device=like.device) for t in locals_]


def _chunk(tensor: Tensor, dim: int, n_ranks: int) -> int:
    """Return the elements of the largest shard."""
    if not tensor.dim() or not tensor.numel():
        return tensor.numel()
    return -(-tensor.shape[dim] // n_ranks) * (tensor.numel() // tensor.shape[dim])


def _pack(rows: Tensor, tensor: Tensor, dim: int) -> None:
    """Write a tensor's shards to the rows [n_ranks, size of the largest], which are zero."""
    if dim:  # FSDP2 shards other dimensions evenly alone
        shape = tensor.shape
        split = tensor.view(-1, len(rows), shape[dim] // len(rows), *shape[dim + 1 :])
        rows.copy_(split.movedim(1, 0).reshape(len(rows), -1))
        return
    flat, size = tensor.reshape(-1), rows.shape[1]
    n_full = flat.numel() // size if size else 0
    rows[:n_full] = flat[: n_full * size].view(n_full, size)
    rest = flat[n_full * size :]
    if rest.numel():
        rows[n_full, : rest.numel()] = rest


class _Opening(Sequence[Tensor]):
    """Sums by a parameter's index; who asks for one finds memory there."""

    def __init__(self, blocks: Sequence[Block], kind: int) -> None:
        self._of: dict[int, tuple[Block, Tensor]] = {
            i: (b, b.sums[kind][k]) for b in blocks for k, i in enumerate(b.indices)
        }

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        assert isinstance(index, int)
        block, tensor = self._of[index]
        block.open()
        return tensor

    def raw(self) -> list[Tensor]:
        """Return the tensors as they are."""
        return [self._of[i][1] for i in range(len(self))]


class ShardedAccumulators(Accumulators):
    """Accumulators whose memory comes and goes with the blocks that they belong to.

    Args:
        blocks: all of them.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        fisher, *gradient = (_Opening(blocks, kind) for kind in range(len(blocks[0].sums)))
        super().__init__(fisher, gradient[0] if gradient else None, fisher.raw())
        self._blocks = list(blocks)

    def sums(self) -> list[Tensor]:
        """Return the sums of each parameter's squares of this batch, reduced already or not."""
        found: dict[int, Tensor] = {}
        for block in self._blocks:
            for k, index in enumerate(block.indices):
                found[index] = block.totals[k] + (block.sums[0][k].sum(dtype=torch.float64) if block.is_open else 0)
        return [found[i] for i in range(len(self.like))]

    def clear(self, index: int) -> None:
        """Forget what one parameter gathered in this batch."""
        for block in self._blocks:
            if index in block.indices and block.is_open:
                for kind in block.sums:
                    kind[block.indices.index(index)].zero_()


def blocks_of(
    parameters: Sequence[Parameter], indices: Sequence[int], with_grad: bool, staged: bool, group: Any
) -> list[Block]:
    """Group watched parameters by module, mesh, dimension and dtype."""
    kinds: dict[Any, list[int]] = {}
    for position, p in enumerate(parameters):
        mesh = (p.shard.device_mesh, p.shard.placements) if isinstance(p.shard, DTensor) else None
        kinds.setdefault((id(p.module), mesh, p.whole.dtype, p.whole.device), []).append(position)
    return [
        Block([parameters[k] for k in chosen], [indices[k] for k in chosen], with_grad, staged, group)
        for chosen in kinds.values()
    ]
