"""One Fisher pass over a model: the backward half, which infers who owns what and collects squared gradients.

Each batch runs, on one graph,

1. *probing* backward passes, only while some call has not been measured (the first batch) or is routed anew in every
   batch: the losses times powers of two (:mod:`wplfast.capture.probe`). In a verified batch the first one also computes
   the parameters' ordinary gradients;
   Where gradients do not scale with the losses (a hook that clips them, float16), more such passes come in pairs;
2. one *collecting* backward pass with weights 1 (:class:`.passes.CollectPass`). The gradients that taps see become grad
   samples; once all uses of a parameter are in, they are summed per sample, squared and accumulated;
3. *one backward pass per sample*, for those parameters alone that are used where nothing can be seen (a custom
   ``autograd.Function``, TorchScript), or whose use was found to need another forward pass that cannot be had.

A batch of calls that were collected before, on tensors of the same sizes, is *steady* (:mod:`.steady`): one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...errors import CoupledSamplesError, VerificationError, WplfastError
from ..accumulators import Accumulators
from ..call_site import Listener, TappedCall
from ..probe.graph import Fingerprint, fingerprint, leaves, reorders_rows
from ..probe.infer import Check, LayoutInference
from ..rules.projection import Directions
from ..trace.intercept import Interception
from ..trace.nested import current_task
from ..watched import Derived
from .batch import Batch, Independence, SingleSample
from .identity import verify_batch, watching
from .leaf_grads import LeafGrads
from .lessons import Lessons
from .linearity import Linearity
from .one_by_one import one_by_one
from .ordinary import OrdinaryGrads
from .passes import CollectPass, Idle, ProbePass
from .round import Round
from .steady import Layouts, SteadyBatch

#: How many batches lie before those in which known layouts are measured again.
_CHECKED = frozenset(8**k for k in range(12))

#: Outputs of calls, each under one structure of graphs, that measurements are kept of; beyond, all are forgotten.
_MAX_KNOWN = 1 << 18

#: Rounds of probing and collecting that one batch may take before something is wrong.
MAX_ROUNDS = 4


class Session:
    """The state of one pass: what was learnt about the model, and the accumulators it fills.

    Args:
        names: of the watched parameters.
        parameters: these.
        constants: the model's other parameters and its buffers.
        accumulators: one for each watched parameter.
        directions: what gradients are projected on when a batch is verified.
        by_losses: a sample is what a loss belongs to, wherever it lies: sizes tell nothing about whose data are whose,
            and rows may be others' in every batch, though no graph shows it.
    """

    def __init__(
        self,
        names: list[str],
        parameters: list[Tensor],
        constants: list[Tensor],
        accumulators: Accumulators,
        directions: Directions,
        by_losses: bool = False,
    ) -> None:
        self.names, self.parameters, self.accumulators, self.directions = names, parameters, accumulators, directions
        self.interception = Interception(parameters, constants, Idle())
        self.n_batches = 0
        self.frozen: list[Tensor] = []  # parameters that require no grad during the pass, and only then
        self.leaf_grads = LeafGrads(parameters, self.interception)
        self._inference = LayoutInference()
        self._structures: dict[tuple[object, ...], int] = {}  # of graphs, numbered
        self._n_structures = self._n_known = 0
        self._unseen: set[int] = set()  # parameters with uses that no tap sees
        self._in_backward: set[int] = set()  # parameters that are used in calls made by backward passes
        self._dtypes: set[torch.dtype] = set()  # of the gradients in verified batches
        self._is_verified = False
        self._reorders = by_losses  # rows may lie in another order in every batch
        self._linearity = Linearity(self.run, self.leaf_grads)
        self.lessons = Lessons(names, parameters, self.interception, self._inference, self._linearity, by_losses)

    # ---- one batch -------------------------------------------------------------------------------------------------

    def collect(
        self,
        losses: Tensor,
        weights: Tensor | None = None,
        *,
        verify: bool | Literal["always"] = False,
        retain_graph: bool = False,
        replay: Callable[[], Tensor] | None = None,
        independent: bool | Independence | None = None,
        single_sample: SingleSample | None = None,
    ) -> None:
        """Collect one batch.

        Args:
            losses: one loss per sample [N], with a graph.
            weights: optional float64 weights [N] outside the square, on the losses' device.
            verify: compare captured with ordinary gradients, in the first batch or always.
            retain_graph: keep the graph for another call on the same forward pass.
            replay: runs the same forward pass again, on the same random numbers, and returns its losses. Some calls can
                only be captured once it is known what they are; without it their parameters take one backward pass for
                each sample.
            independent: whether the caller found a sample's loss to be the same in a batch of its own (None: unknown),
                or a function that finds out, called where calls mix samples.
            single_sample: gradients of that sample, to compare with.

        Raises:
            CoupledSamplesError: if a sample's loss depends on other samples.
            VerificationError: if captured and ordinary gradients disagree.
        """
        if self.n_batches:
            self.thaw(may_replay=False)
        else:
            self.check_leaves()
        if self.interception.branch is not None:
            self.interception.let_go()
        self.accumulators.weights = weights
        # A batch of one sample verifies little: the first does, and then the first one of several samples.
        due = verify and not self._is_verified and (not self.n_batches or len(losses) > 1)
        batch = Batch(losses, verify == "always" or bool(due), retain_graph, independent, single_sample)
        check = self._check(verify)
        fruitless, learnt = 0, self.interception.n_parameter_only
        self._look_at(batch)
        while not (self._collect_steady(batch, check) or self._collect(batch, check, may_replay=replay is not None)):
            # Chains of functions of constants are followed one step at a time.
            fruitless = fruitless + 1 if self.interception.n_parameter_only == learnt else 0
            learnt = self.interception.n_parameter_only
            if replay is None or fruitless == MAX_ROUNDS:
                raise WplfastError("could not measure which samples the uses of the parameters belong to")
            batch = Batch(replay(), batch.verify, retain_graph, independent, batch.single_sample)
            self._look_at(batch)
        self.interception.relay.is_over = not retain_graph
        if retain_graph:
            self.interception.go_on()
        self.n_batches += 1

    def _look_at(self, batch: Batch) -> None:
        """Take the graph's fingerprint; see to it that the calls in it are those of the forward pass.

        They are not where another forward pass began before these losses were given.
        """
        found: list[TappedCall] = []
        batch.graph = fingerprint(batch.losses, found)
        taps, relay = self.interception.taps, self.interception.relay
        n_taps = len(taps)
        if all(t.index < 0 or (t.index < n_taps and taps[t.index] is t) for t in found if t.relay is relay):
            return
        ours = [leaf for leaf in leaves(batch.losses) if isinstance(leaf, Derived) and leaf._pass is self.interception]
        self.interception.adopt((t for t in reversed(found) if t.relay is relay), ours)
        batch.graph = fingerprint(batch.losses)

    def _check(self, verify: bool | Literal["always"]) -> Check:
        """Decide how far to trust what earlier batches told about layouts."""
        if verify == "always":
            return Check.REMEASURE
        return Check.VERIFY if verify and self.n_batches in _CHECKED else Check.TRUST

    def _collect_steady(self, batch: Batch, check: Check) -> bool:
        """Collect a batch of known calls; False if it is none, or is to be measured again all the same."""
        self._reorders = self._reorders or self.interception.reorders
        if batch.verify or check is not Check.TRUST or self._reorders or self._unseen or self.interception.is_patchwork:
            return False
        if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
            return False  # modes and the profiler are to see operators
        assert batch.graph is not None
        steady = self.interception.cache.here.steady.get((len(batch.losses), batch.graph))
        if steady is None:
            return False
        keep = batch.retain_graph or steady.may_wake
        self.run(batch.losses, None, steady.start(self.interception.taps), keep)
        if not steady.finish(self.parameters, self.interception.derived) or self.leaf_grads.caught:
            self._find_unseen(set())
        woken = steady.woken()
        if woken:
            del self.interception.cache.here.steady[len(batch.losses), batch.graph]
            self._collect(batch, Check.TRUST, may_replay=False, wanted=woken)
        return True

    def _collect(self, batch: Batch, check: Check, may_replay: bool, wanted: set[int] | None = None) -> bool:
        """Collect a batch that needs measuring; False if nothing was accumulated and it must be run again.

        Args:
            batch: the batch.
            check: how far to trust what earlier batches told.
            may_replay: the batch can be run again.
            wanted: parameters to collect; None: all.
        """
        whole = wanted is None
        inference, taps, first = self._inference, self.interception.taps, not self.n_batches
        self._reorders = self._reorders or reorders_rows(batch.losses)
        if self._reorders and not first:
            check = Check.REMEASURE
        assert batch.graph is not None
        graph = batch.graph
        structure = self._number(graph.structure)
        trust = Check.TRUST if first else check
        inference.start_batch(len(batch.losses), structure, trust, self._reorders, batch.verify)
        passes = max(inference.passes_needed(taps), int(batch.verify and len(batch.losses) > 1))
        batch.keep = (
            batch.retain_graph
            or passes > 0
            or first
            or inference.has_dormant
            or bool(self._in_backward or self._unseen)
        )
        with_ordinary = batch.verify
        for attempt in range(MAX_ROUNDS):
            self._probe(batch, passes, with_ordinary, wanted)
            with_ordinary = False
            if passes and not (first or attempt) and may_replay and inference.is_new(taps):
                dry = self._collect_round(batch, wanted, dry=True)  # learn of replays before anything is accumulated
                if self._must_pair(dry, batch):
                    self._probe(batch, inference.probe_in_pairs(), batch.verify, wanted)
                elif dry.mixed and not self._learn_from(dry, batch, may_replay, dry=True):
                    return False
            collected = self._collect_round(batch, wanted, dry=False)
            if self._must_pair(collected, batch):
                inference.probe_in_pairs()
                with_ordinary = batch.verify
            elif collected.mixed:
                if not self._learn_from(collected, batch, may_replay, dry=False):
                    return False
                batch.one_by_one |= {index for tapped in collected.mixed for index in tapped.parameters}
            wanted = collected.retry - batch.one_by_one - self._unseen
            if not wanted:
                break
            if not batch.keep:
                raise WplfastError(
                    f"the use of {self._some(wanted)} is another one than in earlier batches, inside a checkpoint "
                    "or in a forward pass whose losses came separately; give the losses of all forward passes together"
                )
            inference.start_probing()
            passes = inference.probe_weights.rounds
        else:
            raise WplfastError(f"could not measure which samples the uses of {self._some(wanted or set())} belong to")
        astray = one_by_one(batch, self._unseen, self.run, self.leaf_grads, self.accumulators, self.directions)
        if astray:
            raise CoupledSamplesError(
                f"the gradients of {self._some(astray)} for one sample after the other do not add up to that of the "
                "batch: something mixes samples, or adds to what has no gradient" + self._linearity.names(batch)
            )
        if first and self.thaw(may_replay):
            batch.single_sample = None  # had none either
            return False
        if batch.verify:
            seen = {d.dtype for d in self.interception.derived if d.is_floating_point()} | self._dtypes
            seen |= self.interception.native_dtypes
            weights, accumulators = inference.probe_weights.verifying, self.accumulators
            try:
                finite = verify_batch(batch, weights, self.names, self.parameters, seen, self._unseen, accumulators)
            except VerificationError:
                if not first or inference.in_pairs or not self._linearity.is_bent_in(batch):
                    raise
                self._clear()
                inference.in_pairs = True
                batch.captured, batch.of_single_sample, batch.ordinary, batch.mixed = {}, {}, {}, set()
                return self._collect(batch, check, may_replay)
            self._is_verified = self._is_verified or (finite and len(batch.losses) > 1)
            self.directions.forget()
        if whole and not (attempt or batch.one_by_one):
            self._remember((len(batch.losses), graph), collected.layouts)
        return True

    def _number(self, structure: tuple[object, ...]) -> int:
        """Return the number of a graph's structure."""
        number = self._structures.get(structure)
        if number is None:
            self._n_known += len(self.interception.taps)
            if self._n_known > _MAX_KNOWN and self._structures:
                self._structures.clear()
                self._n_known = 0
                self.interception.cache.forget()
            number = self._structures[structure] = self._n_structures
            self._n_structures += 1
        return number

    def _remember(self, key: tuple[int, Fingerprint], layouts: dict[int, Layouts]) -> None:
        """Remember what batches like this one do, if all of it holds for every such batch."""
        if self._unseen or self._in_backward or self._reorders or self.interception.is_patchwork:
            return
        taps, asleep = self.interception.taps, self._inference.asleep
        reached = [tapped for tapped in taps if tapped.index in layouts]
        known = key[0] == 1 or not self._inference.is_new(t for t in reached if t.index not in asleep)
        if known and SteadyBatch.is_possible(taps, layouts, asleep):
            batch = SteadyBatch(taps, layouts, asleep, self.accumulators, self.names)
            self.interception.cache.keep_steady(key, batch)

    def pass_over(self, retain_graph: bool) -> None:
        """Let go of a forward pass without gradients, unless further losses of it follow."""
        self.interception.relay.is_over = not retain_graph

    def check_leaves(self) -> None:
        """Look for gradients that are not of this pass, which would be lost when it ends.

        Raises:
            WplfastError: if there are some.
        """
        found = self.leaf_grads.past_the_taps()
        if found:
            raise WplfastError(
                f"a gradient arrived at {self._some(found)} that this pass did not compute: do not call .backward() "
                "during a pass, in any thread, and let backward passes end before it starts"
            )

    def abandon(self) -> None:
        """Forget a batch that will not be accumulated."""
        self.leaf_grads.drop()
        self.release()

    def release(self) -> None:
        """Let go of the last graph."""
        self.interception.start_batch()

    # ---- passes ----------------------------------------------------------------------------------------------------

    def run(self, losses: Tensor, weights: Tensor | None, listener: Listener, keep: bool) -> None:
        """Run one backward pass over the losses, with weights or with ones; ``keep`` the graph."""
        self.accumulators.n_passes += 1
        # Not losses.backward(weights): PyTorch imports sympy for that, which takes longer than most first batches.
        total = losses.sum() if weights is None else (losses * weights.to(losses)).sum()
        relay = self.interception.relay
        relay.listener, relay.site = listener, None

        def begin(_: Tensor) -> None:
            relay.task = current_task()

        total.register_hook(begin)
        try:
            total.backward(retain_graph=keep)
        finally:
            relay.listener, relay.task = relay.idle, -1

    def _probe(self, batch: Batch, passes: int, with_ordinary: bool, wanted: set[int] | None) -> None:
        """Run probing passes; ``with_ordinary``, keep the ordinary gradients of wanted parameters to verify with."""
        inference = self._inference
        apart = inference.in_pairs or len(batch.losses) == 1
        if with_ordinary and apart:
            self._probe_once(batch, None, wanted)
            inference.start_probing()
        for digit in range(passes):
            verifies = with_ordinary and not (digit or apart)
            self._probe_once(batch, inference.probe_weights.weights(digit), wanted if verifies else set())
            if inference.has_half and not inference.in_pairs:
                self._probe(batch, inference.probe_in_pairs(), with_ordinary, wanted)
                return

    def _probe_once(self, batch: Batch, weights: Tensor | None, ordinary: set[int] | None) -> None:
        """Run one probing pass; keep projections of the ordinary gradients of some parameters (None: all)."""
        grads: OrdinaryGrads | None = None
        if ordinary != set():
            kept = ordinary if batch.ordinary else None
            for index in list(batch.ordinary) if kept is None else kept:
                batch.ordinary.pop(index, None)
            grads = OrdinaryGrads(self.interception.taps, self.directions, batch.ordinary, kept)
        self.run(batch.losses, weights, ProbePass(self._inference, self._in_backward, grads), keep=True)
        if grads is None:
            return
        grads.finish()
        for index, gradient in enumerate(self.leaf_grads.take()):
            if gradient is not None:
                grads.add(index, gradient)
        self._dtypes |= grads.dtypes

    def _collect_round(self, batch: Batch, wanted: set[int] | None, dry: bool) -> CollectPass:
        """Run the collecting pass and accumulate all that can be; a dry one only measures."""
        round_ = None
        if not dry:
            weights = self._inference.probe_weights.verifying
            watch = watching(batch, weights, self.directions) if batch.verify else None
            round_ = Round(self.interception.taps, self.accumulators, self.names, wanted, watch)
            round_.excluded |= self._unseen
            round_.last |= self._in_backward
        listener = CollectPass(self._inference, round_, self.names, self._in_backward, wanted)
        self.run(batch.losses, None, listener, batch.keep)
        if wanted is None and not dry:
            self._inference.leave_out(tapped for tapped in self.interception.taps if tapped not in listener.reported)
        if round_ is not None:
            round_.finish()
            batch.one_by_one |= self._find_unseen(round_.squared)
        return listener

    # ---- what cannot be collected ----------------------------------------------------------------------------------

    def _must_pair(self, collected: CollectPass, batch: Batch) -> bool:
        """Tell whether samples are to be told in another way, since gradients do not scale with the losses."""
        failed = collected.mixed or collected.moved or collected.foreign
        explained = bool(failed) and not self._inference.in_pairs and self._linearity.explains(collected, batch)
        if collected.moved and not explained:
            raise VerificationError(
                f"the rows of {collected.moved[0].call.name} belong to other samples than in earlier batches (does the "
                "model order them by the data?); pass verify='always' to measure every batch"
            )
        return explained

    def _clear(self) -> None:
        """Forget all that was accumulated."""
        for index in range(len(self.parameters)):
            self.accumulators.clear(index)

    def _learn_from(self, collected: CollectPass, batch: Batch, may_replay: bool, dry: bool) -> bool:
        """Learn from calls that mix samples; tell whether the batch can go on without another forward pass."""
        first = self.n_batches == 0
        replays_now = may_replay and (dry or first)
        if self.lessons.learn(collected.mixed, batch, may_replay, replays_now, self._reorders):
            return True
        if first:
            self._clear()
        self.interception.start_batch()
        return False

    def thaw(self, may_replay: bool) -> bool:
        """Let the parameters that are frozen for the pass require grad, if others lost their gradients by that.

        A Function (a checkpoint) has no backward pass if none of its inputs requires grad, as where all before it is
        frozen.

        Args:
            may_replay: the batch can be run again.

        Returns:
            Whether the batch is to be run again.

        Raises:
            WplfastError: if it cannot be.
        """
        lost, self.interception.hidden = self.interception.hidden, set()
        if not lost or not self.frozen:
            return False
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen, self.interception.has_frozen = [], False
        if not may_replay:
            raise WplfastError(
                f"{self._some(lost)} got no gradient in a Function (a checkpoint) that uses it and none of whose "
                "inputs requires one: parameters outside of params are frozen for the pass. Let params hold some that "
                "come before it, and select then"
            )
        self._clear()
        self.interception.start_batch()
        return True

    def _find_unseen(self, squared: set[int]) -> set[int]:
        """Return the parameters that gradients arrived at past the taps, and remember them."""
        found = self.leaf_grads.past_the_taps()
        self.leaf_grads.drop()
        fresh = found - self._unseen
        if fresh and self.n_batches:
            raise WplfastError(
                f"a gradient arrived at {self._some(fresh)} through an operation that cannot be seen (a custom "
                "autograd.Function, TorchScript), or from another thread, though not in the first batch"
            )
        for index in fresh & squared:
            self.accumulators.clear(index)
        self._unseen |= fresh
        return fresh

    def _some(self, indices: set[int]) -> str:
        """Name a few parameters."""
        names = [repr(self.names[index]) for index in sorted(indices)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
