"""``fisher_diagonal``: the Fisher of a model over a data set, in one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import __version__
from ..capture.call import random_state, set_random_state
from ..capture.collect.batch import Independence
from ..distributed.engines import check_engine
from ..distributed.padding import padding_of
from ..distributed.shared_pass import open_pass
from ..errors import CoupledSamplesError
from ..params import Params
from .accumulator import FisherAccumulator
from .batches import Batch, Unpack
from .checks import check_arguments, check_losses, check_outputs, losses_of
from .drawn import DrawnTargets, Term
from .independence import Examination, Findings
from .limit import Limit
from .preserve import Snapshot
from .result import Fisher
from .sampling import Likelihood
from .undisturbed import Undisturbed

LossFn = Callable[[Any, Any], Tensor]


def fisher_diagonal(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFn,
    *,
    params: Params | None = None,
    unpack: Unpack | None = None,
    fisher_type: Literal["empirical", "mc", "exact"] = "empirical",
    likelihood: Likelihood = "categorical",
    mc_samples: int = 1,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
    train: bool = False,
    with_grad: bool = False,
    verify: bool | Literal["always"] = True,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    progress: bool = False,
    samples: Literal["batch", "losses"] = "batch",
    independent: bool | None = None,
    reduce: bool | None = None,
) -> Fisher:
    """Estimate the diagonal Fisher information, a mean over samples of squared per-sample gradients.

    ``F_i = 1/N sum_n (d loss_n / d theta_i)^2``, exact for every model whose samples do not depend on each other, on
    one scale whatever the batch size. The pass costs about one ordinary backward pass per batch.

    Under DistributedDataParallel each rank calls it with data of its own, of any number of samples, and all get the
    same Fisher, that of one process over all data; see ``reduce``. Nothing is collective but a word before the pass and
    one sum after it (with ``max_samples``, also a word a batch), and a rank that fails ends it on all of them.

    Args:
        model: the module. Its parameters, flags, gradients and the RNG state are afterwards what they were. Of
            DistributedDataParallel, and of DeepSpeed's engine up to ZeRO-2, the module inside is run and gives the
            names.
        data: yields ``(inputs, targets)``, ``(inputs, targets, weights)`` or a dict with ``labels``; inputs are a
            tensor, a tuple (positional) or a dict (keywords). Batches are moved to the model's device. Sample weights
            [N], floating point, enter outside the square, ``F = sum_n w_n g_n^2 / sum_n w_n``. Empty batches are left
            out, and so are samples that a loader repeats so that all ranks have equally many (``DistributedSampler``,
            ``Accelerator.prepare``), unless ``reduce=False``.
        loss_fn: ``loss_fn(outputs, targets)`` returns one loss per sample, [N]; see :mod:`wplfast.losses`. For "mc" and
            "exact" it must be -log p of ``likelihood``, up to a constant, or its mean over tokens. How it reads labels
            (shifted, ignored positions, classes not last, one-hot) is found out on the first batch, and labels are
            drawn accordingly; then its gradient by the outputs is compared with that of -log p in every batch and for
            every draw, so that clamps or weights that act on some outputs or labels alone are seen where they act.
        params: what to estimate for: a module, a mapping or (name, tensor) pairs; the names become the keys. Default:
            all of the model's parameters that require grad. The cost falls with the subset.
        unpack: turns what ``data`` yields into such a tuple.
        fisher_type: ``"empirical"`` (given targets), ``"mc"`` (targets drawn from the model) or ``"exact"``
            (expectation over all classes of outputs [N, C]: one forward pass, C backward passes).
        likelihood: what "mc" draws from: categorical, bernoulli, gaussian (unit variance) or a sampler
            ``(outputs, generator) -> targets``, whose draws for the first batch are compared with the loss where that
            is one of these; ``report.unchecked`` says where it is not.
            "exact" takes categorical, and bernoulli for one logit or several of each sample.
        mc_samples: draws per sample, stratified: less noise than that of as many independent ones.
        max_samples: stop after so many samples. Of a Fisher of several ranks: after so many in all, counted in the
            order of batches, and among the i-th batches of all ranks in the order of ranks.
        generator: for the draws, of the outputs' device; default: a fresh one with a fixed seed, the rank where there
            are several. One of your own should have another seed on each rank.
        train: leave the modules' modes as they are (dropout on) instead of eval mode.
        with_grad: also compute ``Fisher.mean_grad``, the mean gradient.
        verify: check the first batch against ordinary autograd and parts of itself in batches of their own, and now and
            then that rows still belong to the samples they belonged to; "always": measure and check every batch (about
            twice the cost). What cannot be checked stands in ``report.unchecked``. Beyond notice are samples that are
            coupled through their inputs alone and in a later batch only, and couplings of so few samples that none of
            the parts shows them (the halves of a small batch, a quarter of a large one, and the last sample).
        on_nonfinite: ``"raise"``, or ``"skip"`` to leave out batches with NaN or inf.
        progress: show a progress bar with samples per second.
        samples: what a sample is. ``"batch"``: one of the N that the batch holds. ``"losses"``: whatever an entry of
            the losses, [M], belongs to, however many rows it owns: a packed document (losses from
            ``losses.cross_entropy(..., sample_ids=)``), a graph, a preference pair, an episode. ``max_samples``,
            weights and ``n_samples`` count these. Who owns which row is measured in every batch, which takes about one
            more backward pass each, and no sample is run alone to check.
        independent: True if you know that no sample's loss depends on another sample; it is not checked then.
        reduce: whether the Fisher is one of all ranks' data, the same on each, or of this rank's alone. What is reduced
            must be called on all ranks (of the process group that the model is wrapped for). Default: True for a model
            in DistributedDataParallel or the like; a plain module's is this rank's own, which is said once.

    Returns:
        A mapping from names to float32 (float64 for float64 parameters) tensors of the parameters' shapes. Of a complex
        parameter F is real: the mean of ``|g_n|^2``, the squared derivatives by both parts added up.

    Raises:
        TypeError: if a batch is of no known form, its third element is no weights, or data is a dataset of samples, or
            nothing that can be iterated over.
        ValueError: if data is empty, losses are not [N] or those of no batch depend on the parameters, a row holds
            several documents though ``samples="batch"``, an option does not fit, or the loss ("mc", "exact") is not
            -log p of the targets that are drawn for it (label smoothing, class weights, a missing 1/2, ..., or on some
            outputs or labels alone, such as clamped logits), or changes the outputs in place; on all ranks, if their
            models or options differ, or a loader repeats samples that cannot be told from the others.
        RankFailedError: if another rank raised; with its error.
        UnsupportedParameterError: if the model is of an engine that has no whole parameters: FSDP1, ZeRO-3, ...
        CoupledSamplesError: if a sample's loss depends on other samples.
        NonFiniteError: if a loss or gradient is NaN or infinite.
        VerificationError: if captured gradients disagree with autograd.

    Example:
        >>> import torch, wplfast
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
        >>> wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
        Fisher(2 parameters, 15 elements, 8 samples)

    Source: arXiv:1612.00796, arXiv:1902.08232; the three types as in arXiv:2502.11756.
    """
    check_engine(model)
    with open_pass(model, reduce) as ranks:
        check_arguments(model, data, loss_fn, unpack)
        _check_options(fisher_type, mc_samples, max_samples)
        accumulator = ranks.accumulator(
            FisherAccumulator,
            model,
            params,
            with_grad=with_grad,
            verify=verify,
            on_nonfinite=on_nonfinite,
            independent=independent,
            samples=samples,
        )
        inner, device = accumulator.model, accumulator.device
        if generator is None:
            generator = torch.Generator(device).manual_seed(ranks.rank)
        drawn = None
        if fisher_type != "empirical":
            watched = list(accumulator.parameters.values())
            exact, note = fisher_type == "exact", partial(accumulator.note_unchecked, what="what a sampler draws")
            drawn = DrawnTargets(loss_fn, likelihood, exact, mc_samples, generator, watched, note)
        deterministic = not (train and any(module.training for module in inner.modules()))
        if verify and not deterministic:
            accumulator.note_unchecked("modules are in training mode", logging.INFO)
        if verify and samples == "losses":
            accumulator.note_unchecked("samples='losses' does not say where in a batch they lie", logging.INFO)
        examined = verify if deterministic and samples == "batch" else False
        if examined and accumulator.runs_no_parts:
            accumulator.note_unchecked(accumulator.runs_no_parts, logging.INFO if independent else logging.WARNING)
            examined = False
        padding = None if reduce is False else padding_of(data)
        limit = Limit(max_samples, padding, ranks.exchange, ranks.rank, on_nonfinite == "skip")
        run = Run(
            accumulator,
            inner,
            loss_fn if drawn is None else drawn.loss,
            drawn,
            generator,
            limit,
            device,
            examined,
            before=Snapshot(inner),
            declared=independent is True,
            samples=samples,
        )
        options = {"fisher_type": fisher_type, "max_samples": max_samples, "with_grad": with_grad, "train": train}
        with Undisturbed(inner, train, device) as undo:
            ranks.begin(model, options, undo)
            with accumulator, _bar(data, progress and ranks.rank == 0) as bar:
                ranks.run_all(run, (Batch.of(item, unpack, device, samples).in_batches(data) for item in data), bar)
                result = ranks.fisher(accumulator)
        fisher = result()
    source = f"wplfast {__version__}, {type(inner).__name__}"
    fisher.metadata |= {
        "source": source,
        "fisher_type": fisher_type,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return fisher


@dataclass
class Run:
    """One call of ``fisher_diagonal``: what every batch needs."""

    accumulator: FisherAccumulator
    model: nn.Module
    loss_fn: LossFn
    drawn: DrawnTargets | None  # None: the given targets
    generator: torch.Generator
    limit: Limit
    device: torch.device
    verify: bool | Literal["always"]  # run parts of the first batch, or of all batches
    before: Snapshot  # what a forward pass may change, as it was before this batch's
    declared: bool  # the user says that samples are independent
    samples: str

    def __post_init__(self) -> None:
        """Prepare to run parts of batches."""
        parameters = list(self.accumulator.parameters.values())
        directions = self.accumulator.directions
        self._examination = Examination(self.model, self.loss_fn, parameters, directions, self.device)
        self._independent: bool | None = True if self.declared else None
        self._is_examined = False
        self._started = time.time()

    def take(self, batch: Batch, bar: Any) -> None:
        """Run the model on one batch, unless it is empty or repeats others, and move the progress bar."""
        if not (batch.is_empty or self.limit.has_repeats_alone):
            self.run(batch)
        if bar is not None:
            rate = self.accumulator.n_samples / max(time.time() - self._started, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} samples/s", refresh=False)
            bar.update(1)

    def run(self, batch: Batch) -> None:
        """Run the model on one batch and accumulate all terms of its losses."""
        state = random_state(self.device)
        self.before.take()
        self.accumulator.expect(batch.size if self.samples == "batch" else None)
        outputs = self._forward(batch)
        terms = list(self.terms(batch, outputs))
        count, weights = 0, None
        findings = Findings()
        known: bool | Independence | None = self._independent
        skipped = self.accumulator.n_skipped

        def replay() -> Tensor:
            nonlocal outputs
            self.before.restore()
            set_random_state(self.device, state)
            outputs = self._forward(batch)
            if self.drawn is not None:
                self.drawn.follow(outputs)
            return self.loss_fn(outputs, terms[0].targets)

        for index, term in enumerate(terms):
            losses = losses_of(self.loss_fn, outputs, term.targets)
            check_losses(losses, outputs, term.targets)
            check_outputs(outputs, losses)
            if self.samples == "batch":
                batch.check_n_losses(losses)
            if self.drawn is not None:
                terms[index], losses = self.drawn.checked(outputs, batch.targets, term, losses)
            first = index == 0
            if first:
                findings = self._examine(batch, terms[0].targets, losses, state)
                known = self._independent
                if known and not self.declared and findings.independent is None:  # found in an earlier batch
                    known = partial(self._ask, batch, terms[0].targets, losses.detach(), state)
                count, weights = self._limit(batch.weights, losses)
            self.accumulator.accumulate(
                losses,
                _product(weights, term.share, losses),
                retain_graph=index + 1 < len(terms),
                replay=replay if first else None,
                count=count if first else 0,
                independent=known,
                single_sample=findings.single_sample if first else None,
            )
            if findings.coupled:  # only now, since an operation in the graph that couples them has a better message
                raise CoupledSamplesError(findings.coupled)
            if self.accumulator.n_skipped > skipped:  # the batch is left out, with all terms
                return

    def _forward(self, batch: Batch) -> Any:
        """Return the model's outputs."""
        outputs = batch.forward(self.model)
        return outputs if self.drawn is None else self.drawn.apart(outputs)

    def _examine(self, batch: Batch, targets: Any, losses: Tensor, state: Tensor) -> Findings:
        """Find out whether samples are independent, in the first batch that tells or in all."""
        known = self.declared or not self._examination.has_more_to_ask(batch, targets, len(losses))
        done = self._is_examined and self.verify != "always" and known
        if not self.verify or not losses.requires_grad or done:
            return Findings()
        self._examination.half = self.accumulator.is_widened
        findings = self._examination.examine(batch, targets, losses, self.before, state, not self.declared)
        if findings.unchecked:
            self.accumulator.note_unchecked(findings.unchecked)
        self._is_examined = findings.independent is not None or bool(findings.unchecked)
        if findings.independent is not None:
            self._independent = findings.independent
        return findings

    def _ask(self, batch: Batch, targets: Any, losses: Tensor, state: Tensor) -> bool | None:
        """Find out whether samples are independent in a later batch too, whose calls mix samples."""
        return self._examination.examine(batch, targets, losses, self.before, state).independent

    def terms(self, batch: Batch, outputs: Any) -> Iterator[Term]:
        """Yield targets, and what their losses' squared gradients count."""
        if self.drawn is None:
            yield Term(batch.targets)
        else:
            yield from self.drawn.terms(outputs, batch.targets)

    def _limit(self, weights: Tensor | None, losses: Tensor) -> tuple[int, Tensor | None]:
        """Give samples beyond the limit the weight zero; return how many samples count, and the weights."""
        if weights is not None:
            if weights.shape != losses.shape:
                raise ValueError(
                    f"weights must have shape {list(losses.shape)} as losses, got {list(weights.shape)}; "
                    "a batch's third element is taken for weights: drop it with unpack= if it is something else"
                )
            weights = weights.to(losses.device, torch.float64)
        room = self.limit.room(len(losses), self.accumulator.n_samples)
        if room >= len(losses):
            return len(losses), weights
        kept = torch.arange(len(losses), device=losses.device) < room
        return room, kept.double() if weights is None else weights * kept


def _product(weights: Tensor | None, share: Tensor | float, losses: Tensor) -> Tensor | None:
    """Multiply sample weights (None: 1) with the share of a term.

    Raises:
        ValueError: if a share is of each row of outputs, and losses are of something else.
    """
    if isinstance(share, Tensor) and share.shape != losses.shape:
        raise ValueError(
            "fisher_type='exact' needs one loss for each row of the outputs, "
            f"{list(share.shape)}, got {list(losses.shape)}; use fisher_type='mc'"
        )
    if weights is None and not isinstance(share, Tensor):
        return None if share == 1 else torch.full(losses.shape, share, dtype=torch.float64, device=losses.device)
    return share if weights is None else weights * share  # type: ignore[return-value]


def _check_options(fisher_type: str, mc_samples: int, max_samples: int | None) -> None:
    """Check the options that need no data."""
    if fisher_type not in ("empirical", "mc", "exact"):
        raise ValueError(f"fisher_type must be 'empirical', 'mc' or 'exact', got {fisher_type!r}")
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
    if isinstance(max_samples, str):
        raise TypeError(f"max_samples must be a number, or None for all, got {max_samples!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")


def _bar(data: Iterable[Any], progress: bool) -> Any:
    """Make the progress bar; None without: even a disabled one takes a lock, which an interrupt may leave locked.

    Streams have no length or a wrong one, and loaders of them warn once they were asked.
    """
    if not progress:
        return nullcontext()
    total = None
    streams = isinstance(getattr(data, "dataset", None), torch.utils.data.IterableDataset)
    if isinstance(data, Sized) and not streams:
        with suppress(Exception):
            total = len(data)
    return tqdm(total=total, unit="batch", desc="Fisher", leave=False)
