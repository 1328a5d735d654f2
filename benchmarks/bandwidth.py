"""The penalty's kernels against a copy of the same run: the bytes that must move, over the time, over its bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import wplfast

from .contenders import ALPHA, CHUNK_CUDA, NO_VALUE, Case, by_name, net_shapes, plain
from .large import LARGE
from .penalty import small_shapes
from .plumbing.kernel_case import fresh
from .plumbing.parts import Cases, WrongCaseError
from .roofs import copy
from .timing import Contender, Spread, interleave, ratio

COPIED, QUICK_COPIED = 1 << 32, 1 << 20
ROUNDS, SECONDS = 25, 1.5
QUICK = 2000  # parameters
KERNELS = ("value", "value and gradient", "add_grad_")  # what is measured without the host
TARGET = 0.9  # of the copy's bandwidth


@dataclass(frozen=True)
class Kind:
    """How parameters, Fishers and anchors are kept."""

    name: str
    theta: torch.dtype = torch.float32
    fisher: torch.dtype = torch.float32
    anchors: int = 1

    @property
    def bytes(self) -> dict[str, int]:
        """What each kernel must move for a parameter: theta, theta_hat, F and an offset read, a gradient written."""
        read = 2 * self.theta.itemsize + self.fisher.itemsize + 4 * (self.anchors > 1)
        grad = self.theta.itemsize
        return {"value": read, "value and gradient": read + grad, "add_grad_": read + 2 * grad}


FP32 = Kind("fp32")
KINDS = (
    FP32,
    Kind("fp32, F in bf16", fisher=torch.bfloat16),
    Kind("fp32, 2 anchors", anchors=2),
    Kind("bf16", theta=torch.bfloat16),
    Kind("bf16, F in bf16", theta=torch.bfloat16, fisher=torch.bfloat16),
    Kind("bf16, F in bf16, 2 anchors", theta=torch.bfloat16, fisher=torch.bfloat16, anchors=2),
)


class Subject:
    """A case, its penalty, and what the penalty should be."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], kind: Kind, device: torch.device) -> None:
        generator, self.seed = fresh(device)
        self.kind = kind
        self.case = Case.of(kind.name, shapes, device, kind.theta, self.seed)
        self.wpl = wplfast.WeightPlasticityLoss(by_name(self.case.theta), alpha=ALPHA, fisher_dtype=kind.fisher)
        self.anchors = [(self.case.theta_hat, self.case.fisher)]
        for _ in range(kind.anchors - 1):
            hats = [torch.randn(p.shape, generator=generator, device=device).to(p.dtype) for p in self.case.theta]
            self.anchors.append((hats, [torch.rand(p.shape, generator=generator, device=device) for p in hats]))
        for hats, fishers in self.anchors:
            self.wpl.consolidate(by_name(fishers), theta_hat=by_name(hats))

    def runs(self) -> dict[str, Callable[[], Tensor]]:
        """Return the ways to evaluate it; the second leaves its gradient in the graph."""

        def value() -> Tensor:
            with torch.no_grad():
                return self.wpl()

        def autograd() -> Tensor:
            found: Tensor = self.wpl()
            found.backward()
            return found

        runs: dict[str, Callable[[], Tensor]] = {"value": value, "value and gradient": self.wpl}
        return {**runs, "add_grad_": self.wpl.add_grad_, "autograd": autograd}

    def errors(self, run: Callable[[], Tensor | None]) -> dict[str, float]:
        """Run once, with gradients of 0 before, and return errors relative to the value and the largest entry."""
        for grad in self.case.grads:
            grad.zero_()
        value = run()
        expected = worst = 0.0
        for i, p in enumerate(self.case.theta):
            for j in range(0, p.numel(), CHUNK_CUDA):
                part = slice(j, j + CHUNK_CUDA)
                gradient = torch.zeros_like(p.detach().view(-1)[part], dtype=torch.float64)
                for hats, fishers in self.anchors:
                    d = p.detach().view(-1)[part].double() - hats[i].view(-1)[part]
                    weighted = fishers[i].view(-1)[part].to(self.kind.fisher).double() * d
                    expected += ALPHA / 2 * torch.dot(weighted, d).item()
                    gradient.add_(weighted, alpha=ALPHA)
                found = p.grad.view(-1)[part]
                worst = max(worst, ((found - gradient).abs().max() / gradient.abs().max()).nan_to_num(9.0).item())
        errors = {"gradient": worst}
        return errors if value is None else errors | {"value": abs(value.item() / expected - 1)}


def tolerance(kind: Kind) -> dict[str, float]:
    """Return the largest errors: a gradient of bfloat16 is rounded, and a merged F of bfloat16 is rounded again."""
    merged = kind.anchors > 1 and kind.fisher == torch.bfloat16
    half = kind.theta == torch.bfloat16
    return {"gradient": 1e-2 if half or merged else 1e-5, "value": 5e-3 if merged else 1e-5}


def case(device: torch.device, quick: bool, size: int, tensors: int, kind: Kind, baselines: bool) -> dict:
    """Check and time one size, in one tensor or many."""
    size = QUICK if quick else size
    tensors = min(tensors, 12) if quick else tensors
    shapes: list[tuple[int, ...]] = [(size,)] if tensors == 1 else net_shapes(size, tensors)
    return measured(device, quick, shapes, kind, baselines)


def measured(
    device: torch.device,
    quick: bool,
    shapes: Sequence[tuple[int, ...]],
    kind: Kind,
    baselines: bool,
    small: bool = False,
) -> dict:
    """Check and time our ways, a copy, and where wanted the formulas that people write; ``small``: the host counts."""
    subject = Subject(shapes, kind, device)
    numel, runs = subject.case.numel, subject.runs()
    checked = {name: subject.errors(runs[name]) for name in ("add_grad_", "autograd")}
    copied = QUICK_COPIED if quick else COPIED
    contenders = {name: Contender(run, alone=name in KERNELS) for name, run in runs.items()}
    contenders["copy"] = copy(device, copied)
    if small:
        contenders["add_grad_, as called"] = Contender(subject.wpl.add_grad_)
    if baselines:
        ways: dict[str, Callable[[], Any]] = dict(plain(subject.case))
        contenders |= {name: Contender(run, seconds=SECONDS / 3) for name, run in ways.items()}
    record: dict[str, Any] = {"parameters": numel, "tensors": len(shapes), "kind": kind.name, "seed": subject.seed}
    if device.type == "cuda":
        try:
            contenders["add_grad_, in a CUDA graph"] = Contender(_graph(subject))
            checked["add_grad_, in a CUDA graph"] = subject.errors(contenders["add_grad_, in a CUDA graph"].run)  # type: ignore[arg-type]
        except Exception as error:  # a capture may fail in any manner; what it leaves behind is looked at by the part
            contenders.pop("add_grad_, in a CUDA graph", None)
            record["graph_error"] = f"{type(error).__name__}: {error}"
    times = interleave(contenders, 3 if quick else ROUNDS, 0.0 if quick else SECONDS, device)
    record |= {"rounds": len(times["copy"]), "results": _results(contenders, times, kind, numel, copied)}
    allowed = tolerance(kind)
    right = all(not error > allowed[k] for errors in checked.values() for k, error in errors.items())
    record |= {"relative_error": checked, "tolerance": allowed, "right": right and "graph_error" not in record}
    if not record["right"]:
        raise WrongCaseError(f"errors {checked}, tolerance {allowed}; {record.get('graph_error', '')}", record)
    return record


def _results(
    contenders: dict[str, Contender], times: dict[str, list[float]], kind: Kind, numel: int, copied: int
) -> dict:
    """Return times, ratios to ``add_grad_`` and shares of the copy's bandwidth."""
    results = {}
    for name, taken in times.items():
        result: dict[str, Any] = {"milliseconds": asdict(Spread.of(taken, 1e3))}
        least = min(len(taken), len(times["add_grad_"]))
        result["over_add_grad_"] = asdict(ratio(taken[:least], times["add_grad_"][:least]))
        if name in KERNELS:
            result["host_microseconds"] = 1e6 * contenders[name].host
        per = kind.bytes.get(name.partition(",")[0])
        if per is not None:
            share = asdict(ratio(times["copy"], taken))
            result |= {"bytes": per * numel, "gigabytes_per_second": per * numel / Spread.of(taken).median / 1e9}
            result["share_of_copy"] = {key: per * numel / copied * value for key, value in share.items()}
        results[name] = result | ({"computes_value": False} if name in NO_VALUE else {})
    return results


def _graph(subject: Subject) -> Callable[[], None]:
    """Return the replay of ``add_grad_`` captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            subject.wpl.add_grad_()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.wpl.add_grad_()
    return graph.replay


def of_model(device: torch.device, quick: bool, name: str) -> dict:
    """Check and time the penalty over all parameters of a workload's model, in float32."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in LARGE[name].model(quick).parameters()]
    return measured(device, quick, shapes, FP32, baselines=True)


def small(device: torch.device, quick: bool) -> dict:
    """Check and time 8 small tensors, where what counts is what a call costs."""
    return measured(device, quick, small_shapes(), FP32, baselines=True, small=True)


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    million = 10**6
    rows = [(64, 160, FP32, True), (64, 1, FP32, True), (1000, 160, FP32, False), (64, 1000, FP32, True)]
    rows += [(256, 160, kind, kind is FP32) for kind in KINDS]
    rows += [(1000, 1, FP32, True), (1000, 1000, FP32, False), (1000, 160, KINDS[4], False)]
    found = {
        f"{size} M in {tensors}, {kind.name}": partial(case, device, quick, size * million, tensors, kind, baselines)
        for size, tensors, kind, baselines in rows
    }
    models = {f"{name}'s parameters, fp32": partial(of_model, device, quick, name) for name in ("gpt2", "resnet50")}
    return {"8 small tensors": partial(small, device, quick), **models, **found}


def table(found: dict) -> str:
    """Return a line for each case: kernels' shares of the copy, times, and others' times over that of add_grad_."""
    lines = [
        f"{'penalty':41}{'value':>6}{'+grad':>6}{'add_':>6} of copy{'add_ us':>9}{'host':>5}{'graph':>8}"
        f"{'autograd':>9}{'eager':>7}{'foreach':>8}"
    ]
    for name, record in found.items():
        r = record["results"]
        shares = "".join(f"{r[k]['share_of_copy']['median']:6.0%}" for k in KERNELS)
        graph = r.get("add_grad_, in a CUDA graph")
        replay = f"{1e3 * graph['milliseconds']['median']:8.1f}" if graph else f"{'-':>8}"
        others = "".join(
            f"{r[k]['over_add_grad_']['median']:{width - 1}.1f}x" if k in r else f"{'-':>{width}}"
            for k, width in (("autograd", 9), ("eager", 7), ("foreach", 8))
        )
        ours = r["add_grad_"]
        wrong = "" if record["right"] else " WRONG"
        lines.append(
            f"{name:41}{shares}{'':8}{1e3 * ours['milliseconds']['median']:9.1f}{ours['host_microseconds']:5.0f}"
            f"{replay}{others}{wrong}"
        )
    return "\n".join(lines)
