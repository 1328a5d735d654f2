"""Ranks in lockstep: every forward and every backward pass of an FSDP2 model is one of all ranks.

FSDP2 gathers parameters in each of them, so that a rank which ran one more or one fewer would leave the others waiting.
What a batch takes differs from rank to rank, though: one has no data left, another measures a new size, a third takes a
parameter one sample at a time. So ranks say what they need before they do it, in one small collective, and those that
need nothing run a pass for company, whose gradients nobody collects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..capture.call_site import Listener, TappedCall
from ..capture.collect.passes import CollectPass
from ..capture.collect.session import Session
from ..capture.collect.steady import SteadyBatch
from ..capture.trace.nested import current_task
from ..capture.watched import map_tensors, tensors_in
from ..errors import RankFailedError, WplfastError
from .agreement import Agreement
from .blocks import Block

logger = logging.getLogger(__name__)


class Need(Enum):
    """What a rank is about to do."""

    FORWARD = auto()
    BACKWARD = auto()
    NOTHING = auto()


class _Said(NamedTuple):
    """What a rank says before a pass."""

    need: Need
    collects: bool = False  # squares are added in it
    keep: bool = False  # another pass over the same graph may follow
    waiting: tuple[bool, ...] = ()  # for each block: squares wait to be reduced


class PassAgreement(Agreement):
    """An agreement in which a rank may fail inside of a pass too, where the others wait for what FSDP2 gathers.

    It cannot meet them there: it leaves word in the store. They find it as soon as the group's connections end, with
    the process that failed, and not later than the group's timeout.

    Attributes:
        is_inside: a pass of all ranks is going on.
    """

    is_inside = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others of an error that leaves."""
        if error is None or not self.is_inside:
            super().__exit__(kind, error, traceback)
            return
        self._ended = True
        self._look(error)
        text = f"rank {self.rank} failed inside of the model with {type(error).__name__}: {error}"
        logger.error("%s, which ends %s on all ranks", text, self._what)
        self._store.set(self._word, text)

    def exchange(self, value: Any) -> list[Any]:
        """Return what all ranks say; see the base class."""
        try:
            return super().exchange(value)
        except RankFailedError as error:
            self._look(error)
            raise

    def _look(self, error: BaseException) -> None:
        """Raise with what another rank left word of, if one did."""
        try:
            text = self._store.get(self._word).decode() if self._store.check([self._word]) else ""
        except RuntimeError:  # the store is gone
            return
        if text:
            raise RankFailedError(f"{self._what} ended: {text}") from error

    @property
    def _word(self) -> str:
        """The key under which word is left."""
        return f"{self._alarm}/inside"


class Company:
    """Listens to a pass that runs for the sake of other ranks."""

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Let gradients pass."""
        return tapped.nothing


class Lockstep:
    """What the passes of all ranks have in common in one batch.

    Args:
        agreement: of all ranks.
        blocks: of the model.

    Attributes:
        rehearses: squares of this batch are dropped: it runs to learn how the model's calls are to be collected.
        keeps_totals: sums of squares are looked at when the batch is verified.
        is_spoilt: collecting ended early, since a gradient of this rank is NaN or infinite.
        losses: of this rank's forward pass; passes for company run over their graph.
        forward: runs the model on this rank's batch, for company.
        session: runs backward passes.
    """

    def __init__(self, agreement: PassAgreement, blocks: Sequence[Block]) -> None:
        self.agreement, self._blocks = agreement, blocks
        self.rehearses, self.keeps_totals, self.is_spoilt = False, False, False
        self.losses: Tensor | None = None
        self.forward: Callable[[], object] | None = None
        self.session: LockstepSession | None = None
        self._pending: Callable[[], None] | None = None
        self._collects = False  # the pass that runs adds squares, on some rank

    def start_batch(self, rehearses: bool, keeps_totals: bool, forward: Callable[[], object]) -> None:
        """Begin a batch of all ranks."""
        self.rehearses, self.keeps_totals, self.forward, self.losses = rehearses, keeps_totals, forward, None
        self.is_spoilt = False
        for block in self._blocks:
            block.totals.zero_()

    # ---- what a rank needs -----------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """Let all ranks run another forward pass."""
        for block in self._blocks if self.rehearses else ():
            block.close()  # of an attempt that is made again
        self._exchange(_Said(Need.FORWARD))

    def before_backward(self, collects: bool, keep: bool) -> bool:
        """Let all ranks run a backward pass; return whether the graph is to be kept.

        Args:
            collects: squares are added.
            keep: this rank may run another one over the same graph.
        """
        while True:
            said = self._exchange(_Said(Need.BACKWARD, collects, keep))
            if not any(other.need is Need.FORWARD for other in said):
                break
            self._accompany_forward()
        return self._agreed(said)

    def end_batch(self) -> None:
        """Accompany ranks that need more passes, then add the squares of all ranks to their shards."""
        while True:
            said = self._exchange(_Said(Need.NOTHING, waiting=tuple(block.is_open for block in self._blocks)))
            if any(other.need is Need.FORWARD for other in said):
                self._accompany_forward()
            elif any(other.need is Need.BACKWARD for other in said):
                self._accompany_backward(self._agreed(said))
            else:
                break
        self._collects = False
        for index, block in enumerate(self._blocks):
            if any(other.waiting[index] for other in said):
                self._reduce(block)
        self._end_reduction()
        self.losses = self.forward = None

    def passed(self, block: Block) -> None:
        """Hear that the backward pass is through with a block."""
        if self._collects:
            self._reduce(block)

    # ---- in common -------------------------------------------------------------------------------------------------

    def _exchange(self, own: _Said) -> list[_Said]:
        """Tell the others, and hear of them."""
        return self.agreement.exchange(own)

    def _agreed(self, said: Sequence[_Said]) -> bool:
        """Note whether the backward pass that follows adds squares anywhere; return whether graphs are kept."""
        self._collects = any(other.collects for other in said)
        return any(other.keep for other in said)

    def _reduce(self, block: Block) -> None:
        """Add a block's squares to its shards, or drop them in a rehearsal."""
        if self.keeps_totals:
            block.note_totals()
        if self.rehearses:
            block.close()
        else:
            self._end_reduction()
            self._pending = block.reduce()

    def _end_reduction(self) -> None:
        """Wait for the block that was reduced last, which ran beside the backward pass of the next one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()

    def _accompany_forward(self) -> None:
        """Run a forward pass that counts for nothing."""
        assert self.forward is not None
        self.forward()

    def _accompany_backward(self, keep: bool) -> None:
        """Run a backward pass that counts for nothing."""
        if self.losses is None or not self.losses.requires_grad:
            raise WplfastError(
                "the losses of this rank's batch do not depend on the parameters, as those of another rank's do: FSDP2 "
                "gathers parameters in every backward pass, so that all ranks need one; leave such batches out"
            )
        assert self.session is not None
        self.session.accompany(self.losses, Company(), keep)


class LockstepSession(Session):
    """A session whose backward passes are those of all ranks."""

    lockstep: Lockstep

    def run(self, losses: Tensor, weights: Tensor | None, listener: Listener, keep: bool) -> None:
        """Run one backward pass as soon as all ranks run one."""
        collects = isinstance(listener, SteadyBatch) or (isinstance(listener, CollectPass) and not listener.is_dry)
        guard = _Guard(listener)
        keep = self.lockstep.before_backward(collects, keep)
        self.lockstep.agreement.is_inside = True
        super().run(losses, weights, guard, keep)
        self.lockstep.agreement.is_inside = False
        if guard.error is not None:
            self.lockstep.is_spoilt = True
            raise guard.error

    def accompany(self, losses: Tensor, listener: Listener, keep: bool) -> None:
        """Run one backward pass that nobody here needs."""
        self.lockstep.agreement.is_inside = True
        super().run(losses, None, listener, keep)
        self.lockstep.agreement.is_inside = False
        self.accumulators.n_passes -= 1
        self.leaf_grads.drop()


class _Guard:
    """Lets a pass go on to its end after an error of what listens to it, as other ranks wait for what it gathers."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.error: BaseException | None = None

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Hand on, unless there was an error."""
        if self.error is None:
            try:
                return self._listener.receive(tapped, inputs, grads)
            except BaseException as error:
                self.error = error
        return tapped.nothing


class Milestones:
    """Tells a lockstep when the backward pass is through with a block: hooks of modules, until :meth:`remove`.

    What a module is called on, the first time in a forward pass, goes through a node of the graph; whatever else the
    block is used for comes before it in the backward pass. A module that is called on nothing which requires grad has
    none, and its block waits for the end of the batch, as FSDP2's own gradients do.

    Args:
        model: whose forward passes begin anew.
        blocks: of it.
        lockstep: is told.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._of: dict[int, list[Block]] = {}
        self._passed: set[int] = set()  # modules that were called in this forward pass
        modules = {}
        for block in blocks:
            if block.module is not None:
                modules[id(block.module)] = block.module
                self._of.setdefault(id(block.module), []).append(block)
        options: Any = {"prepend": True, "with_kwargs": True}
        self._handles = [module.register_forward_pre_hook(self._called, **options) for module in modules.values()]
        self._handles.append(model.register_forward_pre_hook(self._begins, prepend=True))
        self._handles.append(model.register_forward_hook(self._ends))

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()

    def _begins(self, *_: object) -> None:
        """Begin a forward pass."""
        if current_task() == -1:
            self._passed.clear()
            self._lockstep.agreement.is_inside = True

    def _ends(self, *_: object) -> None:
        """End it."""
        if current_task() == -1:
            self._lockstep.agreement.is_inside = False

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Send what a module is called on through a node."""
        if id(module) in self._passed or current_task() != -1 or not torch.is_grad_enabled():
            return None
        self._passed.add(id(module))
        tensors = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        if not tensors:
            return None
        apply: Any = _Milestone.apply
        queue = iter(apply(partial(self._reached, self._of[id(module)]), *tensors))
        return map_tensors(lambda t: next(queue) if t.requires_grad else t, (args, kwargs))

    def _reached(self, blocks: Sequence[Block]) -> None:
        """Tell of a module's blocks."""
        for block in blocks:
            self._lockstep.passed(block)


class _Milestone(torch.autograd.Function):
    """The identity, whose backward pass calls a function."""

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Hand on."""
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Call it, and hand on."""
        ctx.reached()
        return (None, *grads)
