"""One kernel beside others: checked against float64, timed without the host, compared with a copy of the same run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..roofs import copy
from ..timing import Contender, Spread, interleave, ratio
from .parts import WrongCaseError

OURS = "wplfast"
COPIED = 1 << 30  # bytes that the copy moves
ROUNDS, SECONDS = 25, 0.8
QUICK_ROUNDS = 3


def fresh(device: torch.device) -> tuple[torch.Generator, int]:
    """Return a generator on a device with a seed that no run before had, and the seed."""
    seed = int.from_bytes(os.urandom(4), "little")
    return torch.Generator(device).manual_seed(seed), seed


def errors_of(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the error relative to the norm, and the largest one relative to the largest entry."""
    difference = found.double() - expected
    return {
        "norm": (difference.norm() / expected.norm()).nan_to_num(torch.inf).item(),
        "largest": (difference.abs().max() / expected.abs().max()).nan_to_num(torch.inf).item(),
    }


def checked(
    run: Callable[[Tensor, Tensor | None], None],
    expected: Tensor,
    expected_gradient: Tensor | None,
    tolerance: float,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Run a kernel that adds to a Fisher, twice, and return its errors and whether both runs gave the same bits.

    Args:
        run: takes the accumulators of Fisher and gradient.
        expected: the Fisher in float64.
        expected_gradient: the gradient in float64, where it is wanted.
        tolerance: largest error relative to the norm.
        dtype: of the accumulators.
    """
    results = []
    for _ in range(2):
        fisher = torch.ones_like(expected, dtype=dtype)  # the kernel adds to what is there
        gradient = None if expected_gradient is None else torch.ones_like(fisher)
        run(fisher, gradient)
        results.append((fisher, gradient))
    (fisher, gradient), again = results
    errors = {"fisher": _in_share(fisher, expected)}
    if gradient is not None and expected_gradient is not None:
        errors["gradient"] = _in_share(gradient, expected_gradient)
    same = torch.equal(fisher, again[0]) and (gradient is None or torch.equal(gradient, again[1]))
    right = all(error["norm"] <= tolerance for error in errors.values())
    return {"relative_error": errors, "tolerance": tolerance, "right": right, "same_bits_twice": same}


def _in_share(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return errors of an accumulator that held ones."""
    return errors_of(found, expected + 1)


def timed(
    device: torch.device,
    runs: Mapping[str, Callable[[], object]],
    quick: bool,
    *,
    flops: float | None = None,
    n_bytes: float | None = None,
    seconds: float = SECONDS,
) -> dict:
    """Time contenders on the device alone, interleaved with a copy; return times, rates and shares.

    Args:
        device: where.
        runs: by name; the first is ours.
        quick: whether to run a few rounds only.
        flops: of one call, of all contenders.
        n_bytes: that one call of ours must move at least.
        seconds: time cap.
    """
    contenders = {name: Contender(run, alone=True) for name, run in runs.items()}
    copied = 1 << 16 if quick else COPIED
    contenders["copy"] = copy(device, copied)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    times = interleave(contenders, rounds, 0.0 if quick else seconds, device)
    ours = times[next(iter(runs))]
    record: dict = {"rounds": len(ours), "times": {}}
    for name, measured in times.items():
        record["times"][name] = {
            "milliseconds": asdict(Spread.of(measured, 1e3)),
            "host_microseconds": 1e6 * contenders[name].host,
            "over_ours": asdict(ratio(measured, ours)),
        }
    median = Spread.of(ours).median
    if flops is not None:
        record |= {"flops": flops, "teraflops_per_second": flops / median / 1e12}
    if n_bytes is not None:
        share = ratio(times["copy"], ours)
        record |= {"bytes": n_bytes, "gigabytes_per_second": n_bytes / median / 1e9}
        record["share_of_copy"] = {key: n_bytes / copied * value for key, value in asdict(share).items()}
    return record


def judged(record: dict) -> dict:
    """Return a record whose result was right.

    Raises:
        WrongCaseError: if it was not; the record goes with it.
    """
    if not record["right"]:
        raise WrongCaseError(f"relative error {record['relative_error']}, tolerance {record['tolerance']}", record)
    return record
