"""Do the replicas of a penalty agree? Compared in passing, so that a rank that consolidates alone is kept waiting once.

Ranks leave a digest of F and anchors in the store that their process group shares. The first one's is what all others
compare with, and each waits a little until all have been there. So those that differ all raise where they arrive
together; a late one raises alone, and one that nobody follows goes on after :data:`WAIT` seconds, with a warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import WplfastError
from .agreement import is_distributed, store_of
from .fingerprint import fingerprints

logger = logging.getLogger(__name__)

#: Seconds that a rank waits for the others.
WAIT = 10.0

_is_local = ContextVar("_is_local", default=False)
_gave_up: WeakSet[Any] = WeakSet()  # process groups that a rank waited for in vain


@contextmanager
def local() -> Iterator[None]:
    """Let what is done inside be this rank's own affair: no F or anchor is compared with those of other ranks.

    It is for penalties that are meant to differ (each client of federated learning has its own), and for those that one
    rank has alone.

    Example:
        >>> import torch, wplfast
        >>> wpl = wplfast.WeightPlasticityLoss({"w": torch.zeros(2, requires_grad=True)})
        >>> with wplfast.distributed.local():
        ...     wpl.consolidate({"w": torch.ones(2)})
    """
    token = _is_local.set(True)
    try:
        yield
    finally:
        _is_local.reset(token)


def check_replicas(
    names: Sequence[str], fisher: Sequence[Tensor], theta_hat: Sequence[Tensor], known: bool, source: Mapping[str, Any]
) -> None:
    """Require that all ranks that anchor these parameters do so alike; without a process group, of nothing.

    Args:
        names: of the parameters.
        fisher: diagonals, as they enter.
        theta_hat: anchors.
        known: the parameters are those of replicas, or F was reduced: anchors must be the same too. Otherwise F is
            compared among ranks whose anchors are the same: models that differ are none of each other's business.
        source: what F was given as, for messages.

    Raises:
        WplfastError: if F or anchors differ from those of another rank.
    """
    if not is_distributed() or _is_local.get() or any(map(is_traceable_wrapper_subclass, theta_hat)):
        return
    shapes = [tuple(tensor.shape) for tensor in theta_hat]
    anchors, diagonals = _digest(fingerprints(theta_hat)), _digest(fingerprints(fisher))
    what, told = _digest(names, shapes), {"anchors": anchors, "F": diagonals}
    if not known:
        what, told = _digest(what, anchors), {"F": diagonals}
    differing, others = _Meeting(what).compare(told)
    if not differing:
        return
    whose = f"rank {dist.get_rank()}'s and {others}"
    if differing == "anchors":
        raise WplfastError(
            f"the anchors of this penalty differ between ranks, {whose}: these are no replicas, and would be pulled "
            "apart further. Let all start from rank 0's parameters, as DistributedDataParallel does; if they are meant "
            "to differ, consolidate within wplfast.distributed.local()"
        )
    own = getattr(source, "n_samples", None)
    of = f"; this rank's is of {own:,} samples and was not reduced" if own and not getattr(source, "reduced", 0) else ""
    raise WplfastError(
        f"the F of this penalty differs between ranks, {whose}{of}: replicas would drift apart. Call "
        "fisher.all_reduce_() on all ranks first, or fisher_diagonal(..., reduce=True); if ranks are meant to have "
        "penalties of their own, consolidate within wplfast.distributed.local()"
    )


class _Meeting:
    """One consolidation of the same parameters on all ranks: the n-th on each.

    A rank that consolidated alone is ahead of the others. Where these differ from what it left behind, they follow it
    to its next consolidation, if there is one.

    Args:
        what: is consolidated.
    """

    def __init__(self, what: str) -> None:
        """See the class."""
        self._store, self._rank = store_of(), dist.get_rank()
        self._what, self._number = what, 0

    def compare(self, told: Mapping[str, str]) -> tuple[str, str]:
        """Return what differs from another rank, and whose that is; nothing if nothing does."""
        own = " ".join(told.values())
        self._go_on()
        while True:
            entry = self._store.compare_set(self._key("first"), "", f"{own}/{self._rank}").decode()
            first, rank = entry.rsplit("/", 1)
            pairs = zip(told, told.values(), first.split(), strict=True)
            differing = [name for name, one, other in pairs if one != other]
            if not differing or not self._store.check([self._key("left")]) or not self._is_followed():
                break
            self._go_on()
        if differing:
            self._store.set(self._key("differing"), f"{differing[0]}/{self._rank}")
        if self._store.add(self._key("arrived"), 1) == dist.get_world_size():
            self._store.set(self._key("all"), "")
        self._wait()
        if differing:
            return differing[0], f"rank {rank}'s"
        if self._store.check([self._key("differing")]):
            what, rank = self._store.get(self._key("differing")).decode().split("/")
            return what, f"rank {rank}'s"
        return "", ""

    def _go_on(self) -> None:
        """Go to this rank's next meeting."""
        self._number = self._store.add(f"{self._what}/{self._rank}", 1)

    def _key(self, name: str, ahead: int = 0) -> str:
        """Name an entry of this meeting, or of one that follows."""
        return f"{self._what}/{self._number + ahead}/{name}"

    def _is_followed(self) -> bool:
        """Tell whether another rank comes to the next meeting."""
        try:
            self._store.wait([self._key("first", ahead=1)], timedelta(seconds=WAIT))
        except RuntimeError:
            return False
        return True

    def _wait(self) -> None:
        """Wait for the other ranks; once in vain, and then no more."""
        group = dist.group.WORLD
        if group in _gave_up:
            self._store.set(self._key("left"), "")
            return
        try:
            self._store.wait([self._key("all")], timedelta(seconds=WAIT))
        except RuntimeError:
            _gave_up.add(group)
            self._store.set(self._key("left"), "")
            here = self._store.add(self._key("arrived"), 0)
            logger.warning(
                "F and anchors were compared on %d of %d ranks, as the others did not consolidate within %g seconds: "
                "they find out for themselves if theirs differ, and are not waited for again. If a rank has a penalty "
                "alone, consolidate it within wplfast.distributed.local()",
                here,
                dist.get_world_size(),
                WAIT,
            )


def _digest(*parts: Any) -> str:
    """Return some digits that stand for anything with a repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
