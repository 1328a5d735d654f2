"""``wplfast selftest``: every operator on a device against plain PyTorch in float64 there."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import __version__, backends
from ..backends import reference
from ..ops.layout import packed_views
from .selftest_cases import CASES, Case, Source

#: Largest error of an element, relative to it and the root mean square of its tensor: one rounding of 16-bit results,
#: sums of products in float32 and float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.02 * 2**-8, torch.float16: 1.02 * 2**-11}
#: The same, of what WPLFAST_TRITON_FP32 allows products of float32 on tensor cores.
LOOSE = {"bf16x3": 1e-4, "tf32": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """What became of one call.

    Args:
        case: the call.
        dtype: its inputs'.
        error: largest of its results' errors, in comparison to its tolerance; NaN where there are no numbers.
        tolerance: of that result.
        problem: what is wrong, empty if nothing is.
    """

    case: Case
    dtype: torch.dtype
    error: float
    tolerance: float
    problem: str

    def __str__(self) -> str:
        """Return the call and what is wrong."""
        return f"{self.case.operator}, {self.case.what}, {_name(self.dtype)}: {self.problem}"


@torch.no_grad()
def compare(case: Case, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Call an operator, and its counterpart in plain PyTorch on the same numbers in float64."""
    source = Source(device)
    arguments = case.arguments(source, dtype)
    exact = {name: _exact(value) for name, value in arguments.items()}
    before = {name: _exact(value) for name, value in arguments.items() if name not in case.written}
    try:
        found = _results(case, arguments, case.run(arguments), arguments)
    except Exception as error:  # whatever it is, the others are to be compared
        return Comparison(case, dtype, math.nan, math.nan, f"{type(error).__name__}: {error}")
    expected = _results(case, exact, getattr(reference, case.operator)(**exact), arguments)
    problem, worst = "", (0.0, 0.0, math.inf)
    for name, result in found.items():
        off, most = difference(result, expected[name]), _tolerance(case, result.dtype, dtype, device)
        if not off <= most:  # NaN is not
            problem = problem or f"{name} is off by {off:.1e}, of which {most:.1e} may be"
        if not off / most < worst[0]:
            worst = (off / most, off, most)
    if any(not _same(_exact(arguments[name]), value) for name, value in before.items()):
        problem = problem or "it wrote to an argument that it may only read"
    if source.overrun():
        problem = problem or "it wrote beside its tensors"
    return Comparison(case, dtype, worst[1], worst[2], problem)


def difference(result: Tensor, expected: Tensor) -> float:
    """Return the largest error of an element, relative to it and the root mean square of all."""
    if result.shape != expected.shape:
        return math.nan
    if result.numel() == 0:
        return 0.0
    scale = expected.abs() + expected.square().mean().sqrt()
    errors = (result.to(expected.dtype) - expected).abs()
    return float(torch.where(errors == 0, 0.0, errors / scale).max())


def compare_all(device: torch.device) -> list[Comparison]:
    """Compare every operator in every dtype; see ``CASES``."""
    return [compare(case, dtype, device) for case in CASES for dtype in case.dtypes]


def _exact(value: Any) -> Any:
    """Return a copy of arguments in float64, in the same memory order."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
    return [_exact(v) for v in value] if isinstance(value, list) else value


def _same(first: Any, second: Any) -> bool:
    """Tell whether copies of arguments are equal."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, list):
        return all(map(_same, first, second))
    return bool(first == second)


def _results(case: Case, arguments: Mapping[str, Any], returned: Any, likes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what an operator wrote and returned, by name; ``likes``: the arguments whose memory order packing has."""
    values = [] if returned is None else list(returned) if isinstance(returned, tuple) else [returned]
    if len(values) == 2:  # a value and a packed gradient, whose gaps hold anything
        values[1] = torch.cat([view.flatten() for view in packed_views(values[1], likes["theta"])])
    results = dict(zip(("value", "gradient"), values, strict=False))
    for name in case.written:
        written = arguments[name]
        if isinstance(written, list):
            results[name] = torch.cat([tensor.flatten() for tensor in written])
        elif written is not None:
            results[name] = written
    return results


def _tolerance(case: Case, result: torch.dtype, dtype: torch.dtype, device: torch.device) -> float:
    """Return how far off a result of a dtype may be."""
    products = case.operator in ("fisher_linear_", "fisher_conv_") and dtype == torch.float32
    if products and backends.serving(device.type) == "triton":
        from ..backends.triton.fisher_config import fp32_mode

        return LOOSE.get(fp32_mode(), TOLERANCE[result])
    return TOLERANCE[result]


def _name(dtype: torch.dtype) -> str:
    """Return a dtype's name."""
    return str(dtype).removeprefix("torch.")


def rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return one row for each operator: dtypes, calls, the largest error in comparison to its tolerance, verdict."""
    table = []
    for operator in dict.fromkeys(c.case.operator for c in comparisons):
        own = [c for c in comparisons if c.case.operator == operator]
        worst = max(own, key=lambda c: math.inf if math.isnan(c.error) else c.error / c.tolerance)
        finite = not math.isnan(worst.error)
        table.append({
            "operator": operator,
            "dtypes": list(dict.fromkeys(_name(c.dtype) for c in own)),
            "calls": len(own),
            "error": worst.error if finite else None,
            "tolerance": worst.tolerance if finite else None,
            "verdict": "MISMATCH" if any(c.problem for c in own) else "ok",
        })  # fmt: skip
    return table


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "selftest",
        help="compare every operator on a device with plain PyTorch in float64",
        description=(
            "Compare every operator, in every dtype, with odd sizes and misaligned memory, with plain PyTorch in "
            "float64 on the same device. The exit code is 1 if one is off."
        ),
        epilog="example: wplfast selftest --device cuda",
    )
    command.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")
    command.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, and return 1 if anything was off."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # no such device, or none with float64
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    started = time.perf_counter()
    comparisons = compare_all(device)
    seconds = time.perf_counter() - started
    problems = [str(c) for c in comparisons if c.problem]
    table, served = rows(comparisons), backends.serving(device.type)
    if arguments.json:
        about = {"wplfast": __version__, "torch": torch.__version__, "device": str(device), "served_by": served}
        outcome = {"operators": table, "problems": problems, "gave_way": backends.gave_way()}
        print(json.dumps({**about, **outcome, "seconds": round(seconds, 2), "verdict": verdict(problems)}, indent=1))
        return 1 if problems else 0
    print(f"wplfast {__version__}, torch {torch.__version__}, {device} served by {served}, against float64")
    print(f"{'operator':20} {'dtypes':34} {'calls':>5} {'error':>9} {'tolerance':>9}  verdict")
    for row in table:
        off, most = ("-" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "tolerance"))
        dtypes = " ".join(row["dtypes"])
        print(f"{row['operator']:20} {dtypes:34} {row['calls']:5} {off:>9} {most:>9}  {row['verdict']}")
    for problem in problems:
        print(f"MISMATCH {problem}")
    for kernel, reason in backends.gave_way().items():
        print(f"gave way to plain PyTorch: {kernel}: {reason}")
    print(f"{verdict(problems)}: {len(comparisons) - len(problems)} of {len(comparisons)} calls agree, {seconds:.1f} s")
    return 1 if problems else 0


def verdict(problems: Sequence[str]) -> str:
    """Return the verdict on all calls."""
    return "MISMATCH" if problems else "ok"
