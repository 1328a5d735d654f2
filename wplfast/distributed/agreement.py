"""Ranks that fail together: a status is exchanged before anything collective, so that none waits for one that failed.

An exchange is one small collective in which a rank that failed takes part as well, with its error. An alarm in the
group's store, which can be looked at without waiting for anyone, makes ranks that are busy with batches of their own
come to the exchange at once.
"""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..errors import RankFailedError

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

#: A ``torch.distributed`` process group; None: all ranks.
Group: TypeAlias = Any

logger = logging.getLogger(__name__)

#: Bytes that an exchange sends for each rank; what is longer takes a second collective.
FRAME = 512

#: Seconds between two looks at the alarm.
PATIENCE = 0.2


@dataclass
class _Failure:
    """What a rank that failed says in an exchange."""

    text: str


class _Stopped:
    """What a rank that was called to an exchange by the alarm says in it."""


class Agreement:
    """A stretch of work of all ranks of a group: if one fails in it, all do, with its error and within seconds.

    All ranks enter it in the same order, as the first thing that they do: what fails before is seen by no other rank.
    An error that leaves the context is told to the others in one exchange; whatever they are at, they get there by
    themselves (where they :meth:`exchange` something in every batch), or because :meth:`poll` found the alarm. Between
    two exchanges a rank may fail anywhere but inside a collective of an engine's, where others wait for it. The last
    one is :meth:`finish`: what fails after it must fail on all ranks alike. The group is usable afterwards: no
    collective is left half-way.

    Args:
        group: the process group; default: all ranks. This rank must be in it.
        what: is done, for messages.

    Example:
        >>> def sum_of_losses(batches):  # each rank's own; in none is anything collective
        ...     with Agreement(what="the sum") as agreement:
        ...         total = 0.0
        ...         for batch in batches:
        ...             agreement.poll()
        ...             total += batch.sum().item()
        ...         return sum(agreement.finish(total))
    """

    def __init__(self, group: Group = None, what: str = "this") -> None:
        """See the class."""
        self.group, self._what = group, what
        self.rank, self.n_ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"{what} is of the ranks of a group, and this rank is not in it")
        self._ended = False  # no exchange can be joined any more
        self._looked = time.monotonic()
        self._store = store_of(group)
        self._alarm = f"failed/{self._store.add(f'passes/{self.rank}', 1)}"

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others of an error that leaves."""
        if error is None or self._ended:
            return
        self._ended = True
        text = f"{type(error).__name__}: {error}"
        logger.error("rank %d failed in %s, which ends it on all ranks: %s", self.rank, self._what, text)
        try:
            self._store.set(self._alarm, b"")
            gathered(_Failure(text), self.group)
        except Exception as other:  # the error that leaves says more
            logger.warning("rank %d could not tell the others of its error: %s", self.rank, other)

    def poll(self) -> None:
        """Raise if another rank has failed; otherwise go on at once. Nothing collective.

        Raises:
            RankFailedError: with the other rank's error.
        """
        now = time.monotonic()
        if now - self._looked < PATIENCE:
            return
        self._looked = now
        try:
            alarmed = self._store.check([self._alarm])
        except RuntimeError as error:
            self._ended = True
            raise RankFailedError(f"{self._what} ended: the process group's store is gone ({error})") from error
        if alarmed:
            self._said(_Stopped())

    def exchange(self, value: T) -> list[T]:
        """Return what all ranks say, in the order of ranks: one small collective that every rank comes to.

        Args:
            value: anything that can be pickled; beyond some 500 bytes it takes a second collective.

        Raises:
            RankFailedError: if another rank came here with an error, or a process ended.
        """
        return self._said(value)

    def finish(self, value: T) -> list[T]:
        """Exchange for the last time: an error that leaves the context afterwards is this rank's own.

        Args:
            value: as in :meth:`exchange`.

        Raises:
            RankFailedError: as :meth:`exchange`.
        """
        said = self._said(value)
        self._ended = True
        return said

    def _said(self, value: Any) -> list[Any]:
        """Exchange, and raise if a rank failed."""
        try:
            said = gathered(value, self.group)
        except RuntimeError as error:
            self._ended = True
            raise RankFailedError(f"{self._what} ended: a rank does not answer any more ({error})") from error
        failed = {rank: each.text for rank, each in enumerate(said) if isinstance(each, _Failure)}
        if failed:
            self._ended = True
            raise RankFailedError(
                f"{self._what} ended: " + "; ".join(f"rank {rank} failed with {text}" for rank, text in failed.items())
            )
        return said


def gathered(value: T, group: Group = None) -> list[T]:
    """Return what all ranks of a group say: one collective for what is small, two for what is not.

    Args:
        value: anything that can be pickled.
        group: default: all ranks.
    """
    content = pickle.dumps(value)
    frames = _frames(len(content).to_bytes(8, "little") + content[: FRAME - 8], FRAME, group)
    sizes = [int.from_bytes(frame[:8], "little") for frame in frames]
    whole = [frame[8 : 8 + size] for frame, size in zip(frames, sizes, strict=True)]
    if max(sizes) > FRAME - 8:
        rest = _frames(content[FRAME - 8 :], max(sizes) - (FRAME - 8), group)
        whole = [(first + more)[:size] for first, more, size in zip(whole, rest, sizes, strict=True)]
    return [pickle.loads(each) for each in whole]


def _frames(content: bytes, size: int, group: Group) -> list[bytes]:
    """Gather so many bytes of each rank, zeros after what it has."""
    with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        own = torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8).to(collective_device(group))
        frames = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(frames, own, group=group)
        return [frame.cpu().numpy().tobytes() for frame in frames]


def collective_device(group: Group, kinds: set[str] | None = None, tensors: list[Tensor] | None = None) -> torch.device:
    """Return where a group's collectives can run.

    Args:
        group: the process group.
        kinds: of the devices that all ranks' tensors are on: if it is one that the group serves, there.
        tensors: of this rank, which tell the index of that device.
    """
    served = [backend.split(":")[0] for backend in dist.get_backend_config(group).split(",")]
    kind = next(iter(kinds)) if kinds and len(kinds) == 1 else "cpu"
    kind = kind if kind in served else served[0]
    return next((t.device for t in tensors or () if t.device.type == kind), torch.device(kind))


def has_group() -> bool:
    """Tell whether there is a process group, be it of one rank."""
    return dist.is_available() and dist.is_initialized()


def is_distributed() -> bool:
    """Tell whether there is a process group of more than one rank."""
    return has_group() and dist.get_world_size() > 1


def store_of(group: Group = None) -> Any:
    """Return the store that a group's ranks share, with keys of this library and group alone."""
    whole: Any = dist.group.WORLD
    name = (whole if group is None else group).group_name
    return distributed_c10d.PrefixStore(f"wplfast/{name}", distributed_c10d._get_default_store())
