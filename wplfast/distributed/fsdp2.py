"""The Fisher pass of an FSDP2 model (``fully_shard``): F as shards, in the parameters' own meshes and placements.

Each rank runs its own data through the model as FSDP2 runs it. Calls are captured on the whole parameters, whose
objects stay while their memory comes and goes (:mod:`.sharded_accumulator`). :mod:`.blocks` reduces the squares of a
block as soon as the backward pass is through with it, and :mod:`.lockstep` keeps ranks together. The first batch is
rehearsed: it runs once to learn how the model's calls are to be collected, which may take it several attempts, and once
more to be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..capture.call import random_state, set_random_state
from ..errors import NonFiniteError
from ..fisher.accumulator import FisherAccumulator
from ..fisher.batches import Batch, moved
from ..fisher.result import Fisher
from .agreement import Group
from .blocks import modules_of
from .lockstep import PassAgreement
from .sharded_accumulator import ShardedAccumulator
from .shards import group_of

if TYPE_CHECKING:
    from ..capture.undo import Undo
    from ..fisher.diagonal import Run


class ShardedPass(PassAgreement):
    """A pass of all ranks of an FSDP2 model, each over data of its own.

    Args:
        model: to which, or to parts of which, ``fully_shard`` was applied.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        super().__init__(_group_of(model), "fisher_diagonal")

    def accumulator(self, kind: type[FisherAccumulator], *args: Any, **options: Any) -> ShardedAccumulator:
        """Make what accumulates, in place of the kind for other models."""
        return ShardedAccumulator(self, *args, **options)

    def begin(self, model: nn.Module, options: Mapping[str, Any], undo: Undo) -> None:
        """Find out whether all ranks are about to do the same.

        Raises:
            ValueError: on all ranks, if options differ.
        """
        said = self.exchange(options)
        for key in options:
            if any(each[key] != said[0][key] for each in said):
                got = ", ".join(f"{each[key]!r} on rank {rank}" for rank, each in enumerate(said))
                raise ValueError(f"{key} must be the same on all ranks, got {got}")

    def run_all(self, run: Run, batches: Iterator[Batch], bar: Any) -> None:
        """Run all batches of all ranks; ranks whose data ended accompany the others.

        Args:
            run: runs a batch.
            batches: this rank's.
            bar: the progress bar, if there is one.

        Raises:
            RankFailedError: if another rank failed.
            NonFiniteError: on all ranks, if F has NaN or inf.
        """
        accumulator = run.accumulator
        assert isinstance(accumulator, ShardedAccumulator)
        own: Batch | None = None
        while True:
            batch = next((b for b in batches if not (b.is_empty or run.limit.has_repeats_alone)), None)
            bad = "" if accumulator.stages else accumulator.nonfinite_name()
            is_new = batch is not None and not accumulator.has_batches
            said = self.exchange((batch is not None, is_new, own is None and batch is None, bad))
            found = next((name for *_, name in said if name), "")
            if found:
                raise NonFiniteError(
                    f"a squared gradient of {found!r} is NaN or infinite; look for overflow in the model, or pass "
                    "on_nonfinite='skip'"
                )
            have = [has for has, *_ in said]
            if not any(have) or run.limit.is_reached(accumulator.n_samples):
                return
            own = own if batch is None else batch
            if any(lacks for _, _, lacks, _ in said):
                own = self._given(have.index(True), own, accumulator.device)
            assert own is not None
            self._step(run, accumulator, batch, own, rehearses=any(new for _, new, _, _ in said))
            if bar is not None:
                bar.update(1)

    def fisher(self, accumulator: FisherAccumulator) -> Callable[[], Fisher]:
        """Return what makes the Fisher once the model is as it was.

        Raises:
            ValueError: on all ranks, if none has a sample, or none has one that depends on the parameters.
        """
        assert isinstance(accumulator, ShardedAccumulator)
        said = self.exchange((accumulator.told(), accumulator.has_batches))
        accumulator.take_totals([told for told, _ in said])
        if not accumulator.n_samples:
            skipped = accumulator.n_skipped
            raise ValueError(
                f"data yielded no usable samples on any of the {self.n_ranks} ranks ({skipped} skipped)"
                if skipped
                else f"data is empty on all {self.n_ranks} ranks"
            )
        accumulator.check_reached(any(has for _, has in said))
        found, _ = accumulator.part()
        found.reduced = True
        return lambda: found

    def _given(self, giver: int, own: Batch | None, device: torch.device) -> Batch:
        """Return this rank's batch; where it never had one, that of a rank which has."""
        gives = own is not None and self.rank == giver
        said = self.exchange(moved((own.inputs, own.targets), torch.device("cpu")) if gives and own else None)
        if own is not None:
            return own
        inputs, targets = moved(said[giver], device)
        return Batch(inputs, targets, None)

    def _step(
        self, run: Run, accumulator: ShardedAccumulator, batch: Batch | None, own: Batch, rehearses: bool
    ) -> None:
        """Run one batch of all ranks; twice where some rank has seen none yet."""
        before = accumulator.counts
        if rehearses:
            state, drawn, limit = random_state(run.device), run.generator.get_state(), run.limit
            run.limit = limit.copied()
            accumulator.run_once(run, batch, own, rehearses=True)
            run.before.restore()
            set_random_state(run.device, state)
            run.generator.set_state(drawn)
            run.limit = limit
        accumulator.run_once(run, batch, own, rehearses=False)
        if accumulator.stages:
            accumulator.commit(not any(self.exchange(accumulator.is_spoilt())), before)


def _group_of(model: nn.Module) -> Group:
    """Return the process group of all ranks that run the model."""
    for module in modules_of(model):
        module.reshard()
    return group_of(model.parameters())
