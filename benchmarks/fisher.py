"""A Fisher pass against the unit: one ordinary ``forward + loss.mean().backward()`` of the same batch."""

from __future__ import annotations

import copy
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import wplfast
from wplfast.losses import cross_entropy

from .plumbing.parts import Cases, WrongCaseError
from .plumbing.progress import progress
from .roofs import tf32
from .timing import Budget, Contender, Quartiles, measure, quartiles, ratio
from .ways import WrongResultError
from .workloads import KNOWN, Batch, Loss, Workload

TOLERANCE = 1e-4  # fp32 against a float64 loop, relative to a parameter's largest entry
WHOLE_EXTRA = 0.05  # units that a whole call may cost beyond its passes
LOOPS = 2.0  # lower precisions: the whole model's error over that of a one-sample loop of the same precision
#: What is measured on a GPU, what matters most first: the record is of as many as there is time for.
ORDER = ("gpt2", "mlp", "resnet50", "lstm", "decoder", "cnn", "gpt2_untied", "cell", "gpt2_autocast", "resnet50_fp32")
ORDER += ("rnn", "tied", "resnet50_tf32")


class Subject:
    """A model that is watched, a copy of it for the units, and batches.

    Args:
        model: where it is to run.
        batches: there too.
        loss_fn: from outputs and targets, one loss per sample.
        name: for messages.
        precision: "fp32", or a lower one: see :class:`Workload`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_fn: Loss = cross_entropy,
        name: str = "",
        precision: str = "fp32",
    ) -> None:
        self.watched, self.batches, self.loss_fn, self.name, self.precision = model, batches, loss_fn, name, precision
        self.batch, self.ordinary = batches[0], copy.deepcopy(model)  # a pass may be open on the other one
        self.wrong, self.errors = "", {}  # what `steady` finds, with the report of the last pass

    @property
    def error(self) -> float:
        """The error of the worst parameter."""
        return self.errors["fisher"]["largest"]

    def clear(self) -> None:
        """Set the copy's gradients to None."""
        self.ordinary.zero_grad(set_to_none=True)

    def unit(self, batch: Batch | None = None) -> None:
        """Run one unit."""
        x, y = batch or self.batch
        self.loss_fn(self.ordinary(x), y).mean().backward()

    def losses(self) -> Tensor:
        """Run the watched model."""
        return self.loss_fn(self.watched(self.batch[0]), self.batch[1])

    def units(self, n: int) -> None:
        """Run units over several batches."""
        for batch in self.batches[:n]:
            self.clear()
            self.unit(batch)

    def whole(self, n: int) -> None:
        """Run ``fisher_diagonal`` over several batches."""
        self.report = wplfast.fisher_diagonal(self.watched, self.batches[:n], self.loss_fn).report

    def oracle(self) -> dict[str, Tensor]:
        """Return the mean of squared per-sample gradients: float64, one sample at a time."""
        return self.one_by_one(copy.deepcopy(self.ordinary).double(), torch.float64)

    def one_by_one(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return it as a loop over samples computes it in a model's precision; squared and summed in ``dtype``."""
        x, y = self.batch
        x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
        total = {name: torch.zeros_like(p, dtype=dtype) for name, p in model.named_parameters()}
        for one, target in zip(x.split(1), y.split(1), strict=True):
            gradients = torch.autograd.grad(self.loss_fn(model(one), target).sum(), [*model.parameters()])
            for square, gradient in zip(total.values(), gradients, strict=True):
                square += gradient.to(dtype).square_()
        return {name: square / len(y) for name, square in total.items()}

    def judge(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Keep the errors of a Fisher, and what is wrong with them: in lower precisions, beside those of a loop."""
        self.errors, self.wrong, limit = {"fisher": errors_of(found, expected)}, "", TOLERANCE
        error = self.error
        if self.precision != "fp32":
            self.errors["loop"] = errors_of(self.one_by_one(self.ordinary), expected)
            error, limit = self.errors["fisher"]["whole"], LOOPS * self.errors["loop"]["whole"]
        if not error <= limit:
            self.wrong = f"{self.name}: relative error {error:.2g} against float64, expected <= {limit:.2g}"


def subject_of(workload: Workload, device: torch.device, quick: bool, seed: int = 0) -> Subject:
    """Return a workload's model and batches on a device."""
    torch.manual_seed(seed)
    model = workload.model(quick).to(device)
    generator, count = torch.Generator().manual_seed(seed), min(4, workload.batches) if quick else workload.batches
    batches = [tuple(part.to(device) for part in workload.batch(quick, generator)) for _ in range(count)]
    return Subject(model, batches, cross_entropy, workload.name, workload.precision)


def errors_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return errors: of the worst parameter relative to its largest entry, of the whole model relative to its norm.

    Raises:
        ValueError: if shapes differ.
    """
    worst, off, norm = 0.0, 0.0, 0.0
    for name, e in expected.items():
        if found[name].shape != e.shape:
            raise ValueError(f"expected a Fisher of shape {list(e.shape)}, got {list(found[name].shape)}")
        difference = found[name].double() - e
        worst = max(worst, (difference.abs().max() / e.abs().max()).nan_to_num(torch.inf).item())
        off, norm = off + difference.square().sum().item(), norm + e.double().square().sum().item()
    return {"largest": worst, "whole": (off / norm) ** 0.5}


@contextmanager
def steady(subject: Subject, strict: bool = True) -> Iterator[Callable[[], None]]:
    """Open an accumulator, verify its first and second batch against float64, and yield the steady pass.

    Raises:
        WrongResultError: if the Fisher is wrong and ``strict``.
    """
    expected = subject.oracle()
    with wplfast.FisherAccumulator(subject.watched) as accumulator:
        for _ in range(2):  # the first batch measures and verifies; two that are equal have the mean of one
            accumulator.backward(subject.losses())
        found = accumulator.result()
        subject.judge(found, expected)
        subject.report = found.report
        if strict and subject.wrong:
            raise WrongResultError(subject.wrong)
        del expected, found
        yield lambda: accumulator.backward(subject.losses())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that a call holds beyond those that it found."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what PyTorch's profiler writes to stderr from C++, such as a warning about blocks older than itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def memory(subject: Subject, fisher_pass: Callable[[], None], device: torch.device) -> dict[str, int]:
    """Return peak memory beyond the model: a unit, a steady pass with its accumulators, one Fisher."""
    subject.clear()
    one_fisher = sum(p.numel() * max(4, p.element_size()) for p in subject.ordinary.parameters())
    unit = peak_bytes(subject.unit, device)
    subject.clear()
    return {"unit": unit, "fisher_pass": peak_bytes(fisher_pass, device) + one_fisher, "one_fisher": one_fisher}


def timed(subject: Subject, fisher_pass: Callable[[], object], budget: Budget, n: int = 1) -> dict[str, Any]:
    """Time a pass beside ``n`` units, interleaved, and summarise both and the ratio of the first to the second."""
    runs = {"unit": subject.unit if n == 1 else lambda: subject.units(n), "fisher": fisher_pass}
    return summary(budget.time({name: Contender(run, subject.clear) for name, run in runs.items()}))


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Summarise the seconds of "unit" and "fisher" by round, and their ratios."""
    return {
        "pairs": len(times["unit"]),
        "milliseconds": {name: quartiles(taken, 1e3) for name, taken in times.items()},
        "ratio": ratio(times["fisher"], times["unit"]),
    }


def measure_workload(workload: Workload, budget: Budget, seed: int = 0, strict: bool = True) -> dict:
    """Check and time one workload; return its record. Where not ``strict``, a wrong result is timed all the same."""
    device = budget.device
    with tf32(workload.precision == "tf32"):
        subject = subject_of(workload, device, budget.quick, seed)
        with FlopCounterMode(display=False) as flops:
            subject.unit()
        with steady(subject, strict) as fisher_pass:
            found = timed(subject, fisher_pass, budget)
            peaks = memory(subject, fisher_pass, device)
        whole = whole_calls(subject, found["milliseconds"], budget)
        peaks["fisher_diagonal"] = peak_bytes(lambda: subject.whole(min(2, len(subject.batches))), device)
    return {
        "workload": workload.name,
        "shown": workload.shown,
        "precision": workload.precision,
        "parameters": sum(p.numel() for p in subject.ordinary.parameters()),
        "rules": dict(Counter(rule for served in subject.report.rules.values() for rule in served)),
        "slow": list(subject.report.slow),  # parameters that no fast rule served
        "relative_error": subject.error,
        "errors": subject.errors,
        "right": not subject.wrong,
        "unit_flops": flops.get_total_flops(),
        **found,
        "target": workload.target,
        "whole": whole | {"target": workload.target + WHOLE_EXTRA},
        "peak_bytes": peaks,
    }


def whole_calls(subject: Subject, steady_ms: Mapping[str, Quartiles], budget: Budget) -> dict[str, Any]:
    """Time ``fisher_diagonal`` over all batches and as many units; over fewer batches where there is no time for all.

    What more batches would have cost is then projected from the steady passes that were timed before.
    """
    unit, fisher = (steady_ms[name]["median"] / 1e3 for name in ("unit", "fisher"))
    first = measure(Contender(lambda: subject.whole(1), subject.clear), 1, budget.device)
    of = len(subject.batches)
    n = min(of, max(2, int((budget.seconds / 3 - first) / (unit + fisher))))
    rounds = max(3, min(11, int(budget.seconds / (first + n * (unit + fisher)))))
    longer = replace(budget, rounds=rounds, seconds=2 * budget.seconds)
    found = timed(subject, lambda: subject.whole(n), longer, n)
    units, call = (found["milliseconds"][name]["median"] / 1e3 for name in ("unit", "fisher"))
    projected = (call + (of - n) * fisher) / (units + (of - n) * unit)
    return {"batches": n, "of": of, "capped": n < of, **found, "projected_ratio": projected}


def run(budget: Budget, names: Sequence[str], batches: int | None = None) -> list[dict]:
    """Measure the named workloads; ``batches``: of a whole call, in place of the workload's."""
    chosen = [KNOWN[name] if batches is None else replace(KNOWN[name], batches=batches) for name in names]
    return [measure_workload(workload, budget) for workload in progress(chosen, "fisher")]


def case(device: torch.device, quick: bool, name: str) -> dict:
    """Measure one workload with weights and inputs that no run before had."""
    seed = int.from_bytes(os.urandom(4), "little")
    budget = Budget(device, 4, 0.2, True) if quick else Budget(device, 40, 3.0)
    record = {"seed": seed, **measure_workload(KNOWN[name], budget, seed, strict=False)}
    if not record["right"]:
        raise WrongCaseError(f"{name}: {record['errors']}", record)
    return record


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured on a GPU."""
    return {name: partial(case, device, quick, name) for name in ORDER}
