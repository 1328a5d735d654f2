"""``FisherAccumulator``: the context manager in which a model's losses are squared sample by sample."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor, nn

from ..capture.accumulators import SLOW_RULES, Accumulators
from ..capture.collect.batch import Independence, SingleSample
from ..capture.collect.mixed import TAKEN_FOR_POSITIONS
from ..capture.collect.session import Session
from ..capture.probe.graph import leaves
from ..capture.rules.projection import Directions
from ..capture.undo import Undo, UndoOnExit
from ..capture.watched import Derived, check_supported, is_watched, watch
from ..distributed.engines import check_engine, inner_module, replicas_in
from ..errors import NonFiniteError, UnsupportedParameterError, WplfastError
from ..params import Params, check_has_shape, device_of, is_fully_sharded, named, some
from .buffers import Buffers
from .checks import batch_norms, check_batch_statistics, check_losses, check_weights, without_graph
from .report import Report
from .result import Fisher
from .undisturbed import FAST_ATTENTION, compiler_stance

logger = logging.getLogger(__name__)


class FisherAccumulator:
    """Accumulate ``F = sum_n w_n g_n^2 / sum_n w_n`` over any number of batches.

    Inside the context, run the model as usual and hand its per-sample losses to :meth:`backward`. Ordinary weight
    gradients are not computed; ``.grad``, ``requires_grad`` and the parameters are afterwards what they were before.
    The caller chooses the module's mode (``model.eval()``) and device.

    That holds after an error and after any number of interrupts too. A pass is used in the thread that opened it, and
    passes over different models may run in several threads at once. Meanwhile other threads may run this model without
    gradients; with gradients they get an error. ``nn.DataParallel`` copies parameters in a way that is not seen: its
    model is served one sample at a time. ``DistributedDataParallel`` is run as the module that it wraps, whose names
    the keys are; each rank has the Fisher of what it was given itself, until all call :meth:`Fisher.all_reduce_`.

    Args:
        model: the module; its parameters outside ``params`` are frozen for the pass.
        params: what to accumulate for: a module, a mapping or (name, tensor) pairs; the names become the keys. Default:
            all of the model's parameters that require grad. Of complex ones F is real: the mean of ``|g_n|^2``.
        with_grad: also accumulate the mean gradient, ``Fisher.mean_grad``.
        verify: check the first batch against ordinary autograd, at the price of about one more backward pass, and now
            and then that rows still belong to the samples they belonged to; "always": measure and check every batch.
        on_nonfinite: ``"raise"``, or ``"skip"`` to leave out batches with NaN or inf (costs one more Fisher of memory).
        independent: True if you know that no sample's loss depends on another sample. Only needed where one batch
            cannot tell whether an operation's data are samples, such as float tables without a batch axis.
        samples: ``"losses"`` if what a loss owns may lie elsewhere in every batch, such as documents packed into rows:
            rows are measured in each batch then, at the price of about one more backward pass.

    Attributes:
        n_samples: number of samples accumulated so far.
        n_skipped: number of samples left out as not finite.
        parameters: the watched parameters by name.
        directions: what gradients are projected on where two ways to compute them are compared.
        device: that batches are moved to.

    Raises:
        UnsupportedParameterError: if a parameter is a tensor subclass such as DTensor, or the model is of FSDP1, ZeRO-3
            or another engine that has no whole parameters.

    Example:
        >>> import torch, wplfast
        >>> model = torch.nn.Linear(3, 2)
        >>> with wplfast.FisherAccumulator(model) as acc:
        ...     for _ in range(2):
        ...         acc.backward(model(torch.randn(5, 3)).square().sum(1))
        >>> acc.result()
        Fisher(2 parameters, 8 elements, 10 samples)

    Source: the mean of squared per-sample gradients, arXiv:1612.00796 (EWC) and arXiv:1902.08232 (WPL).
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        with_grad: bool = False,
        verify: bool | Literal["always"] = True,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        independent: bool | None = None,
        samples: Literal["batch", "losses"] = "batch",
    ) -> None:
        """See the class."""
        if samples not in ("batch", "losses"):
            raise ValueError(f"samples must be 'batch' or 'losses', got {samples!r}")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
        if isinstance(verify, str) and verify != "always":
            raise ValueError(f"verify must be True, False or 'always', got {verify!r}")
        self._check_model(model)
        self._replicas = replicas_in(model)
        self.model = model = inner_module(model)
        for kind, members in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in members:
                check_has_shape(f"the {kind} {name!r}", tensor)
        self.parameters = named(model if params is None else params, complex_too=True)
        check_supported(self.parameters)
        self._verify, self._independent, self._by_losses = verify, independent, samples == "losses"
        self._skip = on_nonfinite == "skip"
        self._accumulators = self._allocate(with_grad)
        self.directions = Directions(self._accumulators.like)
        self._session: Session | None = None
        self._undo = Undo()
        self.n_samples = 0
        self._total_weight = 0.0
        self.n_skipped = 0
        self._unchecked: list[str] = []
        self.device = device_of(itertools.chain(model.parameters(), self.parameters.values()))
        self._saw_constants = False
        self._seconds = 0.0
        self._invalid: str | None = None

    def _allocate(self, with_grad: bool) -> Accumulators:
        """Make what the pass adds to."""
        self._fisher = Buffers(self.parameters)
        self._gradient = Buffers(self.parameters, torch.view_as_complex) if with_grad else None
        self._staged = Buffers(self.parameters) if self._skip else None
        self._staged_gradient = Buffers(self.parameters) if self._skip and with_grad else None
        target, gradient = self._staged or self._fisher, self._staged_gradient or self._gradient
        return Accumulators(target.views, None if gradient is None else gradient.views)

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a model that this cannot accumulate for."""
        check_engine(model)
        if is_fully_sharded(model):
            raise UnsupportedParameterError(
                "the ranks of an FSDP2 model run their passes together: call fisher_diagonal(model, data, loss_fn), "
                "which sees to it, in place of a FisherAccumulator of your own"
            )

    #: Why parts of a batch cannot be run by themselves, if they cannot.
    runs_no_parts = ""

    # ---- the context -----------------------------------------------------------------------------------------------

    def __enter__(self) -> FisherAccumulator:
        """Start to watch the parameters.

        Raises:
            WplfastError: if another pass watches one of them.
        """
        if self._session is not None:
            raise WplfastError("this FisherAccumulator is open already, or was closed; make a new one")
        try:
            self._open()
            return self
        except BaseException:
            self._undo.close()
            raise

    #: Gives everything back as it was.
    __exit__ = UndoOnExit()

    def _open(self) -> None:
        """Change the model, each change after what gives it back."""
        watched = {id(p) for p in self.parameters.values()}
        others = [p for p in self._all_parameters() if id(p) not in watched]
        if any(is_watched(p) for p in others):
            raise WplfastError("another Fisher pass watches parameters of this model; run one pass at a time")
        parameters, constants = list(self.parameters.values()), [*others, *self.model.buffers()]
        self._session = self._new_session(parameters, constants)
        undo, frozen = self._undo, [p for p in others if p.requires_grad]
        self._session.frozen += frozen
        self._session.interception.has_frozen = bool(frozen)
        undo.then(self._session.release)
        hooked = [name for name, p in self.parameters.items() if p._backward_hooks]
        if hooked:
            logger.warning(
                "hooks on %s (register_hook) are not called: F is of the gradients without them", some(hooked)
            )
        grads, flags = [p.grad for p in parameters + frozen], [p.requires_grad for p in parameters]
        watch(self.parameters, self._session.interception, undo)
        undo.by(setattr, parameters + frozen, repeat("requires_grad"), flags + [True] * len(frozen))
        undo.by(setattr, parameters + frozen, repeat("grad"), grads)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        for ddp in self._replicas:  # neither its buckets nor its broadcasts take part
            undo.by(ddp.__dict__.pop, ["forward"], [None])
            if "forward" in ddp.__dict__:
                undo.by(ddp.__dict__.__setitem__, ["forward"], [ddp.__dict__["forward"]])
            ddp.__dict__["forward"] = ddp.module
        # Frozen parameters would let PyTorch take a fast path whose padded outputs are others (nested tensors).
        FAST_ATTENTION.hold(undo)
        if "torch._dynamo" in sys.modules:  # compiled code would be traced through the watched parameters
            compiler_stance().hold(undo)
        self._batch_norms = batch_norms(self.model)

    def _new_session(self, parameters: list[Tensor], constants: list[Tensor]) -> Session:
        """Make the session of the pass."""
        names = list(self.parameters)
        return Session(names, parameters, constants, self._accumulators, self.directions, self._by_losses)

    def _all_parameters(self) -> Iterable[Tensor]:
        """Return the model's parameters, watched ones and others, as its forward pass uses them."""
        return list(self.model.parameters())

    # ---- accumulation ----------------------------------------------------------------------------------------------

    def backward(self, losses: Tensor, weights: Tensor | None = None, *, retain_graph: bool = False) -> None:
        """Accumulate one batch; do not reduce the losses and do not call ``losses.backward`` yourself.

        Args:
            losses: one loss per sample, [N], floating point. Losses without a graph (no parameter was reached) count
                with gradients of zero, unless those of all batches are.
            weights: optional non-negative weights [N]; they enter outside the square.
            retain_graph: keep the graph for further losses of the same forward pass.

        Raises:
            ValueError: if losses is not [N], or weights do not fit.
            NonFiniteError: if a loss or a Fisher entry is NaN or infinite (unless ``on_nonfinite="skip"``).
            CoupledSamplesError: if a sample's loss depends on other samples.
            VerificationError: if captured gradients disagree with autograd on the first batch.
            WplfastError: if this is not the thread that opened the pass, or a ``.backward()`` that is not of this pass
                reached a parameter.
        """
        self.accumulate(losses, weights, retain_graph=retain_graph)

    def expect(self, n_samples: int | None) -> None:
        """Say how many samples the batch seems to have that is run next; None if that is not known.

        Results do not depend on it. It spares the first batch a second run where a model looks up its positions.
        """
        self._usable().interception.n_samples = n_samples

    def accumulate(
        self,
        losses: Tensor,
        weights: Tensor | None = None,
        *,
        retain_graph: bool = False,
        replay: Callable[[], Tensor] | None = None,
        count: int | None = None,
        independent: bool | Independence | None = None,
        single_sample: SingleSample | None = None,
    ) -> None:
        """Accumulate one batch, for callers that can run its forward pass again.

        Args:
            losses: as in :meth:`backward`.
            weights: as in :meth:`backward`.
            retain_graph: as in :meth:`backward`.
            replay: runs the same forward pass again, on the same random numbers, and returns its losses.
            count: how many samples these losses stand for (0 for further terms of the same samples).
            independent: whether the caller found that a sample's loss is the same in a batch of its own, or how to.
            single_sample: the gradients of that sample, to compare with.
        """
        session = self._usable()
        if threading.get_ident() != session.interception.thread:
            session.interception.check_thread()
        check_losses(losses)
        weights = check_weights(weights, losses)
        check_batch_statistics(self._batch_norms)
        if not len(losses):
            session.pass_over(retain_graph)
            return
        if not bool(torch.isfinite(losses.detach()).all()):
            bad = int((~torch.isfinite(losses.detach())).nonzero()[0])
            session.abandon()
            self._nonfinite(f"the loss of sample {bad} is {losses[bad].item()}", len(losses))
            return
        if not losses.requires_grad and session.thaw(replay is not None) and replay is not None:
            losses = replay()
        if not losses.requires_grad:
            session.pass_over(retain_graph)
            if not self._saw_constants:
                self._saw_constants = True
                logger.warning("losses of a batch do not depend on the parameters: they count with gradients of zero")
            self._count(losses, weights, count)
            return
        if session.n_batches == 0:
            self._spare_leaves(losses)
        started = time.perf_counter()
        try:
            session.collect(
                losses,
                weights,
                verify=self._verify,
                retain_graph=retain_graph,
                replay=replay,
                independent=self._independent if independent is None else independent,
                single_sample=single_sample,
            )
        except NonFiniteError as error:
            session.abandon()
            self._nonfinite(str(error), len(losses))
            return
        except BaseException as error:
            self._invalid = f"an earlier batch failed: {error}"
            raise
        self._seconds += time.perf_counter() - started
        if session.lessons.has_guessed and replay is None:
            self.note_unchecked(TAKEN_FOR_POSITIONS)
        if session.n_batches == 1:
            self._log_slow()
        if not self._keep_batch(len(losses)):
            return
        self._count(losses, weights, count)

    def _keep_batch(self, n_samples: int) -> bool:
        """Look for NaN in what a batch added, and keep it; False if the batch is left out."""
        target = self._staged or self._fisher
        if not all(bool(torch.isfinite(flat.amax())) for flat in target.flats if flat.numel()):
            name = target.first_nonfinite()
            self._nonfinite(f"a squared gradient of {name!r} is NaN or infinite", n_samples)
            return False
        for main, staged in ((self._fisher, self._staged), (self._gradient, self._staged_gradient)):
            if main is not None and staged is not None:
                main.add_and_clear(staged)
        return True

    def _count(self, losses: Tensor, weights: Tensor | None, count: int | None) -> None:
        """Count the samples of a batch that is accumulated."""
        self.n_samples += len(losses) if count is None else count
        self._total_weight += len(losses) if weights is None else float(weights.sum())

    def result(self) -> Fisher:
        """Return the Fisher of all samples so far; accumulation may go on.

        Raises:
            WplfastError: if nothing was accumulated or a batch failed.
            ValueError: if the losses of no batch depend on the parameters.
        """
        return self._result(final=False)

    def finish(self) -> Fisher:
        """Return the Fisher without a copy; the accumulator cannot be used afterwards."""
        return self._result(final=True)

    def part(self) -> tuple[Fisher, bool]:
        """Return, as :meth:`finish`, what this rank has for the Fisher of all ranks, be it nothing.

        Returns:
            The Fisher, and whether any losses depended on the parameters.
        """
        reached = self._usable().n_batches > 0
        return self._normalised(final=True), reached

    def _result(self, final: bool) -> Fisher:
        """Normalise what must not be nothing."""
        session = self._usable()
        if not self.n_samples:
            raise WplfastError("nothing was accumulated: call backward(losses) at least once")
        self.check_reached(session.n_batches > 0)
        if not self._total_weight > 0:
            raise WplfastError("the weights of all samples are zero")
        return self._normalised(final)

    def _normalised(self, final: bool) -> Fisher:
        """Normalise, in place if ``final``."""
        session = self._usable()
        if is_watched(next(iter(self.parameters.values()))):
            session.check_leaves()
        if final:
            self._invalid = "its result was taken"
        weight = self._total_weight or 1.0
        fisher, gradient = self._divided(weight, final)
        served = zip(self.parameters, self._accumulators.rules, strict=True)
        rules = {name: tuple(sorted(names)) for name, names in served}
        numels = {name: p.numel() for name, p in self.parameters.items()}
        passes = self._accumulators.n_passes / max(1, session.n_batches)
        seconds, unchecked = dict(self._accumulators.seconds), tuple(self._unchecked)
        report = Report(rules, seconds, self._seconds, self.n_skipped, numels, passes, unchecked)
        return Fisher(
            fisher,
            self.n_samples,
            total_weight=self._total_weight,
            mean_grad=gradient,
            report=report,
            parameters=self._owned(),
        )

    def _divided(self, weight: float, final: bool) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return F and the mean gradient: the sums by ``weight``, in their own memory if ``final``."""
        gradient = None if self._gradient is None else self._gradient.divided(weight, final)
        return self._fisher.divided(weight, final), gradient

    def _owned(self) -> Mapping[str, Tensor]:
        """Return the parameters as their owner holds them."""
        return self.parameters

    def note_unchecked(
        self,
        why: str,
        level: int = logging.WARNING,
        what: str = "whether samples depend on each other through their inputs",
    ) -> None:
        """Say once that something could not be checked, and keep the reason for the report."""
        if why not in self._unchecked:
            self._unchecked.append(why)
            logger.log(level, "%s was not checked: %s", what, why)

    @property
    def is_widened(self) -> bool:
        """Whether functions were run in a wider type than they run in outside of the pass."""
        return self._session is not None and bool(self._session.interception.native_dtypes)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check_reached(self, reached: bool) -> None:
        """Require that losses depend on the parameters; say so if a parameter of another model is left.

        Args:
            reached: whether those of any batch do.

        Raises:
            ValueError: if none do.
        """
        own = {id(p) for p in self.model.parameters()}
        owned = zip(self.parameters.items(), self._owned().values(), self._accumulators.rules, strict=True)
        left = [name for (name, p), held, rules in owned if not rules and own.isdisjoint((id(p), id(held)))]
        if not reached or len(left) == len(self.parameters):
            raise ValueError(without_graph(self.model, list(self.parameters), left))
        if left:
            logger.warning("no loss depends on %s, which is no parameter of the model either: its F is 0", some(left))

    def _usable(self) -> Session:
        """Return the session, or tell why there is none."""
        if self._session is None:
            raise WplfastError("use FisherAccumulator as a context manager: `with FisherAccumulator(model) as acc:`")
        if self._invalid is not None:
            raise WplfastError(f"this FisherAccumulator cannot be used any more: {self._invalid}")
        return self._session

    def _nonfinite(self, what: str, n_samples: int) -> None:
        """Skip the batch or raise."""
        if not self._skip:
            self._invalid = what
            raise NonFiniteError(f"{what}; look for overflow in the model, or pass on_nonfinite='skip'")
        for staged in (self._staged, self._staged_gradient):
            if staged is not None:
                staged.clear()
        self.n_skipped += n_samples
        logger.warning("left out a batch of %d samples: %s", n_samples, what)

    def _spare_leaves(self, losses: Tensor) -> None:
        """Give leaves outside of the model (parameters of the loss, inputs) their gradients back in the end."""
        own = {id(p) for p in (*self.parameters.values(), *self._usable().interception.leaves)}
        for leaf in leaves(losses):
            if id(leaf) not in own and not isinstance(leaf, Derived):
                self._undo.by(setattr, [leaf], ["grad"], [leaf.grad])
                leaf.grad = None

    def _log_slow(self) -> None:
        """Name the parameters that no fast rule serves, once."""
        slow = [n for n, rules in zip(self.parameters, self._accumulators.rules, strict=True) if rules & SLOW_RULES]
        if slow:
            shown = ", ".join(slow[:6]) + (f" and {len(slow) - 6} more" if len(slow) > 6 else "")
            logger.info("served by the exact per-sample path (slower): %s", shown)
