"""The penalty beside torch.compile, which takes seconds or minutes to compile it for each case."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch

from .bandwidth import FP32, QUICK, ROUNDS, SECONDS, Subject
from .contenders import compiled, net_shapes
from .penalty import small_shapes
from .plumbing.parts import Cases
from .timing import Contender, Spread, interleave, ratio


def against_compiled(device: torch.device, quick: bool, size: int, tensors: int) -> dict:
    """Time ``add_grad_`` beside torch.compile, which is compiled for this case."""
    size = QUICK if quick else size
    shapes: list[tuple[int, ...]] = [(size,)] if tensors == 1 else net_shapes(size, tensors)
    shapes = small_shapes() if tensors == 8 else shapes
    subject = Subject(shapes, FP32, device)
    ways = {**compiled(subject.case), "add_grad_": subject.wpl.add_grad_}
    errors = {name: subject.errors(run) for name, run in ways.items()}
    times = interleave({name: Contender(run) for name, run in ways.items()}, ROUNDS, SECONDS, device)
    over = asdict(ratio(times["compile"], times["add_grad_"]))
    spreads = {name: asdict(Spread.of(taken, 1e3)) for name, taken in times.items()}
    found = {"parameters": subject.case.numel, "tensors": len(shapes), "milliseconds": spreads}
    return {**found, "over_add_grad_": over, "relative_error": errors}


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured; what takes longest to compile comes last."""
    rows = [(64 * 10**6, 1), (64 * 10**6, 8), (64 * 10**6, 20 if quick else 160)]
    names = ("64 M in 1", "8 small tensors", "64 M in 160")
    return {name: partial(against_compiled, device, quick, *row) for name, row in zip(names, rows, strict=True)}


def table(found: dict) -> str:
    """Return a line for each case beside torch.compile."""
    return "\n".join(
        f"torch.compile, {name}: {r['milliseconds']['compile']['median']:.3g} ms, "
        f"{r['over_add_grad_']['median']:.2f}x add_grad_"
        for name, r in found.items()
    )
