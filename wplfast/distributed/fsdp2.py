"""The Fisher pass of an FSDP2 model (``fully_shard``): F as shards, in the parameters' own meshes and placements.

Each rank runs its own data through the model as FSDP2 runs it. Calls are captured on the whole parameters, whose
objects stay while their memory comes and goes. :mod:`.blocks` reduces the squares of a block as soon as the backward pass
is through with it, and :mod:`.lockstep` keeps ranks together. The first batch is rehearsed: it runs once to learn how
the model's calls are to be collected, which may take it several attempts, and once more to be counted.

Public API of FSDP2 but for one thing: whether gradients were synchronised, which cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..capture.accumulators import Accumulators
from ..capture.call import random_state, set_random_state
from ..errors import NonFiniteError
from ..fisher.accumulator import FisherAccumulator
from ..fisher.batches import Batch, moved
from ..fisher.preserve import Rewound
from ..fisher.result import Fisher
from ..params import Params, named
from .agreement import Group
from .blocks import Parameter, ShardedAccumulators, blocks_of, modules_of, parameters_of
from .lockstep import Lockstep, LockstepSession, Milestones, PassAgreement
from .shards import group_of, like

if TYPE_CHECKING:
    from ..capture.undo import Undo
    from ..fisher.diagonal import Run


class ShardedAccumulator(FisherAccumulator):
    """The accumulator of an FSDP2 model; every rank makes it.

    Args:
        ranks: the pass of all ranks.
        model: to which, or to parts of which, ``fully_shard`` was applied.
        params: as :class:`wplfast.FisherAccumulator` takes them.
        options: as :class:`wplfast.FisherAccumulator` takes them.

    Raises:
        UnsupportedParameterError: if a parameter is sharded in other ways as well.
    """

    runs_no_parts = (
        "samples are not run in batches of their own under FSDP2, where every forward pass is one of all ranks; look at "
        "a small copy of the model without it, or pass independent=True"
    )

    def __init__(
        self, ranks: ShardedPass, model: nn.Module, params: Params | None = None, **options: Any
    ) -> None:
        self._ranks = ranks
        self._every = parameters_of(model)
        chosen = named(model if params is None else params, sharded_too=True)
        known = {id(p.shard): p for p in self._every}
        self._of = {name: known.get(id(t)) or Parameter(name, t, t, None) for name, t in chosen.items()}
        super().__init__(model, {name: p.whole for name, p in self._of.items()}, **options)
        self.device = next(p.whole.device for p in self._every)

    def _allocate(self, with_grad: bool) -> Accumulators:
        """Make the blocks; their memory is there while it is written to."""
        order = {id(p): i for i, p in enumerate(self._every)}
        pairs = sorted(enumerate(self._of.values()), key=lambda pair: order.get(id(pair[1]), len(order)))
        indices, parameters = [i for i, _ in pairs], [p for _, p in pairs]
        self._blocks = blocks_of(parameters, indices, with_grad, self._skip, self._ranks.group)
        self._staged = self._staged_gradient = None
        return ShardedAccumulators(self._blocks)

    def _all_parameters(self) -> Iterable[Tensor]:
        """Return the whole parameters."""
        return [p.whole for p in self._every]

    def _new_session(self, parameters: list[Tensor], constants: list[Tensor]) -> LockstepSession:
        """Make the session of the pass."""
        names = list(self.parameters)
        session = LockstepSession(names, parameters, constants, self._accumulators, self.directions, self._by_losses)
        self._lockstep = Lockstep(self._ranks, self._blocks)
        session.lockstep, self._lockstep.session = self._lockstep, session
        return session

    def _open(self) -> None:
        """Change the shards too: FSDP2 lets the whole parameters require grad where these do."""
        undo, shards = self._undo, [p.shard for p in self._every]
        flags, watched = [shard.requires_grad for shard in shards], {id(p.shard) for p in self._of.values()}
        undo.then(partial(_reshard, self.model))
        undo.by(setattr, shards, repeat("requires_grad"), flags)
        for shard in shards:
            shard.requires_grad_(id(shard) in watched)
        undo.then(_without_sync(self.model))
        super()._open()
        assert self._session is not None
        lost = [s for s, flag in zip(shards, flags, strict=True) if flag and id(s) not in watched]
        self._session.frozen += lost
        milestones = Milestones(self.model, self._blocks, self._lockstep)
        undo.then(milestones.remove)
        for index, p in enumerate(self._of.values()):
            if p.module is not None and p.whole.dtype != torch.float64:  # FSDP2 widens gradients that it does not reduce
                caught = partial(self._session.leaf_grads.catch, index)
                undo.then(p.whole.register_post_accumulate_grad_hook(caught).remove)

    def _check_model(self, model: nn.Module) -> None:
        """An FSDP2 model it is."""

    # ---- batches ---------------------------------------------------------------------------------------------------

    def accumulate(self, losses: Tensor, *args: Any, replay: Callable[[], Tensor] | None = None, **options: Any) -> None:
        """Accumulate one batch; see the base class."""
        lockstep = self._lockstep
        lockstep.losses = losses

        def run_again() -> Tensor:
            assert replay is not None
            lockstep.before_forward()
            lockstep.losses = replay()
            return lockstep.losses

        super().accumulate(losses, *args, replay=None if replay is None else run_again, **options)

    @property
    def has_batches(self) -> bool:
        """Whether losses of this rank had a graph."""
        return self._session is not None and self._session.n_batches > 0

    @property
    def counts(self) -> tuple[int, float, int]:
        """Samples, their weights' sum, and samples that were left out."""
        return self.n_samples, self._total_weight, self.n_skipped

    @counts.setter
    def counts(self, counts: tuple[int, float, int]) -> None:
        self.n_samples, self._total_weight, self.n_skipped = counts

    def run_once(self, run: Run, batch: Batch | None, own: Batch, rehearses: bool) -> None:
        """Run one batch of all ranks.

        Args:
            run: runs a batch.
            batch: this rank's; None: its data ended.
            own: this, or one to accompany the others with.
            rehearses: nothing is to be counted.
        """
        lockstep, counts = self._lockstep, self.counts
        lockstep.start_batch(rehearses, rehearses or self._verify == "always", partial(_for_company, run, own))
        if batch is not None:
            run.run(batch)
        else:
            run.before.take()
            outputs = own.forward(run.model)
            targets, _ = next(run.terms(own, outputs))
            losses = run.loss_fn(outputs, targets)
            self._spare_leaves(losses)
            run.limit.pass_round(self.n_samples)
            lockstep.losses = losses
        lockstep.end_batch()
        self._usable().pass_over(retain_graph=False)
        if rehearses:
            self.counts = counts

    def commit(self, keep: bool, before: tuple[int, float, int]) -> None:
        """Keep a batch of all ranks that was kept apart, or leave it out, with the counts before it."""
        for block in self._blocks:
            block.commit(keep)
        if not keep:
            left_out = self.n_samples - before[0] + self.n_skipped - before[2]
            self.counts = before
            self._nonfinite("a squared gradient of some rank is NaN or infinite", left_out)

    @property
    def stages(self) -> bool:
        """Whether batches are kept apart, to be left out where they have NaN."""
        return self._skip

    def is_spoilt(self) -> bool:
        """Whether this rank found NaN or inf in the last batch of all ranks, in its gradients or in F."""
        return self._lockstep.is_spoilt or bool(self.nonfinite_name())

    def nonfinite_name(self) -> str:
        """Name a parameter whose F has NaN or inf on this rank; "" where none has."""
        for block in self._blocks:
            if not block.is_finite():
                pairs = zip(block.indices, block.parts, strict=True)
                return next(list(self._of)[i] for i, part in pairs if not bool(part.isfinite().all()))
        return ""

    def _keep_batch(self, n_samples: int) -> bool:
        """Keep a batch: whether it has NaN shows once all ranks' squares are added up."""
        return True

    # ---- the result ------------------------------------------------------------------------------------------------

    def take_totals(self, said: Sequence[tuple[tuple[int, float, int], float, list[list[str]]]]) -> None:
        """Count the samples of all ranks, and take over which rules served what on others."""
        counts = list(zip(*(each for each, _, _ in said), strict=True))
        self.counts = sum(counts[0]), sum(counts[1]), sum(counts[2])
        for _, _, others in said:
            for names, more in zip(self._accumulators.rules, others, strict=True):
                names.update(more)
        self._accumulators.n_passes = round(max(passes for _, passes, _ in said) * self._n_batches)

    def told(self) -> tuple[tuple[int, float, int], float, list[list[str]]]:
        """Return what :meth:`take_totals` takes of each rank."""
        return self.counts, self._accumulators.n_passes / self._n_batches, [sorted(names) for names in self._accumulators.rules]

    @property
    def _n_batches(self) -> int:
        """Batches of this rank, or 1."""
        return max(1, self._usable().n_batches)

    def _divided(self, weight: float, final: bool) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return F and the mean gradient as shards."""
        names = list(self._of)
        kinds: list[dict[str, Tensor]] = [{} for _ in self._blocks[0].shards]
        for block in self._blocks:
            for found, parts in zip(kinds, block.shards, strict=True):
                for index, p, part in zip(block.indices, block.parameters, parts, strict=True):
                    found[names[index]] = like(part / weight, p.shard)
        fisher, *gradient = ({name: found[name] for name in names} for found in kinds)
        return fisher, gradient[0] if gradient else None

    def _owned(self) -> Mapping[str, Tensor]:
        """Return the shards."""
        return {name: p.shard for name, p in self._of.items()}


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
        if not any(has for _, has in said):
            accumulator.refuse_constants()
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


def _for_company(run: Run, batch: Batch) -> None:
    """Run the model on a batch for the sake of other ranks: nothing of it stays."""
    state = random_state(run.device)
    rewound = Rewound(run.before)
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), rewound:
        rewound.rewind()
        batch.forward(run.model)
    set_random_state(run.device, state)


def _group_of(model: nn.Module) -> Group:
    """Return the process group of all ranks that run the model."""
    for module in modules_of(model):
        module.reshard()
    return group_of(model.parameters())


def _without_sync(model: nn.Module) -> Callable[[], None]:
    """Let no gradients be reduced; return what gives back how it was."""
    before: list[tuple[Any, Mapping[str, bool]]] = []
    for module in modules_of(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        names = ("reduce_grads", "all_reduce_grads")
        before += [(g, {n: getattr(g, n) for n in names}) for g in groups if g is not None]
        module.set_requires_gradient_sync(False, recurse=False)

    def give_back() -> None:
        for group, flags in before:
            for name, value in flags.items():
                setattr(group, name, value)

    return give_back


def _reshard(model: nn.Module) -> None:
    """Free what is gathered, after an error as well."""
    modules = modules_of(model)
    for module in modules:
        reset = getattr(module, "reset_iter_state", None)
        if reset is not None and module._get_fsdp_state()._is_root:
            reset()
        module.reshard()
