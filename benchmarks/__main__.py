"""Measure the penalty and the Fisher pass.

    python -m benchmarks penalty                  # against eager, foreach and, with --compile, torch.compile
    python -m benchmarks fisher --workloads mlp   # against one ordinary forward and backward pass
    python -m benchmarks all --json results.json

Results are checked against float64 before anything is timed. All contenders of a case run once in every round.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import fisher, penalty
from .penalty import WrongResultError
from .plumbing.record import environment, write_json
from .workloads import WORKLOADS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code."""
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is available", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    try:
        parts = [part for part in ("penalty", "fisher") if options.what in (part, "all")]
        records = {part: [_run(part, threads, options) for threads in options.threads or [before]] for part in parts}
    except WrongResultError as error:
        print(f"error: {error}; nothing was timed", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("quick", "rounds", "seconds")}
        write_json(options.json, {**environment(options.device), "settings": settings, **records})
    return 0


def _run(part: str, threads: int, options: argparse.Namespace) -> dict:
    """Measure one part with a number of threads and print its table."""
    torch.set_num_threads(threads)
    device, rounds, seconds = torch.device(options.device), options.rounds, options.seconds
    load, started = _load(), time.perf_counter()
    if part == "penalty":
        records = penalty.run(device, options.sizes, rounds, seconds, options.compile)
        table = penalty.table(records)
    else:
        records = fisher.run(device, options.workloads, options.quick, rounds, seconds)
        table = fisher.table(records)
    place = environment(options.device)["hardware"]
    place = place.get("gpu") or f"{place['cpu']}, {threads} threads"
    print(f"\n{part}: {place}, torch {torch.__version__}, load {load[0]:.1f} to {_load()[0]:.1f}\n{table}", flush=True)
    return {
        "threads": threads,
        "load_average": {"before": load, "after": _load()},
        "wall_seconds": round(time.perf_counter() - started, 1),
        "records": records,
    }


def _load() -> list[float]:
    """Return the load averages over 1, 5 and 15 minutes; NaN where the system keeps none."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return [float("nan")] * 3


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=("penalty", "fisher", "all"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="one run each; default: PyTorch's")
    parser.add_argument("--sizes", type=float, nargs="+", metavar="N", help="penalty: parameters of large cases")
    parser.add_argument(
        "--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="fisher: which"
    )
    parser.add_argument("--compile", action="store_true", help="penalty: torch.compile too (minutes to compile)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 40)")
    parser.add_argument("--seconds", type=float, help="a case's time cap (default 30); slower ones get fewer rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test of these programs, not a measurement")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (4 if options.quick else 40)
    options.seconds = options.seconds or (0.2 if options.quick else 30.0)
    large = 64e6 if options.device == "cuda" else 10e6
    options.sizes = [int(size) for size in options.sizes or [1e5 if options.quick else large]]
    return options


if __name__ == "__main__":
    sys.exit(main())
