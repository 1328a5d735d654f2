"""Measure the penalty and the Fisher pass.

    python -m benchmarks penalty --plot out.png   # against loops, foreach and others, then from 10^3 to 10^8.5
    python -m benchmarks penalty --compile        # and against torch.compile
    python -m benchmarks anchors                  # several anchors, active sets, consolidation
    python -m benchmarks fisher --workloads mlp   # against one ordinary forward and backward pass
    python -m benchmarks fisher --peers           # and against other libraries, those of the extra [peers] too
    python -m benchmarks scaling --plot out.png   # against batch size, length, width, classes and samples
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

from . import anchors, figures, fisher, peers, penalty, scaling, sweep
from .contenders import WrongResultError
from .plumbing import malloc
from .plumbing.record import environment, write_bytes, write_json
from .workloads import WORKLOADS

#: What each choice measures. The last two keep freed memory, which cannot be undone.
PARTS = {
    "penalty": ("penalty", "sweep"),
    "fisher": ("fisher",),
    "peers": ("peers",),
    "scaling": ("scaling",),
    "anchors": ("anchors",),
    "all": ("penalty", "fisher", "sweep", "anchors"),
}
KEPT = ("sweep", "anchors")
SECONDS = {"scaling": 3.0, "sweep": 4.0, "anchors": 10.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code."""
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is available", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    try:
        parts = [part for part in PARTS[options.what] if part != "sweep" or options.sizes]
        if options.peers:
            parts.insert(parts.index("fisher") + 1, "peers")
        records = {part: [_run(part, threads, options) for threads in options.threads or [before]] for part in parts}
    except WrongResultError as error:
        print(f"error: {error}; nothing was timed", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    settings = {key: getattr(options, key) for key in ("quick", "rounds", "seconds")}
    record = {**environment(options.device), "settings": settings, **records}
    if "peers" in records:
        record["versions"] |= peers.versions()
    if options.json is not None:
        write_json(options.json, record)
    if options.plot is not None:
        write_bytes(options.plot, figures.draw(record))
    return 0


def _run(part: str, threads: int, options: argparse.Namespace) -> dict:
    """Measure one part with a number of threads and print its table."""
    torch.set_num_threads(threads)
    kept = part in KEPT and malloc.keep()
    device, rounds, seconds = torch.device(options.device), options.rounds, _seconds(part, options)
    load, started = _load(), time.perf_counter()
    if part == "penalty":
        records = penalty.run(device, options.large, rounds, seconds, options.compile)
    elif part == "sweep":
        records = sweep.run(device, options.sizes, options.tensors, rounds, seconds, options.compile)
    elif part in ("scaling", "anchors"):
        records = {"scaling": scaling, "anchors": anchors}[part].run(device, options.quick, rounds, seconds)
    else:
        module = peers if part == "peers" else fisher
        records = module.run(device, options.workloads, options.quick, rounds, seconds)
    modules = {"penalty": penalty, "sweep": sweep, "fisher": fisher, "peers": peers}
    table = (modules | {"scaling": scaling, "anchors": anchors})[part].table(records)
    place = environment(options.device)["hardware"]
    place = place.get("gpu") or f"{place['cpu']}, {threads} threads"
    print(f"\n{part}: {place}, torch {torch.__version__}, load {load[0]:.1f} to {_load()[0]:.1f}\n{table}", flush=True)
    return {
        "threads": threads,
        "seconds": seconds,
        "keeps_freed_memory": kept,
        "load_average": {"before": load, "after": _load()},
        "wall_seconds": round(time.perf_counter() - started, 1),
        "records": records,
    }


def _seconds(part: str, options: argparse.Namespace) -> float:
    """Return a case's time cap."""
    return options.seconds or (0.2 if options.quick else SECONDS.get(part, 30.0))


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
    parser.add_argument("what", choices=tuple(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="one run each; default: PyTorch's")
    parser.add_argument(
        "--sizes", type=float, nargs="*", metavar="N", help="penalty: parameters in the sweep; none: no sweep"
    )
    parser.add_argument("--tensors", type=int, nargs="+", metavar="N", help="penalty: numbers of tensors in the sweep")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(fisher.KNOWN),
        help="fisher: which; default: the small ones, on a GPU all",
    )
    parser.add_argument("--peers", action="store_true", help="fisher, all: other libraries too, as peers does (slow)")
    parser.add_argument("--compile", action="store_true", help="penalty: torch.compile too (minutes)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 40)")
    parser.add_argument("--seconds", type=float, help="a case's time cap (default 30; scaling 3, sweep 4, anchors 10)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="penalty, peers, scaling: draw the record into a PNG")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test of these programs, not a measurement")
    options = parser.parse_args(arguments)
    options.workloads = options.workloads or list(fisher.KNOWN if options.device == "cuda" else WORKLOADS)
    options.rounds = options.rounds or (4 if options.quick else 40)
    if options.peers and options.what not in ("fisher", "all"):
        parser.error(f"--peers goes with fisher or all, not with {options.what}")
    drawn = options.peers or any(part in figures.DRAWN for part in PARTS[options.what])
    if options.plot is not None and not drawn:
        parser.error(f"--plot draws {', '.join(figures.DRAWN)}, not {options.what}")
    options.large = 10**5 if options.quick else 64 * 10**6 if options.device == "cuda" else 10**7
    if options.sizes is None:
        options.sizes = sweep.QUICK_SIZES if options.quick else sweep.SIZES
    options.sizes = [int(size) for size in options.sizes]
    options.tensors = options.tensors or (sweep.QUICK_TENSORS if options.quick else sweep.TENSORS)
    return options


if __name__ == "__main__":
    sys.exit(main())
