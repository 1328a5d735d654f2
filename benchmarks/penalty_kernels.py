"""What a GPU takes for the penalty, for every way to keep it: kernels beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .kernels import fresh
from .penalty import SMALL, measure_case
from .plumbing.parts import Cases
from .timing import Budget
from .ways import FP32, Case, Kind, net_shapes
from .workloads import LARGE

QUICK = 2000  # parameters
KINDS = (
    FP32,
    Kind("fp32, F in bf16", fisher=torch.bfloat16),
    Kind("fp32, 2 anchors", anchors=2),
    Kind("bf16", theta=torch.bfloat16),
    Kind("bf16, F in bf16", theta=torch.bfloat16, fisher=torch.bfloat16),
    Kind("bf16, F in bf16, 2 anchors", theta=torch.bfloat16, fisher=torch.bfloat16, anchors=2),
)
OURS = ("kernels",)
Shapes = Sequence[tuple[int, ...]]


def case(device: torch.device, quick: bool, shapes: Shapes, kind: Kind = FP32, makers: Sequence[str] = OURS) -> dict:
    """Check and time ways with tensors that no run before had."""
    _, seed = fresh(device)
    budget = Budget(device, 3, 0.0, True) if quick else Budget(device, 25, 1.5)
    return {"seed": seed, **measure_case(Case(kind.name, shapes, device, kind, seed), budget, makers, ("copy",))}


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured: 8 small tensors, the parameters of models, and sizes of every kind."""
    plain = (*OURS, "plain")
    found = {"8 small tensors": partial(case, device, quick, SMALL, makers=plain)}
    if device.type == "cuda":
        found["8 small tensors, in a CUDA graph"] = partial(case, device, quick, SMALL, makers=(*OURS, "graph"))
    for name in ("gpt2", "resnet50"):
        with torch.device("meta"):
            shapes = [tuple(p.shape) for p in LARGE[name].model(quick).parameters()]
        found[f"{name}'s parameters, fp32"] = partial(case, device, quick, shapes, makers=plain)
    rows = [(64, 160, FP32, plain), (64, 1, FP32, plain), (1000, 160, FP32, OURS), (64, 1000, FP32, plain)]
    rows += [(256, 160, kind, plain if kind is FP32 else OURS) for kind in KINDS]
    rows += [(1000, 1, FP32, plain), (1000, 1000, FP32, OURS), (1000, 160, KINDS[4], OURS)]
    for millions, tensors, kind, makers in rows:
        shapes = net_shapes(QUICK if quick else millions * 10**6, min(tensors, 12) if quick else tensors)
        found[f"{millions} M in {tensors}, {kind.name}"] = partial(case, device, quick, shapes, kind, makers)
    return found


def compiled_cases(device: torch.device, quick: bool) -> Cases:
    """Return cases beside torch.compile, which takes seconds or minutes; what takes longest to compile comes last."""
    size, many = (QUICK, 20) if quick else (64 * 10**6, 160)
    shapes = {"64 M in 1": net_shapes(size, 1), "8 small tensors": SMALL, "64 M in 160": net_shapes(size, many)}
    return {name: partial(case, device, quick, form, makers=("ours", "compiled")) for name, form in shapes.items()}
