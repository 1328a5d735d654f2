"""One Fisher pass over a model: the backward half, which measures who owns what and collects squared gradients.

Each batch runs, on one graph,

1. *probing* backward passes, only while some use has not been measured (the first batch) or is routed anew in every
   batch: the losses weighted with power-of-two codes (:mod:`.ownership`). In a verified batch the first one also
   computes the parameters' ordinary gradients;
2. one *collecting* backward pass with weights 1. Every tap's gradients become uses (:mod:`.rules`); once all uses of a
   parameter are in, they are summed per sample, squared and accumulated (:mod:`.reduce`) and their memory is freed;
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

from .. import ops
from ..errors import CoupledSamplesError, WplfastError
from .identity import check_identity
from .intercept import Interception
from .measure import Measurement, at_least_1d
from .reduce import accumulate, weighted_sum
from .rules import GENERIC
from .tap import Site
from .uses import Use

_Mode: TypeAlias = Literal["probe", "collect", "ordinary"]


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
        self.rules: dict[int, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.unseen: set[int] = set()
        self.half = False  # some gradient was in half precision
        self.batches = 0
        self._measurement = Measurement()
        self._late: set[int] = set()  # parameters used inside reentrant checkpoints
        self._mode: _Mode = "collect"
        self._clear()

    def _clear(self) -> None:
        """Reset the state of one collecting pass."""
        self._uses: dict[int, list[Use]] = defaultdict(list)
        self._pending: dict[int, int] = defaultdict(int)
        self._retry: set[int] = set()
        self._mixed: list[Site] = []
        self._flushed: set[int] = set()

    # ---- one batch -------------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor,
        weights: Tensor | None = None,
        *,
        verify: bool = False,
        retain_graph: bool = False,
        may_replay: bool = False,
        independent: bool | None = None,
    ) -> bool:
        """Collect one batch.

        Args:
            losses: one loss per sample [N], with a graph.
            weights: optional float64 weights [N] outside the square, on the losses' device.
            verify: compare captured with ordinary gradients.
            retain_graph: keep the graph for another call on the same forward pass.
            may_replay: the caller can run the same forward pass again.
            independent: whether the caller found a sample's loss to be the same in a batch of its own; None: unknown.

        Returns:
            False if the accumulators were emptied again and the forward pass must be run again (first batch only).

        Raises:
            CoupledSamplesError: if a sample's loss depends on other samples.
            VerificationError: if captured and ordinary gradients disagree.
        """
        measurement, sites = self._measurement, self.interception.sites
        measurement.start_batch(len(losses))
        self._weights, self._independent = weights, independent
        self._lhs: dict[int, Tensor] | None = {} if verify else None
        self._rhs: list[Tensor | None] = []
        self._only: set[int] | None = None
        digits = max(measurement.passes_needed(sites), int(verify))
        keep = retain_graph or digits > 0 or not self.batches or measurement.has_dormant
        keep = keep or bool(self._late or self.unseen)
        blocked: set[int] = set()
        for attempt in range(4):
            for digit in range(digits):
                self._probe(losses, digit, ordinary=verify and attempt == digit == 0)
            if digits and self.batches and may_replay:
                self._collect(losses, keep, dry=True)  # find out about replays before anything is accumulated
                if self._mixed and not self._escalate(may_replay):
                    return False
            self._collect(losses, keep)
            blocked |= self._find_unseen()
            if self._mixed:
                if not self._escalate(may_replay):
                    return False
                blocked |= {index for site in self._mixed for index in site.parameters}
                self._retry -= blocked
            if not self._retry:
                break
            if not keep:
                raise WplfastError(f"the use of {self._some(self._retry)} changed its layout inside a checkpoint")
            self._only = set(self._retry)
            measurement.start_probing()
            digits = max(1, measurement.passes_needed(sites))
        else:
            raise WplfastError(f"could not measure which samples the uses of {self._some(self._retry)} belong to")
        self._one_by_one(losses, blocked | self.unseen)
        if self._lhs is not None:
            dtypes = [torch.bfloat16 if self.half else p.dtype for p in self.parameters]
            codes = measurement.codes.weights(0)
            check_identity(self.names, self._lhs, self._rhs, self.fisher, codes, dtypes, blocked | self.unseen)
        if not retain_graph:
            self.interception.start_batch()
        self.batches += 1
        return True

    def _run(self, losses: Tensor, weights: Tensor, mode: _Mode, keep: bool) -> None:
        """Run one backward pass."""
        self._mode, self.interception.in_backward = mode, True
        self.interception.start_backward()
        try:
            # Not losses.backward(weights): PyTorch imports sympy for that, which takes longer than most first batches.
            (losses * weights.to(losses)).sum().backward(retain_graph=keep)
        finally:
            self.interception.in_backward = False

    # ---- what the taps report --------------------------------------------------------------------------------------

    def event(self, site: Site, data: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Take the gradients of a site's outputs."""
        nothing: list[Tensor | None] = [None] * len(site.call.sources)
        if site.late:
            self._late |= site.parameters
        self.half |= any(g is not None and g.dtype in (torch.bfloat16, torch.float16) for g in grads)
        if self._mode == "collect":
            self._collect_site(site, data, grads)
            return nothing
        if self._mode == "probe":
            self._measurement.probe(site, grads)
            if not self._ordinary:
                return nothing
        elif self._only is not None and not self._only & site.parameters:
            return nothing
        return site.rule.ordinary(site.call, data, grads)

    # ---- probing ---------------------------------------------------------------------------------------------------

    def _probe(self, losses: Tensor, digit: int, ordinary: bool) -> None:
        """Run one probing pass; with ``ordinary``, keep the parameters' ordinary gradients to verify with."""
        self._ordinary = ordinary
        self._run(losses, self._measurement.codes.weights(digit), "probe", keep=True)
        if ordinary:
            self._rhs = self._ordinary_gradients()

    def _ordinary_gradients(self) -> list[Tensor | None]:
        """Take the gradients that an ordinary backward pass left, down to the parameters."""
        derived = {id(s.leaf): s for site in self.interception.sites for s in site.call.sources if s.graph is not None}
        for source in derived.values():
            if source.leaf.grad is not None:
                assert source.graph is not None
                torch.autograd.backward(source.graph, source.leaf.grad, retain_graph=True)
                source.leaf.grad = None
        gradients = []
        for parameter, leaf in zip(self.parameters, self.interception.leaves, strict=True):
            parts = [g for g in (leaf.grad, parameter.grad) if g is not None]
            gradients.append(sum(parts[1:], parts[0]) if parts else None)
            leaf.grad = None
        return gradients

    # ---- collecting ------------------------------------------------------------------------------------------------

    def _collect(self, losses: Tensor, keep: bool, dry: bool = False) -> None:
        """Run the collecting pass and accumulate all that can be; a dry one only measures."""
        self._clear()
        self._dry = dry
        for site in self.interception.sites:
            for index in site.parameters if not site.late else ():
                self._pending[index] += 1
        self._run(losses, torch.ones(len(losses)), "collect", keep)
        for index in list(self._uses):
            self._flush(index)

    def _collect_site(self, site: Site, data: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Turn one site's gradients into uses."""
        started = time.perf_counter()
        parameters = site.parameters
        if self._only is None or parameters & self._only:
            owners = self._measurement.owners(site, grads)
            if isinstance(owners, str):
                self._retry |= parameters
                if owners == "mixed":
                    self._mixed.append(site)
            elif any(owner is not None for owner in owners) and not self._dry:
                pairs = zip(grads, owners, strict=True)
                grads = [None if g is None or owner is None else at_least_1d(g) for g, owner in pairs]
                uses = site.rule.uses(site.call, data, grads, owners)
                if uses is None:
                    uses = GENERIC.uses(site.call, data, grads, owners)
                for use in uses:
                    for index in use.source.parameters:
                        self._take(index, use, site)
                if uses:
                    self.seconds[uses[0].rule] += time.perf_counter() - started
        if not site.late and not site.fired:
            site.fired = True
            for index in parameters:
                self._pending[index] -= 1
                if self._pending[index] == 0 and index not in self._late:
                    self._flush(index)

    def _take(self, index: int, use: Use, site: Site) -> None:
        """Keep a use until all uses of its parameter are in."""
        if self._only is not None and index not in self._only:
            return
        if index in self._flushed:
            raise WplfastError(
                f"{self.names[index]!r} was used again ({site.call.name}, inside a checkpoint) after its gradient was "
                "squared; its uses must be the same ones in every batch"
            )
        self._uses[index].append(use)

    def _flush(self, index: int) -> None:
        """Square and accumulate what is known of one parameter."""
        uses = self._uses.pop(index, [])
        if index in self._retry or index in self.unseen or not uses:
            return
        started = time.perf_counter()
        self._flushed.add(index)
        gradient = None if self.gradient is None else self.gradient[index]
        if self._lhs is not None:
            codes = self._measurement.codes.weights(0).to(self.fisher[index].device)
            self._lhs[index] = weighted_sum(index, uses, codes, self.fisher[index])
        accumulate(index, uses, self.fisher[index], gradient, self._weights)
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
        bare = [site for site in self._mixed if not site.call.differentiable_data]
        coupled = [site for site in self._mixed if site.call.differentiable_data]
        n_samples = self._measurement.codes.n_samples
        known = self._independent or (
            self._independent is None and all(_is_about_positions(s, n_samples) for s in bare)
        )
        if not bare or not known:
            raise CoupledSamplesError(self._coupling((coupled or bare)[0]))
        self.interception.derive |= {site.key for site in bare}
        if may_replay and (self._dry or self.batches == 0):
            if self.batches == 0:
                for accumulator in (*self.fisher, *(self.gradient or ())):
                    accumulator.zero_()
            self.interception.start_batch()
            return False
        if coupled:
            raise WplfastError(
                f"{self._coupling(coupled[0])}, or the data of this call depend on parameters alone: "
                "run the same forward pass and backward again to tell"
            )
        return True

    def _coupling(self, site: Site) -> str:
        """Describe a site that mixes samples."""
        name = self.names[min(site.parameters)]
        module = name.rpartition(".")[0] or "the model"
        return (
            f"samples are coupled at {site.call.name} in {module} (parameter {name!r}): its output's gradient mixes "
            "samples, so that of one sample's loss alone cannot be had (batch statistics? in-batch negatives?)"
        )

    def _find_unseen(self) -> set[int]:
        """Return the parameters that gradients arrived at past the taps, and remember them."""
        found = {i for i, p in enumerate(self.parameters) if p.grad is not None}
        for site in self.interception.sites:
            reached = [s for s in site.call.sources if s.graph is not None and s.leaf.grad is not None]
            found |= {index for source in reached for index in source.parameters}
        self._drop_gradients()
        fresh = found - self.unseen
        if fresh and self.batches:
            raise WplfastError(f"a gradient arrived at {self._some(fresh)} unseen, though not in earlier batches")
        for index in fresh & self._flushed:
            for accumulator in (self.fisher, self.gradient or ()):
                if accumulator:
                    accumulator[index].zero_()
        self.unseen |= fresh
        self._retry -= self.unseen
        return fresh

    def _drop_gradients(self) -> None:
        """Clear the gradients that a pass left."""
        for tensor in (*self.parameters, *self.interception.leaves):
            tensor.grad = None
        for site in self.interception.sites:
            for source in site.call.sources:
                source.leaf.grad = None

    def _one_by_one(self, losses: Tensor, wanted: set[int]) -> None:
        """Collect some parameters exactly, with one backward pass for each sample."""
        if not wanted:
            return
        started = time.perf_counter()
        self._only = wanted
        for sample in range(len(losses)):
            one = torch.zeros(len(losses))
            one[sample] = 1
            self._run(losses, one, "ordinary", keep=True)
            gradients = self._ordinary_gradients()
            weight = None if self._weights is None else self._weights[sample : sample + 1]
            for index in wanted:
                gradient = gradients[index]
                if gradient is not None:
                    wide = gradient.to(self.fisher[index].dtype).unsqueeze(0).contiguous()
                    ops.accumulate_squares_(self.fisher[index], wide, weight)
                    if self.gradient is not None:
                        self.gradient[index] += wide[0] if weight is None else wide[0] * weight.to(wide.dtype)
            self._drop_gradients()
        for index in wanted:
            self.rules[index].add("one by one")
        self.seconds["one by one"] += time.perf_counter() - started

    def _some(self, indices: set[int]) -> str:
        """Name a few parameters."""
        names = [repr(self.names[index]) for index in sorted(indices)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_about_positions(site: Site, n_samples: int) -> bool:
    """Tell whether the data of a call are surely not samples: a range of indices, or integers of another size."""
    for shape, dtype, is_range in site.call.data_kinds:
        if dtype.is_floating_point or not (is_range or all(size % n_samples for size in shape)):
            return False
    return True
