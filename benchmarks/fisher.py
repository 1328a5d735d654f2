"""A Fisher pass against the unit: one ordinary ``forward + loss.mean().backward()`` of the same batch."""

from __future__ import annotations

import copy
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import wplfast
from wplfast.losses import cross_entropy

from .contenders import WrongResultError
from .large import LARGE
from .plumbing.progress import progress
from .roofs import tf32
from .timing import Contender, Spread, interleave, measure, ratio
from .workloads import WORKLOADS, Batch, Workload

TOLERANCE = 1e-4  # fp32 against a float64 loop, relative to a parameter's largest entry
WHOLE_TARGET = 1.10  # for workloads whose pass may cost 1.05 units; others add the same 5%
LOOPS = 2.0  # lower precisions: the whole model's error over that of a one-sample loop of the same precision
KNOWN = WORKLOADS | LARGE


class Model:
    """A workload's model, a copy of it for the units, and batches."""

    def __init__(self, workload: Workload, device: torch.device, quick: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.workload = workload
        self.error, self.wrong, self.errors = float("nan"), "", {}  # what `steady` finds
        self.watched = workload.model(quick).to(device)
        self.ordinary = copy.deepcopy(self.watched)  # a Fisher pass may be open on the other one
        generator, count = torch.Generator().manual_seed(seed), min(4, workload.batches) if quick else workload.batches
        self.batches: list[Batch] = [
            (x.to(device), y.to(device)) for x, y in (workload.batch(quick, generator) for _ in range(count))
        ]

    @property
    def batch(self) -> Batch:
        """The first batch."""
        return self.batches[0]

    def clear(self) -> None:
        """Set the copy's gradients to None."""
        self.ordinary.zero_grad(set_to_none=True)

    def unit(self, batch: Batch | None = None) -> None:
        """Run one unit."""
        x, y = batch or self.batch
        cross_entropy(self.ordinary(x), y).mean().backward()

    def losses(self) -> Tensor:
        """Run the watched model."""
        return cross_entropy(self.watched(self.batch[0]), self.batch[1])

    def units(self, n: int) -> None:
        """Run units over several batches."""
        for batch in self.batches[:n]:
            self.clear()
            self.unit(batch)

    def whole(self, n: int) -> None:
        """Run ``fisher_diagonal`` over several batches."""
        self.report = wplfast.fisher_diagonal(self.watched, self.batches[:n], cross_entropy).report


def oracle(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the mean of squared per-sample gradients: float64, one sample at a time."""
    return one_by_one(copy.deepcopy(model).double(), batch, torch.float64)


def one_by_one(model: nn.Module, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the same as a loop over samples computes it in the model's precision; squared and summed in ``dtype``."""
    x, y = batch
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    total = {name: torch.zeros_like(p, dtype=dtype) for name, p in model.named_parameters()}
    for n in range(len(y)):
        gradients = torch.autograd.grad(cross_entropy(model(x[n : n + 1]), y[n : n + 1]).sum(), [*model.parameters()])
        for square, gradient in zip(total.values(), gradients, strict=True):
            square += gradient.to(dtype).square_()
    return {name: square / len(y) for name, square in total.items()}


def errors_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return errors: of the worst parameter relative to its largest entry, of the whole model relative to its norm."""
    worst, off, norm = 0.0, 0.0, 0.0
    for name, e in expected.items():
        difference = found[name].double() - e
        worst = max(worst, (difference.abs().max() / e.abs().max()).nan_to_num(torch.inf).item())
        off, norm = off + difference.square().sum().item(), norm + e.double().square().sum().item()
    return {"largest": worst, "whole": (off / norm) ** 0.5}


def judge(model: Model, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Leave the errors of a Fisher with the model, and what is wrong with them."""
    name, precision = model.workload.name, model.workload.precision
    model.errors = {"fisher": errors_of(found, expected)}
    model.error = model.errors["fisher"]["largest"]
    if precision == "fp32":
        if not model.error < TOLERANCE:
            model.wrong = f"{name}: relative error {model.error:.2g} against float64, expected < {TOLERANCE}"
        return
    model.errors["loop"] = errors_of(one_by_one(model.ordinary, model.batch, torch.float32), expected)
    ours, loop = (model.errors[k]["whole"] for k in ("fisher", "loop"))
    if not ours <= LOOPS * loop:
        model.wrong = f"{name}: relative error {ours:.2g} against float64, a loop in {precision} has {loop:.2g}"


@contextmanager
def steady(model: Model, strict: bool = True) -> Iterator[Callable[[], None]]:
    """Open an accumulator, verify its first and second batch against float64, and yield the steady pass.

    Raises:
        WrongResultError: if the Fisher is wrong and ``strict``.
    """
    expected = oracle(model.ordinary, model.batch)
    with wplfast.FisherAccumulator(model.watched) as accumulator:
        for _ in range(2):  # the first batch measures and verifies; two the same have the mean of one
            accumulator.backward(model.losses())
        found = accumulator.result()
        judge(model, found, expected)
        if strict and model.wrong:
            raise WrongResultError(model.wrong)
        del expected, found
        yield lambda: accumulator.backward(model.losses())


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


def memory(model: Model, fisher_pass: Callable[[], None], device: torch.device) -> dict[str, int]:
    """Return peak memory beyond the model: a unit, a steady pass with its accumulators, one Fisher."""
    model.clear()
    one_fisher = sum(p.numel() * max(4, p.element_size()) for p in model.ordinary.parameters())
    unit = peak_bytes(model.unit, device)
    model.clear()
    return {"unit": unit, "fisher_pass": peak_bytes(fisher_pass, device) + one_fisher, "one_fisher": one_fisher}


def measure_workload(
    workload: Workload,
    device: torch.device,
    quick: bool,
    rounds: int,
    seconds: float,
    seed: int = 0,
    strict: bool = True,
) -> dict:
    """Check and time one workload; return its record. Where not ``strict``, a wrong result is timed all the same."""
    with tf32(workload.precision == "tf32"):
        return _measure(Model(workload, device, quick, seed), device, rounds, seconds, strict)


def _measure(model: Model, device: torch.device, rounds: int, seconds: float, strict: bool) -> dict:
    """Check and time a model; return its record."""
    workload = model.workload
    unit = Contender(model.unit, model.clear)
    with FlopCounterMode(display=False) as flops:
        model.unit()
    with steady(model, strict) as fisher_pass:
        times = interleave({"unit": unit, "fisher": Contender(fisher_pass, model.clear)}, rounds, seconds, device)
        peaks = memory(model, fisher_pass, device)
    n, n_whole = _affordable(times, model, seconds, device)
    calls = {"units": Contender(lambda: model.units(n)), "call": Contender(lambda: model.whole(n))}
    calls = {name: replace(call, prepare=model.clear) for name, call in calls.items()}
    whole = interleave(calls, n_whole, 2 * seconds, device)
    peaks["fisher_diagonal"] = peak_bytes(lambda: model.whole(2), device)
    rules = Counter(rule for served in model.report.rules.values() for rule in served)
    return {
        "workload": workload.name,
        "shown": workload.shown,
        "precision": workload.precision,
        "parameters": sum(p.numel() for p in model.ordinary.parameters()),
        "rules": dict(sorted(rules.items())),  # how many parameters each rule served
        "slow": list(model.report.slow),  # parameters that no fast rule served
        "relative_error": model.error,
        "errors": model.errors,
        "right": not model.wrong,
        "unit_flops": flops.get_total_flops(),
        "pairs": len(times["unit"]),
        "capped": len(times["unit"]) < rounds,
        "milliseconds": {name: asdict(Spread.of(measured, 1e3)) for name, measured in times.items()},
        "ratio": asdict(ratio(times["fisher"], times["unit"])),
        "target": workload.target,
        "whole": {
            "batches": n,
            "of": len(model.batches),
            "capped": n < len(model.batches),
            "pairs": len(whole["call"]),
            "milliseconds": {name: asdict(Spread.of(measured, 1e3)) for name, measured in whole.items()},
            "ratio": asdict(ratio(whole["call"], whole["units"])),
            "projected_ratio": _projected(times, whole, len(model.batches) - n),
            "target": workload.target + WHOLE_TARGET - 1.05,
        },
        "peak_bytes": peaks,
    }


def _projected(times: dict[str, list[float]], whole: dict[str, list[float]], rest: int) -> float:
    """Return the ratio of whole calls of all batches from those of fewer and ``rest`` steady passes: medians."""
    unit, fisher = (Spread.of(times[name]).median for name in ("unit", "fisher"))
    units, call = (Spread.of(whole[name]).median for name in ("units", "call"))
    return (call + rest * fisher) / (units + rest * unit)


def _affordable(times: dict[str, list[float]], model: Model, seconds: float, device: torch.device) -> tuple[int, int]:
    """Return how many batches a whole call may have, and how many pairs of whole calls to time."""
    first = measure(Contender(lambda: model.whole(1), model.clear), 1, device)
    batch = Spread.of(times["unit"]).median + Spread.of(times["fisher"]).median
    n = max(2, min(len(model.batches), int((seconds / 3 - first) / batch)))
    return n, max(3, min(11, int(seconds / (first + n * batch))))


def run(device: torch.device, names: Sequence[str], quick: bool, rounds: int, seconds: float) -> list[dict]:
    """Measure the named workloads."""
    return [measure_workload(KNOWN[name], device, quick, rounds, seconds) for name in progress(names, "fisher")]


def table(records: Sequence[dict]) -> str:
    """Return a table for people: medians, with quartiles in brackets."""
    ratios = f"{'pass / unit':>22} {'target':>6} {'pairs':>5} {'whole call / units':>22} {'target':>6}"
    lines = [f"{'':9}{'unit ms':>20} {'Fisher pass ms':>22} {ratios} {'memory, MB: unit, pass, F':>26}  rules"]
    for r in records:
        unit, fisher = (Spread(**r["milliseconds"][name]) for name in ("unit", "fisher"))
        whole, peaks = r["whole"], r["peak_bytes"]
        shown = f"{unit!s:>20} {fisher!s:>22} {Spread(**r['ratio'])!s:>22} {r['target']:6.2f} {r['pairs']:5}"
        calls = f"{Spread(**whole['ratio'])!s:>22} {whole['target']:6.2f}"
        held = ", ".join(f"{peaks[k] / 1e6:.1f}" for k in ("unit", "fisher_pass", "one_fisher"))
        lines.append(
            f"{r['workload']:9}{shown} {calls} {held:>26}  {', '.join(f'{k} {v}' for k, v in r['rules'].items())}"
        )
        if r["capped"] or whole["capped"]:
            calls = f"whole calls of {whole['batches']} batches; "
            calls += f"of {whole['of']}: {whole['projected_ratio']:.3g}, projected"
            lines.append(f"{'':9}time cap: {r['pairs']} pairs, {calls}")
    return "\n".join(lines)
