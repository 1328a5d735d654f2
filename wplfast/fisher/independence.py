"""Does a sample's loss depend on the other samples of its batch? The definition of per-sample, tested.

Gradients in a batch cannot show what is done to raw inputs before a parameter sees them: statistics over the batch,
positions counted up to the longest sample. So the model runs on parts of the batch as well: the last sample in a batch
of its own (its gradients are compared later, too), and two parts that have no sample in common. Where a loss differs,
that alone proves nothing: the batch may have been cut where no samples lie, or random numbers drawn. A refusal needs
more: the batch runs again and gives the same losses, and the loss in question changes when all other samples become
copies of its own, at their places in a batch of the same size. Otherwise the finding is that nothing can be told.

The batch of its own holds the sample twice: some models refuse a single sample, and PyTorch itself errs there (2.13,
CPU: the backward pass of ``batch_norm`` in eval mode, for N = 1 and gradients of some strides, by more than 100%).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, repeat
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..capture.call import random_state, set_random_state
from ..capture.collect.batch import SingleSample
from ..capture.probe.graph import leaves
from ..capture.rules.projection import Directions
from ..capture.undo import Undo
from ..distributed.agreement import is_distributed
from .batches import Batch
from .cutting import Cut, Parts
from .preserve import Rewound, Snapshot

#: Largest relative difference that rounding may make between batches of other sizes: in float64; in float32, in which
#: GPUs, or CPUs that are told to, multiply with fewer bits; in half precision.
DOUBLE, SINGLE, SHORT, HALF = 1e-6, 1e-4, 1e-3, 5e-2

#: How much larger a difference must be that no other sample's data explain, to be more than what rounding comes to in
#: sums that nearly cancel.
AMPLIFIED = 100

#: Losses below this are rounding noise, with which nothing can be compared.
SMALLEST = 1e-6

#: Why a part of the batch may have been misread.
TAKEN_FOR_A_TABLE = (
    "an input as long as the batch was taken for one that all samples share (a mask, a table), since losses are others "
    "where it is cut; a batch of another size would tell"
)


#: What a table is that labels choose a row of for each sample, by its number in the batch.
IN_BATCH = (
    "the labels number the samples of their batch, and each loss depends on the inputs of the others (in-batch "
    "negatives): no sample has a loss of its own"
)


@dataclass(frozen=True)
class Findings:
    """What one batch told.

    Attributes:
        independent: whether a sample's loss is the same whatever the other samples are; None: cannot be told.
        single_sample: the gradients of the last sample in a batch of its own.
        coupled: how samples are coupled, if they are.
        unchecked: why something could not be checked, if there was reason to.
    """

    independent: bool | None = None
    single_sample: SingleSample | None = None
    coupled: str = ""
    unchecked: str = ""


class Examination:
    """Runs a model on parts of batches, outside of the pass: modules, gradients and random numbers stay as they are.

    Args:
        model: the module, in eval mode.
        loss_fn: the per-sample loss.
        parameters: the watched parameters.
        directions: what their gradients are projected on.
        device: of the model.

    Attributes:
        half: the losses were computed in a wider type than they will be here, and may differ as in half precision.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        parameters: Sequence[Tensor],
        directions: Directions,
        device: torch.device,
    ) -> None:
        self._model, self._loss_fn, self._device = model, loss_fn, device
        self._parameters, self._directions = parameters, directions
        self._n_batches, self.half = 0, False
        self._tables: dict[int, int] = {}  # parts as long as a batch of so many that were taken for shared; along which
        self._n_then = 0
        self._own: set[int] = set()  # such parts whose lengths follow the batch's

    def has_more_to_ask(self, batch: Batch, targets: Any, n_samples: int) -> bool:
        """Tell whether a batch shows that what was taken for a table is as long as every batch, and so is none."""
        if not self._tables or n_samples in (1, self._n_then):
            return False
        parts = Parts(batch.inputs, targets, n_samples)
        self._own = {position for position, dim in self._tables.items() if parts.has_size(position, dim)}
        self._tables = {}
        return bool(self._own)

    def examine(
        self, batch: Batch, targets: Any, losses: Tensor, before: Snapshot, random: Tensor, refusing: bool = True
    ) -> Findings:
        """Examine one batch.

        Args:
            batch: the batch.
            targets: its targets, given or drawn.
            losses: its losses, [N].
            before: what the modules were like before the model ran on it.
            random: the state of the device's generator then.
            refusing: look for the reason where a loss differs; otherwise the user says that samples are independent.
        """
        expected = losses.detach()
        if len(losses) < 2 or not bool(torch.isfinite(expected).all()):
            return Findings()
        if not bool(expected.abs().mean() + expected[-1].abs() > SMALLEST):
            return Findings()
        self._n_batches += 1
        now = random_state(self._device)
        rewound = Rewound(before)
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), rewound:
            try:
                return self._examine(_Trial(self, batch, targets, expected, rewound.rewind, random), refusing)
            finally:
                set_random_state(self._device, now)

    def _examine(self, trial: _Trial, refusing: bool) -> Findings:
        """Run the parts, and look closer where a loss differs."""
        n_samples = len(trial.expected)
        last = _alone(n_samples - 1, n_samples)
        parts = [part for part in self._parts(trial) if part != last]  # which would be the same run again
        differing: int | None = None  # a sample whose loss differed in the likeliest of the cuts that ran
        unsure: Cut | None = None  # the likeliest cut whose losses are the same as far as it ran
        likeliest: Cut | None = None
        for cut in trial.parts.cuts(self._own):
            likeliest = likeliest or cut
            single = trial.run(cut, last)
            if single is None:
                continue
            sample, ran = trial.differing(single, last), True
            for part in parts:
                if sample is None:
                    others = trial.run(cut, part)
                    ran = ran and others is not None
                    sample = None if others is None else trial.differing(others, part)
            if sample is None and ran:
                self._tables, self._n_then = _spared(cut, likeliest), n_samples
                if self._tables and refusing and trial.are_labels_places(likeliest):
                    return Findings(False, coupled=IN_BATCH)
                note = TAKEN_FOR_A_TABLE if self._tables else ""
                return Findings(True, self._gradients(trial, single), unchecked=note)
            if sample is None:  # a table that all samples share may have been cut: another cut may do for all parts
                unsure = unsure or cut
            else:
                differing = sample if differing is None else differing
        if unsure is not None and (single := trial.run(unsure, last)) is not None:
            return Findings(True, self._gradients(trial, single))
        if not refusing:
            return Findings(True)
        return self._diagnose(trial, differing)

    def _diagnose(self, trial: _Trial, differing: int | None) -> Findings:
        """Tell why no cut gave the same losses: find proof, or say that there is none."""
        cuts = list(trial.parts.cuts(self._own))
        if not cuts:
            return Findings(unchecked="no tensor of a batch has its size along dimension 0 or 1")
        n_samples = len(trial.expected)
        last, whole = _alone(n_samples - 1, n_samples), [cut for cut in cuts if None not in _used(cut, cuts[0])]
        for cut in whole:
            spared = trial.shared(cut)
            single = None if spared is None else trial.run(spared, last)
            if single is not None and trial.differing(single, last) is None:
                return Findings(True, self._gradients(trial, single))
        draws = _Draws()  # type: ignore[no-untyped-call]
        everything = list(range(n_samples))
        with draws:
            again = trial.run(None, everything)
        if again is None or trial.differing(again, everything) is not None:
            return Findings(
                unchecked="its losses are others when the same batch runs again (random numbers, or state outside of "
                "the model's modules)"
            )
        sample = everything[-1] if differing is None else differing
        verdicts = {trial.exchange(cut, sample) for cut in whole}
        if "unchanged" in verdicts:
            # What enters all losses leaves its own as it is.
            verdicts = {trial.exchange(cut, everything[-1] if sample == 0 else 0) for cut in whole}
        if "unchanged" in verdicts:
            if not any(map(trial.parts.are_inputs_cut, whole)):
                return Findings(unchecked="the model does not run on a part of a batch")
            for cut in whole:
                single = trial.run(cut, last)
                if single is not None and trial.differing(single, last, AMPLIFIED) is None:
                    return Findings(True, self._gradients(trial, single))
            return self._of_another_size(trial, sample, draws.found)
        if differing is None:
            is_proven = "equal" in verdicts and all(trial.exchange(cut, sample) != "unchanged" for cut in cuts)
        else:
            is_proven = "equal" in verdicts or (trial.parts.are_plain(cuts[0]) and not draws.found)
        if is_proven:
            return Findings(
                False,
                coupled=f"the loss of sample {sample} is another one in a batch of its own, and where other samples "
                "of its batch are others: samples are coupled, though not through a parameter's output (statistics of "
                "the inputs over the batch?)",
            )
        what = "the model does not run on a part of a batch" if differing is None else "a batch cannot be cut"
        return Findings(unchecked=f"{what}, or not along its samples")

    def _of_another_size(self, trial: _Trial, sample: int, drew: bool) -> Findings:
        """Tell why a sample that does not depend on the others has another loss in a part of the batch."""
        if drew:
            return Findings(True, unchecked="random numbers are drawn: samples alone get others")
        n_samples = len(trial.expected)
        start = list(range(n_samples // 2)) if n_samples > 3 else list(reversed(range(n_samples)))
        runs = [run for cut in trial.parts.cuts() if (run := trial.run(cut, start)) is not None]
        if not runs:
            return Findings(True, unchecked="the model does not run on a part of a batch")
        is_same = any(trial.differing(run, start) is None for run in runs)
        if is_same == (n_samples > 3):  # at the same places in a smaller batch, or else at others in as large a one
            return Findings(True, unchecked="a sample's loss depends on its place in the batch")
        return Findings(
            False,
            coupled=f"the loss of sample {sample} is another one in a batch of its own, though not where the other "
            "samples are others: give each sample's own loss (is it divided by the size of the batch?)",
        )

    def _parts(self, trial: _Trial) -> list[list[int]]:
        """Choose parts to run beside the last sample alone: two others, and half of a small batch or an eighth.

        What one sample does to all others shows where the last one runs alone, or in those two. What several do to the
        rest, such as those that reach a maximum, shows in the two that are least likely to be among them.
        """
        n_samples = len(trial.expected)
        if n_samples == 2:
            return [_alone(0, 2)]
        cut = next(iter(trial.parts.cuts(self._own)), None)
        faintest = [0, 1] if cut is None else trial.parts.faintest(cut)
        generator = torch.Generator().manual_seed(self._n_batches)
        order = torch.randperm(n_samples, generator=generator, device="cpu").tolist()
        count = min(n_samples // 2, max(8, n_samples // 8))
        some = sorted([sample for sample in order if sample not in faintest][:count])
        return [faintest, some if len(some) > 1 else _alone(some[0], n_samples)]

    def _gradients(self, trial: _Trial, losses: Tensor) -> SingleSample:
        """Run the backward pass of the last sample, which is all that a batch holds; keep projections alone."""
        found: dict[int, Tensor] = {}

        def arrived(index: int, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._directions.add(found, index, gradient)

        with _GradsApart(self._parameters, leaves(losses), arrived):
            if losses.requires_grad:
                self._backward(losses.sum(), found)
            for index, parameter in enumerate(self._parameters):
                arrived(index, parameter)  # what a Function added by itself
        return SingleSample(len(trial.expected) - 1, {index: total / len(losses) for index, total in found.items()})

    def _backward(self, total: Tensor, found: dict[int, Tensor]) -> None:
        """Run a backward pass down to the parameters; what does not accumulate is projected into ``found``.

        DistributedDataParallel hooks into accumulation where no hook of Python reaches, and would take these gradients
        for those of a forward pass of its own that has not run backward yet: there, none are accumulated.
        """
        if not is_distributed():
            total.backward()
            return

        def captured(index: int, gradient: Tensor) -> Tensor:
            self._directions.add(found, index, gradient)
            return gradient.new_zeros(()).expand_as(gradient)  # all are kept until the end

        hooks = [p.register_hook(partial(captured, index)) for index, p in enumerate(self._parameters)]
        try:
            torch.autograd.grad(total, self._parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            found.clear()  # a reentrant checkpoint accumulates, whatever is asked for
            for hook in hooks:
                hook.remove()
            total.backward()


class _Trial:
    """One batch, its losses, and ways to run parts of it."""

    def __init__(
        self,
        examination: Examination,
        batch: Batch,
        targets: Any,
        expected: Tensor,
        rewind: Callable[[], None],
        random: Tensor,
    ) -> None:
        """See :meth:`Examination.examine`."""
        self._of, self._batch, self._targets = examination, batch, targets
        self.expected, self._rewind, self._random = expected, rewind, random
        self.parts = Parts(batch.inputs, targets, len(expected))
        tensors = (expected, *examination._model.parameters())
        half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
        half = half or examination.half or torch.is_autocast_enabled(expected.device.type)
        full = expected.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        single = SINGLE if full else SHORT
        self._tolerance = HALF if half else DOUBLE if expected.dtype == torch.float64 else single

    def run(self, cut: Cut | None, samples: Sequence[int]) -> Tensor | None:
        """Return the losses of some samples, in a batch of their own; None if the model does not run on them.

        Args:
            cut: where samples lie; None: the batch as it is.
            samples: which.
        """
        of = self._of
        self._rewind()
        set_random_state(of._device, self._random)
        try:
            inputs, targets = (self._batch.inputs, self._targets) if cut is None else self.parts.take(cut, samples)
            losses = of._loss_fn(Batch(inputs, targets, None).forward(of._model), targets)
        except (MemoryError, TimeoutError, torch.OutOfMemoryError):
            raise
        except Exception:  # the model's own: it does not take so many samples, or was cut along the wrong dimension
            return None
        return losses if isinstance(losses, Tensor) and losses.shape == (len(samples),) else None

    def differing(self, losses: Tensor, samples: Sequence[int], amplified: float = 1) -> int | None:
        """Return the sample whose loss differs most from that in the batch; None if all are the same.

        Args:
            losses: of samples.
            samples: which.
            amplified: by how much larger differences count as none.
        """
        expected, tolerance = self.expected[list(samples)], min(amplified * self._tolerance, 0.1)
        excess = (losses.detach() - expected).abs() - tolerance * (self.expected.abs().mean() + expected.abs())
        worst = int(excess.nan_to_num(nan=torch.inf).argmax())
        return None if bool(excess[worst] <= 0) else samples[worst]

    def exchange(self, cut: Cut, sample: int) -> Literal["unchanged", "equal", "unequal"]:
        """Make all samples copies of one, at their places in a batch of the same size.

        Returns:
            Whether that one's loss is unchanged; if not, whether all losses are equal, as those of copies mostly are
            where the cut is along samples, whatever these do to each other.
        """
        samples = [sample] * len(self.expected)
        losses = self.run(cut, samples)
        if losses is None:
            return "unequal"
        if self.differing(losses[sample : sample + 1], [sample]) is None:
            return "unchanged"
        spread, level = (losses.amax() - losses.amin()).abs(), losses.abs().mean() + self.expected.abs().mean()
        return "equal" if bool(spread <= self._tolerance * level) else "unequal"

    def are_labels_places(self, whole: Cut) -> bool:
        """Tell whether labels number the samples, and losses move with them where labels stay."""
        numbers, turned = self.parts.numbers_of_samples(), [*range(1, len(self.expected)), 0]
        if not numbers:
            return False
        losses = self.run(Parts.sparing(whole, numbers), turned)
        return losses is not None and self.differing(losses, turned) is None

    def shared(self, whole: Cut) -> Cut | None:
        """Return a cut that spares all parts that other samples' losses depend on; None if fewer than two do.

        Such are the support set of an episode (inputs and labels), or several tables.
        """
        half = len(self.expected) // 2
        first, second = list(range(half)), list(range(half, len(self.expected)))
        found = set()
        for position in [i for i, dim in enumerate(whole) if dim is not None]:
            only = Parts.sparing(whole, set(range(len(whole))) - {position})
            for turned, (kept, others) in product((0, 1), ((first, second), (second, first))):
                copies = [kept[(i + turned) % len(kept)] for i in range(len(others))]
                losses = self.run(only, kept + copies if kept is first else copies + kept)
                if losses is not None and self.differing(losses[kept], kept) is not None:
                    found.add(position)
        cut = Parts.sparing(whole, found)
        return cut if len(found) > 1 and self.parts.is_possible(cut) else None


class _Draws(TorchDispatchMode):
    """Notices random numbers, whatever generator they are from."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operator's tags."""
        self.found = self.found or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _alone(sample: int, n_samples: int) -> list[int]:
    """Return a sample several times, though not so many as the batch has samples."""
    return [sample] * (2 if n_samples > 2 else 3)


def _spared(cut: Cut, whole: Cut) -> dict[int, int]:
    """Return the parts that a cut leaves whole though the likeliest does not, and along which dimension that does."""
    pairs = enumerate(zip(cut, whole, strict=True))
    return {i: other for i, (dim, other) in pairs if dim is None and other is not None}


def _used(cut: Cut, whole: Cut) -> set[int | None]:
    """Return the dimensions that a cut has for the parts that can be cut."""
    return {dim for dim, possible in zip(cut, whole, strict=True) if possible is not None}


class _GradsApart(Undo):
    """Let a backward pass leave gradients at leaves, without the users' hooks, and put everything back.

    Args:
        parameters: those whose gradients are wanted.
        leaves: others that gradients may arrive at.
        arrived: called with a parameter's index and the parameter, when its gradient is there.
    """

    def __init__(
        self, parameters: Sequence[Any], leaves: Sequence[Any], arrived: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__(is_inner=True)
        self._parameters, self._tensors, self._arrived = parameters, [*parameters, *leaves], arrived

    def change(self) -> None:
        """Take gradients and hooks away."""
        tensors = self._tensors
        self.by(setattr, tensors, repeat("grad"), [t.grad for t in tensors])
        hooked = [t for t in tensors if t._backward_hooks is not None]
        self.by(setattr, tensors, repeat("_backward_hooks"), [t._backward_hooks for t in tensors])
        followed = [t for t in tensors if t._post_accumulate_grad_hooks is not None]
        after = [t._post_accumulate_grad_hooks for t in followed]
        self.by(setattr, followed, repeat("_post_accumulate_grad_hooks"), after)
        for tensor in tensors:
            tensor.grad = None
        for tensor in hooked:
            tensor._backward_hooks = None
        for tensor in (*followed, *self._parameters):
            tensor._post_accumulate_grad_hooks = OrderedDict()  # None would leave those that are there
        self.by(partial.__call__, [partial(p._post_accumulate_grad_hooks.clear) for p in self._parameters])
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))
