"""A Fisher pass of one process, and one that all ranks share: what they ask before it, during it and after it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NameMismatchError
from ..params import is_fully_sharded, some
from .agreement import Agreement, Group, collective_device, has_group, is_distributed
from .engines import group_of, inner_module, is_replica, replicas_in
from .fingerprint import fingerprints

if TYPE_CHECKING:
    from ..capture.undo import Undo
    from ..fisher.accumulator import FisherAccumulator
    from ..fisher.batches import Batch
    from ..fisher.diagonal import Run
    from ..fisher.result import Fisher
    from .fsdp2 import ShardedPass

logger = logging.getLogger(__name__)
_said: set[str] = set()


def open_pass(model: nn.Module, reduce: bool | None) -> OwnPass | SharedPass | ShardedPass:
    """Return the pass of a model: of all ranks where it is to be reduced.

    Args:
        model: with what wraps it.
        reduce: True or False; None: where an engine keeps replicas of the model.

    Raises:
        RuntimeError: if it is to be reduced, and there is no process group.
    """
    if not has_group():
        if reduce:
            raise RuntimeError("reduce=True needs a process group: call torch.distributed.init_process_group first")
        return OwnPass()
    if is_fully_sharded(model):
        from .fsdp2 import ShardedPass  # not with the package: a release of PyTorch may lack what it needs

        if reduce is False:
            raise ValueError("the Fisher of an FSDP2 model is one of all ranks: reduce=False cannot be had")
        return ShardedPass(model)
    if reduce or (reduce is None and is_replica(model)):
        return SharedPass(group_of(model))
    if reduce is None and is_distributed() and not _said:
        _said.add("local")
        logger.warning(
            "this Fisher is of this rank's data alone, since the model is not wrapped: reduce=True makes it one of all "
            "ranks' data (as fisher.all_reduce_() does), reduce=False says that it is meant"
        )
    return OwnPass(dist.get_rank() if reduce is None else 0)


class OwnPass:
    """A pass of this process alone.

    Args:
        rank: tells its draws from those of other ranks.
    """

    exchange: Callable[[Any], list[Any]] | None = None

    def __init__(self, rank: int = 0) -> None:
        """See the class."""
        self.rank = rank

    def __enter__(self) -> OwnPass:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nobody is to be told of an error."""

    def accumulator(self, kind: type[FisherAccumulator], *args: Any, **options: Any) -> FisherAccumulator:
        """Make what accumulates."""
        return kind(*args, **options)

    def begin(self, model: nn.Module, options: Mapping[str, Any], undo: Undo) -> None:
        """Nothing is to be agreed on."""

    def run_all(self, run: Run, batches: Iterator[Batch], bar: Any) -> None:
        """Run all batches."""
        for batch in batches:
            run.take(batch, bar)
            if run.limit.is_reached(run.accumulator.n_samples):
                break

    def fisher(self, accumulator: FisherAccumulator) -> Callable[[], Fisher]:
        """Return what makes the Fisher once the model is as it was.

        Raises:
            ValueError: if there is no sample, or none depends on the parameters.
        """
        skipped = accumulator.n_skipped
        if not accumulator.n_samples:
            raise ValueError(f"data yielded no usable samples ({skipped} skipped)" if skipped else "data is empty")
        found = accumulator.finish()
        return lambda: found


class SharedPass(Agreement):
    """A pass of all ranks of a group, each over data of its own.

    Args:
        group: the process group.
    """

    def __init__(self, group: Group) -> None:
        """See the class."""
        super().__init__(group, "fisher_diagonal")

    def begin(self, model: nn.Module, options: Mapping[str, Any], undo: Undo) -> None:
        """Find out whether all ranks are about to do the same to the same model.

        Buffers that DistributedDataParallel would take from rank 0 in its next forward pass are taken from there for
        the time of the pass.

        Args:
            model: with what wraps it.
            options: of the pass.
            undo: gives the buffers back.

        Raises:
            ValueError: on all ranks, if options or parameters differ.
            NameMismatchError: on all ranks, if names of parameters differ.
        """
        ignored = {name for ddp in replicas_in(model) for name in getattr(ddp, "parameters_to_ignore", ())}
        inner = inner_module(model)
        parameters = {n: p for n, p in inner.named_parameters() if n not in ignored}
        buffers = {n: b for n, b in inner.named_buffers() if n not in ignored}
        follow = any(ddp.broadcast_buffers for ddp in replicas_in(model))
        told = {**options, "parameters": _of_all(parameters), "buffers": _of_all(buffers) if follow else ""}
        told["shapes of buffers"] = [(name, tuple(b.shape), b.dtype) for name, b in buffers.items()] if follow else []
        said = self.exchange(told)
        differing = [key for key in told if any(rank[key] != said[0][key] for rank in said)]
        if "parameters" in differing:
            self._refuse(parameters)
        for key in differing:
            if key != "buffers":
                got = ", ".join(f"{each[key]!r} on rank {rank}" for rank, each in enumerate(said))
                raise ValueError(f"{key} must be the same on all ranks, got {got}")
        if differing:
            self._take_from_first(list(buffers.values()), undo)

    def accumulator(self, kind: type[FisherAccumulator], *args: Any, **options: Any) -> FisherAccumulator:
        """Make what accumulates this rank's part."""
        return kind(*args, **options)

    def run_all(self, run: Run, batches: Iterator[Batch], bar: Any) -> None:
        """Run all batches of this rank; then wait for those of the others, where a limit counts them.

        Raises:
            RankFailedError: if another rank failed.
        """
        for batch in batches:
            self.poll()
            run.take(batch, bar)
            if run.limit.is_reached(run.accumulator.n_samples):
                break
        run.limit.sit_out(run.accumulator.n_samples)

    def fisher(self, accumulator: FisherAccumulator) -> Callable[[], Fisher]:
        """Return what makes the Fisher of all ranks once the model is as it was.

        Raises:
            ValueError: on all ranks, if none has a sample, or none has one that depends on the parameters.
            RankFailedError: if another rank failed.
        """
        own, reached = accumulator.part()
        said = self.finish((own.n_samples, accumulator.n_skipped, reached))
        if not any(n_samples for n_samples, _, _ in said):
            skipped = sum(n for _, n, _ in said)
            raise ValueError(
                f"data yielded no usable samples on any of the {len(said)} ranks ({skipped} skipped)"
                if skipped
                else f"data is empty on all {len(said)} ranks"
            )
        accumulator.check_reached(any(is_reached for _, _, is_reached in said))
        return lambda: own.all_reduce_(self.group)

    def _refuse(self, parameters: Mapping[str, Tensor]) -> None:
        """Say which parameters differ.

        Raises:
            NameMismatchError: if names do.
            ValueError: if values do.
        """
        bits = fingerprints(parameters.values())
        said = self.exchange({n: (p.shape, p.dtype, b) for (n, p), b in zip(parameters.items(), bits, strict=True)})
        for rank, each in enumerate(said):
            if each.keys() != said[0].keys():
                alone = [n for n in said[0] if n not in each], [n for n in each if n not in said[0]]
                raise NameMismatchError(
                    "the ranks' models must have the same parameters: rank 0 alone has "
                    f"{some(alone[0])}, rank {rank} alone {some(alone[1])}"
                )
        names = [name for name in said[0] if any(each[name] != said[0][name] for each in said)]
        ranks = sorted({rank for rank, each in enumerate(said) if each != said[0]})
        raise ValueError(
            f"the ranks' models must be replicas, and {len(names)} parameters, among them {some(names)}, have other "
            f"values, shapes or types on rank {', '.join(map(str, ranks))} than on rank 0: their Fishers are of "
            "different models. Wrap the model in DistributedDataParallel, which sends rank 0's values to all, or pass "
            "reduce=False"
        )

    def _take_from_first(self, buffers: list[Tensor], undo: Undo) -> None:
        """Let this rank's buffers be those of rank 0 for a while."""
        undo.by(Tensor.copy_, buffers, [buffer.clone() for buffer in buffers])
        device = collective_device(self.group, {buffer.device.type for buffer in buffers}, buffers)
        first = dist.get_process_group_ranks(self.group)[0]
        with torch.no_grad():
            for buffer in buffers:
                sent = buffer.to(device).contiguous()
                dist.broadcast(sent, first, group=self.group)
                buffer.copy_(sent)


def _of_all(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes, dtypes and all bits."""
    bits = fingerprints(tensors.values())
    told = [(name, tuple(t.shape), t.dtype, b) for (name, t), b in zip(tensors.items(), bits, strict=True)]
    return hashlib.sha256(repr(told).encode()).hexdigest()
