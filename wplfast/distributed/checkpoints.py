"""Penalties in checkpoints: of ``torch.distributed.checkpoint``, saved on some ranks, loaded on any; of rank 0 alone.

Saving with the former needs nothing of this: a penalty's ``state_dict`` holds DTensors where its parameters are such.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from ..errors import NameMismatchError
from ..params import some
from .agreement import has_group
from .shards import like

if TYPE_CHECKING:
    from ..penalty.loss import WeightPlasticityLoss


def load_penalty(penalty: WeightPlasticityLoss, checkpoint: str | os.PathLike[str], key: str = "wpl") -> None:
    """Read the anchors of a penalty from a checkpoint that held its ``state_dict()`` under a key.

    ``dcp.load`` fills tensors that are there already, and a penalty that was not consolidated has none. So they are
    made first, of the shapes that the checkpoint tells, and as shards where the parameters are.

    Args:
        penalty: over parameters of the same names; sharded on any mesh, or whole. Every rank calls this.
        checkpoint: a folder.
        key: of the penalty in what was saved, ``dcp.save({key: penalty.state_dict()}, checkpoint_id=folder)``.

    Raises:
        NameMismatchError: if the checkpoint has nothing under the key, or of other parameters.

    Example:
        >>> import tempfile, torch, wplfast
        >>> import torch.distributed.checkpoint as dcp
        >>> wpl, other = (wplfast.WeightPlasticityLoss({"w": torch.zeros(2, requires_grad=True)}) for _ in range(2))
        >>> wpl.consolidate({"w": torch.ones(2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dcp.save({"wpl": wpl.state_dict()}, checkpoint_id=folder, no_dist=True)
        ...     wplfast.distributed.load_penalty(other, folder)
        >>> other.n_anchors
        1
    """
    entries: dict[str, Any] = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    prefix = f"{key}."
    kept = {n.removeprefix(prefix): e for n, e in entries.items() if n.startswith(prefix)}
    kept = {name: entry for name, entry in kept.items() if isinstance(entry, TensorStorageMetadata)}
    if not kept:
        raise NameMismatchError(f"{os.fspath(checkpoint)} has no penalty under {key!r}; it has {some(sorted(entries))}")
    parameters = penalty._groups.references.by_name()
    state = {name: _blank(entry, parameters.get(name.partition(".")[2])) for name, entry in kept.items()}
    load({key: state}, checkpoint_id=checkpoint, no_dist=not has_group())
    penalty.load_state_dict(state)


class WholeState:
    """A penalty whose ``state_dict`` is whole, for what keeps that of rank 0 alone, as ``Accelerator.save_state`` does.

    A pickle of shards would hold those of rank 0, and lose all others. Every rank calls both methods. The first process
    of each node holds all anchors for a moment, on the CPU; the others hold one tensor at a time.

    Args:
        penalty: over sharded parameters, or others.

    Example:
        >>> import torch, wplfast
        >>> wpl = wplfast.WeightPlasticityLoss(torch.nn.Linear(2, 1))
        >>> state = wplfast.distributed.WholeState(wpl)  # accelerator.register_for_checkpointing(state)
        >>> state.load_state_dict(state.state_dict())
    """

    def __init__(self, penalty: WeightPlasticityLoss) -> None:
        """See the class."""
        self.penalty = penalty

    def state_dict(self) -> dict[str, Tensor]:
        """Return the penalty's state: whole on the first process of each node, empty on others if there are shards."""
        state = self.penalty.state_dict()
        if not any(isinstance(tensor, DTensor) for tensor in state.values()):
            return state
        keeps = dist.get_node_local_rank(dist.get_rank()) == 0
        found = {}
        for key, tensor in state.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keeps:
                found[key] = whole.cpu()
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole state; each rank takes its part of it.

        Raises:
            RuntimeError: on all ranks, as the penalty's ``load_state_dict`` does.
        """
        self.penalty.load_state_dict(state)


def _blank(entry: TensorStorageMetadata, parameter: Tensor | None) -> Tensor:
    """Return a tensor to read an entry into: a shard where the parameter is one of its shape."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and parameter.shape == entry.size:
        return like(torch.zeros_like(parameter.to_local(), dtype=dtype), parameter)
    return torch.zeros(entry.size, dtype=dtype, device="cpu")
