"""The penalty's kernels against a copy of the same run: the bytes that must move, over the time, over its bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import wplfast

from .kernels import fresh
from .penalty import measure_case
from .plumbing.parts import Cases, WrongCaseError
from .roofs import copy
from .timing import Budget, Contender, quartiles, ratio
from .ways import ALPHA, Case, Way, backward_of, by_name, errors_of, net_shapes, plain
from .workloads import LARGE

COPIED, QUICK_COPIED = 1 << 32, 1 << 20
ROUNDS, SECONDS = 25, 1.5
QUICK = 2000  # parameters
SMALL = [(64, 64), (64,)] * 4
KERNELS = ("value", "value and gradient", "add_grad_")  # what is measured without the host


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

    @property
    def tolerance(self) -> dict[str, float]:
        """The largest errors: a gradient of bfloat16 is rounded, and a merged F of bfloat16 is rounded again."""
        merged = self.anchors > 1 and self.fisher == torch.bfloat16
        half = self.theta == torch.bfloat16
        return {"gradient": 1e-2 if half or merged else 1e-5, "value": 5e-3 if merged else 1e-5}


FP32 = Kind("fp32")
KINDS = (
    FP32,
    Kind("fp32, F in bf16", fisher=torch.bfloat16),
    Kind("fp32, 2 anchors", anchors=2),
    Kind("bf16", theta=torch.bfloat16),
    Kind("bf16, F in bf16", theta=torch.bfloat16, fisher=torch.bfloat16),
    Kind("bf16, F in bf16, 2 anchors", theta=torch.bfloat16, fisher=torch.bfloat16, anchors=2),
)


def case(
    device: torch.device, quick: bool, shapes: Sequence[tuple[int, ...]], kind: Kind, baselines: bool = True
) -> dict:
    """Check and time our ways, a copy, and where wanted the formulas that people write."""
    generator, seed = fresh(device)
    drawn = Case.of(kind.name, shapes, device, kind.theta, seed)
    wpl = wplfast.WeightPlasticityLoss(by_name(drawn.theta), alpha=ALPHA, fisher_dtype=kind.fisher)
    kept = [(drawn.theta_hat, drawn.fisher)]
    for _ in range(kind.anchors - 1):
        hats = [torch.randn(s, generator=generator, device=device).to(kind.theta) for s in shapes]
        kept.append((hats, [torch.rand(s, generator=generator, device=device) for s in shapes]))
    for hats, fishers in kept:
        wpl.consolidate(by_name(fishers), theta_hat=by_name(hats))
    anchors = [[(hats[i], fishers[i].to(kind.fisher)) for hats, fishers in kept] for i in range(len(shapes))]

    contenders = {
        "value": Contender(torch.no_grad()(lambda: wpl()), alone=True),
        "value and gradient": Contender(wpl, alone=True),  # left in the graph
        "add_grad_": Contender(wpl.add_grad_, alone=True),
        "autograd": Contender(backward_of(wpl)),
        "add_grad_, as called": Contender(wpl.add_grad_),
    }
    record: dict[str, Any] = {"parameters": drawn.numel, "tensors": len(shapes), "kind": kind.name, "seed": seed}
    checked = {name: errors_of(drawn.theta, anchors, contenders[name].run) for name in ("add_grad_", "autograd")}
    if device.type == "cuda":
        try:
            replay = _graph(wpl.add_grad_)
            checked["add_grad_, in a CUDA graph"] = errors_of(drawn.theta, anchors, replay)
            contenders["add_grad_, in a CUDA graph"] = Contender(replay)
        except Exception as error:  # a capture may fail in any manner; what it leaves behind is looked at by the part
            record["graph_error"] = f"{type(error).__name__}: {error}"
    if baselines:
        contenders |= {name: Contender(way, seconds=SECONDS / 3) for name, way in plain(drawn).items()}
    copied = QUICK_COPIED if quick else COPIED
    contenders["copy"] = copy(copied, device)
    times = Budget(device, 3 if quick else ROUNDS, 0.0 if quick else SECONDS).time(contenders)
    record |= {"rounds": len(times["copy"]), "results": {}, "relative_error": checked, "tolerance": kind.tolerance}
    for name, taken in times.items():
        result: dict[str, Any] = {"milliseconds": quartiles(taken, 1e3)}
        result["over_add_grad_"] = ratio(taken, times["add_grad_"])
        if name in KERNELS:
            result["host_microseconds"] = 1e6 * contenders[name].host
            result["bytes"] = kind.bytes[name] * drawn.numel
            result["share_of_copy"] = ratio(times["copy"], taken, result["bytes"] / copied)
        record["results"][name] = result
    wrong = [name for name, found in checked.items() if any(not e <= kind.tolerance[k] for k, e in found.items())]
    record["right"] = not wrong and "graph_error" not in record
    if not record["right"]:
        raise WrongCaseError(f"errors {checked}, tolerance {kind.tolerance}; {record.get('graph_error', '')}", record)
    return record


def _graph(run: Way) -> Callable[[], None]:
    """Return the replay of what a function launches, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured: 8 small tensors, the parameters of models, and sizes of every kind."""
    found = {"8 small tensors": partial(case, device, quick, SMALL, FP32)}
    for name in ("gpt2", "resnet50"):
        with torch.device("meta"):
            shapes = [tuple(p.shape) for p in LARGE[name].model(quick).parameters()]
        found[f"{name}'s parameters, fp32"] = partial(case, device, quick, shapes, FP32)
    rows = [(64, 160, FP32, True), (64, 1, FP32, True), (1000, 160, FP32, False), (64, 1000, FP32, True)]
    rows += [(256, 160, kind, kind is FP32) for kind in KINDS]
    rows += [(1000, 1, FP32, True), (1000, 1000, FP32, False), (1000, 160, KINDS[4], False)]
    for millions, tensors, kind, baselines in rows:
        shapes = net_shapes(QUICK if quick else millions * 10**6, min(tensors, 12) if quick else tensors)
        found[f"{millions} M in {tensors}, {kind.name}"] = partial(case, device, quick, shapes, kind, baselines)
    return found


def compiled_cases(device: torch.device, quick: bool) -> Cases:
    """Return cases beside torch.compile, which takes seconds or minutes; what takes longest to compile comes last."""
    size, many = (QUICK, 20) if quick else (64 * 10**6, 160)
    budget = Budget(device, ROUNDS, SECONDS, quick)
    shapes = {"64 M in 1": net_shapes(size, 1), "8 small tensors": SMALL, "64 M in 160": net_shapes(size, many)}
    return {
        name: partial(lambda name, form: measure_case(Case.of(name, form, device), budget, True), name, form)
        for name, form in shapes.items()
    }
