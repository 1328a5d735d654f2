"""The accumulator of an FSDP2 model: captured on whole parameters, one block's squares at a time, kept as shards.

Public API of FSDP2 but for one thing: whether gradients were synchronised, which cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..capture.accumulators import Accumulators
from ..capture.call import random_state, set_random_state
from ..fisher.accumulator import FisherAccumulator
from ..fisher.batches import Batch
from ..fisher.preserve import Rewound
from ..params import Params, named
from .blocks import Parameter, ShardedAccumulators, blocks_of, modules_of, parameters_of
from .lockstep import Lockstep, LockstepSession, Milestones
from .shards import like

if TYPE_CHECKING:
    from ..fisher.diagonal import Run
    from .fsdp2 import ShardedPass


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
        "samples are not run in batches of their own under FSDP2, where every forward pass is one of all ranks; look "
        "at a small copy of the model without it, or pass independent=True"
    )

    def __init__(self, ranks: ShardedPass, model: nn.Module, params: Params | None = None, **options: Any) -> None:
        self._ranks, self._accompanies = ranks, False
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
        undo.then(partial(_reshard, self.model, self._ranks))
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
            if (
                p.module is not None and p.whole.dtype != torch.float64
            ):  # FSDP2 widens gradients that it does not reduce
                caught = partial(self._session.leaf_grads.catch, index)
                undo.then(p.whole.register_post_accumulate_grad_hook(caught).remove)

    def _check_model(self, model: nn.Module) -> None:
        """An FSDP2 model it is."""

    # ---- batches ---------------------------------------------------------------------------------------------------

    def accumulate(
        self, losses: Tensor, *args: Any, replay: Callable[[], Tensor] | None = None, **options: Any
    ) -> None:
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
            targets = next(run.terms(own, outputs)).targets
            losses = run.loss_fn(outputs, targets)
            if not self._accompanies:
                self._accompanies = True
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
        return (
            self.counts,
            self._accumulators.n_passes / self._n_batches,
            [sorted(names) for names in self._accumulators.rules],
        )

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


def _for_company(run: Run, batch: Batch) -> None:
    """Run the model on a batch for the sake of other ranks: nothing of it stays."""
    state = random_state(run.device)
    rewound = Rewound(run.before)
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), rewound:
        rewound.rewind()
        batch.forward(run.model)
    set_random_state(run.device, state)


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


def _reshard(model: nn.Module, ranks: ShardedPass) -> None:
    """Free what is gathered; after an error inside of a pass, forget the pass."""
    modules = modules_of(model)
    for module in modules if ranks.is_inside else ():
        with suppress(AttributeError, RuntimeError):  # of PyTorch 2.13, and of the outermost module alone
            module.reset_iter_state()
    for module in modules:
        module.reshard()
