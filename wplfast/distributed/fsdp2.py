"""The Fisher pass of an FSDP2 model (``fully_shard``): F as shards, in the parameters' own meshes and placements.

Each rank runs its own data through the model as FSDP2 runs it. Calls are captured on the whole parameters, whose
objects stay while their memory comes and goes. :mod:`.blocks` reduces the squares of a block as soon as the backward pass
is through with it, and :mod:`.lockstep` keeps ranks together. The first batch is rehearsed: it runs once to learn how
the model's calls are to be collected, which may take it several attempts, and once more to be counted.

Public API of FSDP2 but for one thing: whether gradients were synchronised, which cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..capture.accumulators import Accumulators
from ..capture.call import random_state, set_random_state
from ..errors import NonFiniteError, WplfastError
from ..fisher.accumulator import FisherAccumulator, Run
from ..fisher.batches import Batch, moved
from ..fisher.preserve import Rewound
from ..fisher.result import Fisher
from ..params import Params, named
from .agreement import Agreement
from .blocks import Parameter, ShardedAccumulators, blocks_of, modules_of, parameters_of
from .lockstep import Lockstep, LockstepSession, Milestones


class ShardedAccumulator(FisherAccumulator):
    """The accumulator of an FSDP2 model; every rank makes it, and runs all batches by :meth:`run_all`.

    Args:
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

    def __init__(self, model: nn.Module, params: Params | None = None, **options: Any) -> None:
        self._every = parameters_of(model)
        chosen = named(model if params is None else params, sharded_too=True)
        known = {id(p.shard): p for p in self._every}
        self._of = {name: known.get(id(t)) or Parameter(name, t, t, None) for name, t in chosen.items()}
        self._group = _group_of(self._every)
        super().__init__(model, {name: p.whole for name, p in self._of.items()}, **options)
        self.device = next(p.whole.device for p in self._every)

    def _allocate(self, with_grad: bool) -> Accumulators:
        """Make the blocks; their memory is there while it is written to."""
        order = {id(p): i for i, p in enumerate(self._every)}
        pairs = sorted(enumerate(self._of.values()), key=lambda pair: order.get(id(pair[1]), len(order)))
        indices, parameters = [i for i, _ in pairs], [p for _, p in pairs]
        self._blocks = blocks_of(parameters, indices, with_grad, self._skip, self._group)
        self._staged = self._staged_gradient = None
        return ShardedAccumulators(self._blocks)

    def _all_parameters(self) -> Iterable[Tensor]:
        """Return the whole parameters."""
        return [p.whole for p in self._every]

    def _new_session(self, parameters: list[Tensor], constants: list[Tensor]) -> LockstepSession:
        """Make the session of the pass."""
        names = list(self.parameters)
        session = LockstepSession(names, parameters, constants, self._accumulators, self.directions, self._by_losses)
        self._lockstep = Lockstep(Agreement(self._group, "the Fisher pass"), self._blocks)
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

    # ---- batches ---------------------------------------------------------------------------------------------------

    def run_all(self, run: Run, batches: Iterator[Batch], done: Callable[[], None]) -> None:
        """Run all batches of all ranks; ranks without any accompany the others.

        Args:
            run: runs a batch.
            batches: this rank's.
            done: called after each batch.

        Raises:
            RankFailedError: if another rank failed.
            NonFiniteError: on all ranks, if F has NaN or inf.
        """
        own: Batch | None = None
        with self._agreement as agreement:
            while True:
                batch = next((b for b in batches if not b.is_empty), None)
                is_new = batch is not None and not self._started.n_batches
                said = agreement.exchange((batch is not None, is_new, own is None, self.n_samples, self._nonfinite_name()))
                bad = [name for *_, name in said if name]
                if bad:
                    raise NonFiniteError(f"a squared gradient of {bad[0]!r} is NaN or infinite; look for overflow")
                enough = run.max_samples is not None and sum(n for *_, n, _ in said) >= run.max_samples
                if enough or not any(has for has, *_ in said):
                    break
                own = own if batch is None else batch
                if any(lacks and not has for has, _, lacks, *_ in said):
                    own = self._given([has for has, *_ in said], own)
                assert own is not None
                self._step(run, batch, own, rehearses=any(new for _, new, *_ in said))
                done()
            self._total(agreement)

    @property
    def _agreement(self) -> Agreement:
        """What the ranks agree by."""
        return self._lockstep.agreement

    @property
    def _started(self) -> LockstepSession:
        """The session."""
        session = self._lockstep.session
        assert session is not None
        return session

    def _given(self, have: list[bool], own: Batch | None) -> Batch:
        """Return this rank's batch; to those without any, the first rank that has one gives its."""
        giver, cpu = have.index(True), torch.device("cpu")
        gives = own is not None and self._agreement.rank == giver
        said = self._agreement.exchange(moved((own.inputs, own.targets), cpu) if gives and own is not None else None)
        if own is not None:
            return own
        inputs, targets = moved(said[giver], self.device)
        return Batch(inputs, targets, None)

    def _step(self, run: Run, batch: Batch | None, own: Batch, rehearses: bool) -> None:
        """Run one batch of all ranks; a new kind of batch twice."""
        state, counts = random_state(run.device), self._counts()
        drawn = run.generator.get_state()
        forward = partial(_for_company, run, own)
        if rehearses:
            self._run(run, batch, own, True, forward)
            self._set_counts(counts)
            run.before.restore()
            set_random_state(run.device, state)
            run.generator.set_state(drawn)
        self._run(run, batch, own, False, forward)
        if self._skip:
            keep = all(self._agreement.exchange(all(block.is_finite() for block in self._blocks)))
            for block in self._blocks:
                block.commit(keep)
            if not keep:
                added = self.n_samples - counts[0]
                self._set_counts(counts)
                self._nonfinite("a squared gradient of some rank is NaN or infinite", added)

    def _run(self, run: Run, batch: Batch | None, own: Batch, rehearses: bool, forward: Callable[[], None]) -> None:
        """Run one batch once."""
        self._lockstep.start_batch(rehearses, rehearses or self._verify == "always", forward)
        if batch is not None:
            run.run(batch)
        else:
            run.before.take()
            outputs = own.forward(run.model)
            targets, _ = next(run.terms(own, outputs))
            losses = run.loss_fn(outputs, targets)
            self._spare_leaves(losses)
            self.room(0, run.max_samples)
            self._lockstep.losses = losses
        self._lockstep.end_batch()
        self._started.pass_over(retain_graph=False)

    def accumulate(self, losses: Tensor, *args: Any, replay: Callable[[], Tensor] | None = None, **options: Any) -> None:
        """Accumulate one batch; see the base class."""
        self._lockstep.losses = losses

        def run_again() -> Tensor:
            assert replay is not None
            self._lockstep.before_forward()
            self._lockstep.losses = replay()
            return self._lockstep.losses

        super().accumulate(losses, *args, replay=None if replay is None else run_again, **options)

    def room(self, n_losses: int, max_samples: int | None) -> int:
        """Return how many of this rank's losses count: those of lower ranks come first."""
        if max_samples is None:
            return n_losses
        said = self._agreement.exchange((n_losses, self.n_samples))
        before = sum(n for _, n in said) + sum(n for n, _ in said[: self._agreement.rank])
        return min(n_losses, max(0, max_samples - before))

    def _keep_batch(self, n_samples: int) -> bool:
        """Keep a batch: whether it has NaN shows once all ranks' squares are added up."""
        return True

    def _nonfinite_name(self) -> str:
        """Name a parameter whose F has NaN or inf here; "" where none has."""
        for block in self._blocks:
            if not self._skip and not block.is_finite():
                bad = (p for p, f in zip(block.parameters, block.shards[0], strict=True) if not bool(f.isfinite().all()))
                return next(bad).name
        return ""

    def _counts(self) -> tuple[int, float, int]:
        return self.n_samples, self._total_weight, self.n_skipped

    def _set_counts(self, counts: tuple[int, float, int]) -> None:
        self.n_samples, self._total_weight, self.n_skipped = counts

    # ---- the result ------------------------------------------------------------------------------------------------

    def _total(self, agreement: Agreement) -> None:
        """Count the samples of all ranks, and take over which rules served what on others."""
        rules = self._accumulators.rules
        said = agreement.exchange((*self._counts(), self._started.n_batches, [sorted(names) for names in rules]))
        self.n_samples, self._total_weight, self.n_skipped = (sum(one[i] for one in said) for i in range(3))
        self._any_batches = any(n for *_, n, _ in said)
        for *_, others in said:
            for names, more in zip(rules, others, strict=True):
                names.update(more)

    def _has_batches(self) -> bool:
        """Tell whether some rank's losses had a graph."""
        return self._any_batches

    def _divided(self, final: bool) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return F and the mean gradient as shards."""
        names = list(self._of)
        kinds: list[dict[str, Tensor]] = [{} for _ in self._blocks[0].shards]
        for block in self._blocks:
            for found, parts in zip(kinds, block.shards, strict=True):
                for index, p, part in zip(block.indices, block.parameters, parts, strict=True):
                    found[names[index]] = _like(part / self._total_weight, p.shard)
        fisher, *gradient = ({name: found[name] for name in names} for found in kinds)
        return fisher, gradient[0] if gradient else None

    def _owned(self) -> Mapping[str, Tensor]:
        """Return the shards."""
        return {name: p.shard for name, p in self._of.items()}

    def _result(self, final: bool) -> Fisher:
        """Return the Fisher of all ranks."""
        fisher = super()._result(final)
        fisher.reduced = True
        return fisher


def _like(part: Tensor, shard: Tensor) -> Tensor:
    """Return a local part as what a parameter is: a DTensor of its mesh and placements, or a plain tensor."""
    if not isinstance(shard, DTensor):
        return part
    options: Any = {"run_check": False, "shape": shard.shape, "stride": shard.stride()}
    return DTensor.from_local(part, shard.device_mesh, shard.placements, **options)


def _for_company(run: Run, batch: Batch) -> None:
    """Run the model on a batch for the sake of other ranks: nothing of it stays."""
    state = random_state(run.device)
    rewound = Rewound(run.before)
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), rewound:
        rewound.rewind()
        batch.forward(run.model)
    set_random_state(run.device, state)


def _group_of(every: Iterable[Parameter]) -> Any:
    """Return the process group of all ranks that run the model; None for all there are.

    Raises:
        WplfastError: if they are some of the ranks alone, on a mesh of several dimensions.
    """
    mesh = next(p.shard.device_mesh for p in every if isinstance(p.shard, DTensor))
    if mesh.size() == dist.get_world_size():
        return None
    if mesh.ndim > 1:
        raise WplfastError(
            f"a Fisher pass on a mesh of {mesh.ndim} dimensions needs all {dist.get_world_size()} ranks in it, got "
            f"{mesh.size()}: use a process group, or a mesh, of these ranks alone"
        )
    return mesh.get_group()


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
