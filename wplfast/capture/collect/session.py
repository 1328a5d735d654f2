"""One Fisher pass over a model: the backward half, which measures who owns what and collects squared gradients.

Each batch runs, on one graph,

1. *probing* backward passes, only while some use has not been measured (the first batch) or is routed anew in every
   batch: the losses weighted with power-of-two codes (:mod:`.probe`). In a verified batch the first one also
   computes the parameters' ordinary gradients;
2. one *collecting* backward pass with weights 1. Every tap's gradients become uses (:mod:`.rules`); once all uses of a
   parameter are in, they are summed per sample, squared and accumulated (:mod:`.squares`) and their memory is freed;
3. *one backward pass per sample*, for parameters alone whose use cannot be seen (a custom ``autograd.Function``,
   TorchScript) or was found to need another forward pass.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ... import ops
from ...errors import CoupledSamplesError, NonFiniteError, WplfastError
from ..probe.graph import reorders_rows
from ..probe.infer import Check, Measurement, at_least_1d
from ..rules import GENERIC
from ..rules.grad_sample import GradSample
from ..trace.intercept import Interception
from ..trace.tap import CallSite
from .batch import BatchState, OutputGrads, SingleSample
from .coupling import UNKNOWN, describe, is_about_positions
from .identity import check_identity, check_single_sample
from .leaf_grads import LeafGrads
from .squares import accumulate, gradient_of, weighted_sum

_Mode: TypeAlias = Literal["idle", "probe", "ordinary", "collect"]

#: How many batches lie before those in which known owners are measured again.
_CHECKED = frozenset(8**k for k in range(12))

#: Rounds of probing and collecting that one batch may take before something is wrong.
MAX_ROUNDS = 4


def _no_batch() -> BatchState:
    """Return what stands between batches: the last one's losses would keep its graph alive."""
    return BatchState(torch.empty(0, device="cpu"), None, None, None, False, False)


class Session:
    """The state of one pass: what was learnt about the model, and the accumulators it fills."""

    def __init__(
        self,
        names: list[str],
        parameters: list[Tensor],
        constants: list[Tensor],
        fisher: list[Tensor],
        gradient: list[Tensor] | None,
    ) -> None:
        """Collect into ``fisher`` (and ``gradient``), one contiguous accumulator per parameter."""
        self.names, self.parameters, self.fisher, self.gradient = names, parameters, fisher, gradient
        self.interception = Interception(parameters, constants, self)
        self.leaf_grads = LeafGrads(parameters, self.interception)
        self.rules: dict[int, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.unseen: set[int] = set()
        self.batches = 0
        self._measurement = Measurement()
        self._late: set[int] = set()  # parameters used inside reentrant checkpoints
        self._dtypes: set[torch.dtype] = set()  # of the gradients in verified batches
        self._verified = False
        self._reorders = False  # rows may lie in another order in every batch
        self._mode: _Mode = "idle"
        self._batch = _no_batch()

    @property
    def is_learning(self) -> bool:
        """Tell whether no batch of several samples was measured yet."""
        return self._measurement.is_empty

    # ---- one batch -------------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor,
        weights: Tensor | None = None,
        *,
        verify: bool | Literal["always"] = False,
        retain_graph: bool = False,
        may_replay: bool = False,
        independent: bool | None = None,
        single_sample: SingleSample | None = None,
    ) -> bool:
        """Collect one batch.

        Args:
            losses: one loss per sample [N], with a graph.
            weights: optional float64 weights [N] outside the square, on the losses' device.
            verify: compare captured with ordinary gradients, in the first batch or always.
            retain_graph: keep the graph for another call on the same forward pass.
            may_replay: the caller can run the same forward pass again.
            independent: whether the caller found a sample's loss to be the same in a batch of its own; None: unknown.
            single_sample: gradients of that sample, to compare with.

        Returns:
            False if nothing was accumulated and the forward pass must be run again.

        Raises:
            CoupledSamplesError: if a sample's loss depends on other samples.
            VerificationError: if captured and ordinary gradients disagree.
        """
        measurement, sites = self._measurement, self.interception.sites
        first = not self.batches
        # A batch of one sample verifies little: the first does, and then the first one of several samples.
        checked = verify == "always" or bool(verify and not self._verified and (first or len(losses) > 1))
        unusual = measurement.is_unusual(sites, len(losses))
        check = self._start_check(losses, verify, unusual)
        measurement.start_batch(len(losses), check, self._reorders, unusual)
        passes = max(measurement.passes_needed(sites), int(checked))
        keep = retain_graph or passes > 0 or first or measurement.has_dormant or bool(self._late or self.unseen)
        batch = self._batch = BatchState(
            losses, weights, independent, single_sample if checked else None, checked, keep
        )
        for attempt in range(MAX_ROUNDS):
            for digit in range(passes):
                self._probe(digit, with_ordinary=checked and attempt == digit == 0)
            if passes and not (first or attempt) and may_replay and measurement.is_new(sites):
                self._collect(dry=True)  # find out about replays before anything is accumulated
                if batch.mixed and not self._escalate(may_replay):
                    return False
            self._collect(dry=False)
            batch.blocked |= self._find_unseen()
            if batch.mixed:
                if not self._escalate(may_replay):
                    return False
                batch.blocked |= {index for site in batch.mixed for index in site.parameters}
            batch.retry -= batch.blocked | self.unseen
            if not batch.retry:
                break
            if not batch.keep:
                raise WplfastError(
                    f"the use of {self._some(batch.retry)} is another one than in earlier batches, inside a checkpoint "
                    "or in a forward pass whose losses came separately; give the losses of all forward passes together"
                )
            batch.only = set(batch.retry)
            measurement.start_probing()
            passes = measurement.probe_weights.rounds
        else:
            raise WplfastError(f"could not measure which samples the uses of {self._some(batch.retry)} belong to")
        self._one_by_one(batch.blocked | self.unseen)
        if checked:
            self._verify(batch)
            self._verified = self._verified or len(losses) > 1
        if not retain_graph:
            self.interception.start_batch()
        self._batch = _no_batch()
        self.batches += 1
        return True

    def _start_check(self, losses: Tensor, verify: bool | Literal["always"], unusual: bool) -> Check:
        """Decide how far to trust what earlier batches told about the owners of rows."""
        self._reorders = self._reorders or self.interception.reorders
        if not self.batches:
            self._reorders = self._reorders or reorders_rows(losses)
            return "no"
        now = bool(verify) and self.batches in _CHECKED
        if now or unusual:
            self._reorders = self._reorders or reorders_rows(losses)
        if verify == "always" or self._reorders:
            return "again"
        return "raise" if now else "no"

    def abandon(self) -> None:
        """Forget a batch that will not be accumulated."""
        self.leaf_grads.drop()
        self.release()

    def release(self) -> None:
        """Let go of the last graph: its taps refer to the session, a cycle that Python's collector cannot see."""
        self.interception.start_batch()
        self._batch = _no_batch()

    def _run(self, weights: Tensor, mode: _Mode, keep: bool) -> None:
        """Run one backward pass."""
        losses = self._batch.losses
        self._mode, self.interception.in_backward = mode, True
        self.interception.start_backward()
        try:
            # Not losses.backward(weights): PyTorch imports sympy for that, which takes longer than most first batches.
            (losses * weights.to(losses)).sum().backward(retain_graph=keep)
        finally:
            self._mode, self.interception.in_backward = "idle", False

    @torch.no_grad()
    def _verify(self, batch: BatchState) -> None:
        """Compare captured rows with plain autograd, unless something overflowed, which the accumulator reports."""
        if not all(bool(torch.isfinite(f.sum())) for f in self.fisher):
            return
        skipped = batch.blocked | self.unseen
        seen = {d.dtype for d in self.interception.derived if d.is_floating_point()} | self._dtypes
        dtypes = [max(seen | {p.dtype}, key=lambda dtype: torch.finfo(dtype).eps) for p in self.parameters]
        probe_weights = self._measurement.probe_weights.weights(0)
        check_identity(self.names, batch.probed, batch.ordinary, self.fisher, probe_weights, dtypes, skipped)
        if batch.single_sample is not None:
            check_single_sample(self.names, batch.of_single_sample, batch.single_sample.gradients, dtypes)

    # ---- what the taps report --------------------------------------------------------------------------------------

    def event(
        self, site: CallSite, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """Take the gradients of a site's outputs."""
        nothing: list[Tensor | None] = [None] * len(site.call.operands)
        if site.in_backward and self._mode != "idle":
            self._late |= site.parameters
        if self._mode == "idle":
            if torch.is_grad_enabled():
                raise WplfastError(
                    "a second derivative through watched parameters (create_graph=True inside the model or the loss) "
                    "is not supported: per-sample gradients cannot be captured there"
                )
            return nothing
        if self._batch.verify:
            self._dtypes |= {g.dtype for g in grads if g is not None}
        if self._mode == "collect":
            self._collect_site(site, inputs, grads)
            return nothing
        if self._mode == "probe":
            self._measurement.probe(site, grads)
            if not self._batch.with_ordinary:
                return nothing
        elif self._batch.only is not None and not self._batch.only & site.parameters:
            return nothing
        return site.rule.ordinary(site.call, inputs, grads)

    # ---- probing ---------------------------------------------------------------------------------------------------

    def _probe(self, digit: int, with_ordinary: bool) -> None:
        """Run one probing pass; with ``with_ordinary``, keep the parameters' ordinary gradients to verify with."""
        self._batch.with_ordinary = with_ordinary
        self._run(self._measurement.probe_weights.weights(digit), "probe", keep=True)
        if with_ordinary:
            self._batch.ordinary = self.leaf_grads.take()

    # ---- collecting ------------------------------------------------------------------------------------------------

    def _collect(self, dry: bool) -> None:
        """Run the collecting pass and accumulate all that can be; a dry one only measures."""
        batch = self._batch
        batch.start_round(self.interception.sites, dry)
        self._run(torch.ones_like(batch.losses, requires_grad=False), "collect", batch.keep)
        for index in {*batch.uses, *batch.grouped}:
            self._flush(index)

    def _collect_site(self, site: CallSite, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Turn one site's gradients into uses, and flush the parameters whose last use this was."""
        batch, parameters = self._batch, site.parameters
        if batch.only is None or parameters & batch.only:
            layouts = self._measurement.layouts(site, grads)
            if isinstance(layouts, str):
                if layouts == "nonfinite":
                    raise NonFiniteError(f"a gradient of {self.names[min(parameters)]!r} is NaN or infinite")
                batch.retry |= parameters
                if layouts == "mixed":
                    batch.mixed.append(site)
            elif not batch.dry:
                moment = OutputGrads(site, inputs, grads, layouts)
                if site.key.keys.used > 1 and site.rule.stackable(site.call):
                    batch.defer(moment)
                else:
                    self._use(moment)
        if not site.in_backward and not site.fired:
            site.fired = True
            pending = batch.pending
            for index in parameters:
                pending[index] -= 1
                if not pending[index] and index not in self._late:
                    self._flush(index)

    def _use(self, moment: OutputGrads) -> None:
        """Turn a site's gradients into uses."""
        site, layouts = moment.site, moment.layouts
        grads = [None if g is None or o is None else at_least_1d(g) for g, o in zip(moment.grads, layouts, strict=True)]
        if all(gradient is None for gradient in grads):
            return
        started = time.perf_counter()
        uses = site.rule.grad_samples(site.call, moment.inputs, grads, layouts)
        if uses is None:
            uses = GENERIC.grad_samples(site.call, moment.inputs, grads, layouts)
        for use in uses:
            for index in use.operand.parameters:
                self._take(index, use, site)
        self.seconds[uses[0].rule if uses else site.rule.name] += time.perf_counter() - started

    def _take(self, index: int, use: GradSample, site: CallSite) -> None:
        """Keep a use until all uses of its parameter are in."""
        batch = self._batch
        if batch.only is not None and index not in batch.only:
            return
        if index in batch.flushed:
            raise WplfastError(
                f"{self.names[index]!r} was used again ({site.call.name}) after its gradient was squared: inside a "
                "checkpoint its uses must be the same ones in every batch, and results computed from parameters alone "
                "must not be kept from one batch to the next"
            )
        batch.uses[index].append(use)

    @torch.no_grad()  # reentrant checkpoints flush at the end of the pass, where grad mode is on
    def _flush(self, index: int) -> None:
        """Square and accumulate what is known of one parameter."""
        batch = self._batch
        for moment in batch.deferred(index):
            self._use(moment)
        uses = batch.uses.pop(index, [])
        if index in batch.retry or index in self.unseen or not uses:
            return
        started = time.perf_counter()
        batch.flushed.add(index)
        fisher, gradient = self.fisher[index], None if self.gradient is None else self.gradient[index]
        if batch.verify:
            batch.probed[index] = weighted_sum(
                index, uses, self._measurement.probe_weights.weights(0).to(fisher.device), fisher
            )
        if batch.single_sample is not None:
            batch.of_single_sample[index] = gradient_of(index, uses, batch.single_sample.sample, fisher)
        accumulate(index, uses, fisher, gradient, batch.weights)
        self.rules[index] |= {use.rule for use in uses}
        slow = any(use.rule == GENERIC.name for use in uses)
        self.seconds[GENERIC.name if slow else uses[0].rule] += time.perf_counter() - started

    # ---- what cannot be collected ----------------------------------------------------------------------------------

    def _escalate(self, may_replay: bool) -> bool:
        """Learn from sites that mix samples; tell whether the batch can go on without another forward pass.

        A site without differentiable data may simply have no sample axis (a position embedding): from now on its
        result counts as derived from parameters. With such data the samples are coupled, unless the data themselves
        came from such a site.
        """
        batch = self._batch
        bare = [site for site in batch.mixed if not site.call.differentiable_inputs]
        coupled = [site for site in batch.mixed if site.call.differentiable_inputs]
        known = batch.independent
        if known is None:
            known = all(is_about_positions(site, len(batch.losses)) for site in bare)
        if not bare or not known:
            hint = "" if coupled or batch.independent is not None else UNKNOWN
            raise CoupledSamplesError(describe((coupled or bare)[0], self.names) + hint)
        self.interception.parameter_only |= {site.key for site in bare}
        if may_replay and (batch.dry or self.batches == 0):
            if self.batches == 0:
                for accumulator in (*self.fisher, *(self.gradient or ())):
                    accumulator.zero_()
            self.interception.start_batch()
            return False
        if coupled and not batch.independent:
            raise CoupledSamplesError(describe(coupled[0], self.names) + UNKNOWN)
        return True

    def _find_unseen(self) -> set[int]:
        """Return the parameters that gradients arrived at past the taps, and remember them."""
        found = self.leaf_grads.past_the_taps()
        self.leaf_grads.drop()
        fresh = found - self.unseen
        if fresh and self.batches:
            raise WplfastError(
                f"a gradient arrived at {self._some(fresh)} through an operation that cannot be seen (a custom "
                "autograd.Function, TorchScript), though not in the first batch"
            )
        for index in fresh & self._batch.flushed:
            self.fisher[index].zero_()
            if self.gradient is not None:
                self.gradient[index].zero_()
        self.unseen |= fresh
        return fresh

    def _one_by_one(self, wanted: set[int]) -> None:
        """Collect some parameters exactly, with one backward pass for each sample."""
        if not wanted:
            return
        started, batch = time.perf_counter(), self._batch
        batch.only = wanted
        for sample in range(len(batch.losses)):
            one = torch.zeros(len(batch.losses), device="cpu")
            one[sample] = 1
            self._run(one, "ordinary", keep=True)
            gradients = self.leaf_grads.take()
            weight = None if batch.weights is None else batch.weights[sample : sample + 1]
            for index in wanted:
                gradient = gradients[index]
                if gradient is not None:
                    wide = gradient.to(self.fisher[index].dtype).unsqueeze(0).contiguous()
                    ops.accumulate_squares_(self.fisher[index], wide, weight)
                    if batch.single_sample is not None and sample == batch.single_sample.sample:
                        batch.of_single_sample[index] = wide[0]
                    if self.gradient is not None:
                        self.gradient[index] += wide[0] if weight is None else wide[0] * weight.to(wide.dtype)
            self.leaf_grads.drop()
        for index in wanted:
            self.rules[index].add("one by one")
        self.seconds["one by one"] += time.perf_counter() - started

    def _some(self, indices: set[int]) -> str:
        """Name a few parameters."""
        names = [repr(self.names[index]) for index in sorted(indices)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
