"""Measure the penalty and the Fisher pass.

    python -m benchmarks penalty --plot out.png   # against loops, foreach and others, then from 10^3 to 10^8
    python -m benchmarks penalty --compile        # and against torch.compile
    python -m benchmarks anchors                  # several anchors, active sets, consolidation
    python -m benchmarks fisher --workloads mlp   # against one ordinary forward and backward pass
    python -m benchmarks fisher --batches 1       # and a whole call over one batch
    python -m benchmarks fisher --peers           # and against other libraries, those of the extra [peers] too
    python -m benchmarks scaling --plot out.png   # against batch size, length, width, classes and samples
    python -m benchmarks rule linear              # one capture rule, on and off: NAME of a case, or MODULE:CASE
    python -m benchmarks distributed              # of two ranks, against steps under DDP and FSDP2, and end to end
    python -m benchmarks distributed fsdp2        # one of these: ddp, fsdp2, end-to-end
    python -m benchmarks integrations             # a training step of each package, with the callback and without
    python -m benchmarks all --json results.json
    python -m benchmarks readme                   # the tables of README and docs, from benchmarks/results

Results are checked against float64 before anything is timed. All contenders of a case run once in every round.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import (
    anchors,
    distributed,
    distributed_report,
    figures,
    fisher,
    integrations,
    peers,
    penalty,
    readme,
    report,
    rule,
    scaling,
)
from .plumbing import malloc
from .plumbing.markdown import aligned
from .plumbing.record import environment, write_bytes, write_json
from .timing import Budget
from .ways import WrongResultError
from .workloads import KNOWN, WORKLOADS

#: What each choice measures. Sweep and anchors keep freed memory, which cannot be undone, and so come last.
PARTS: dict[str, tuple[str, ...]] = {
    **{part: (part,) for part in ("fisher", "peers", "scaling", "anchors", "rule", "distributed", "integrations")},
    "penalty": ("penalty", "sweep"),
    "all": ("penalty", "fisher", "sweep", "anchors"),
    "readme": (),
}
KEPT = ("sweep", "anchors")
SECONDS = {"scaling": 3.0, "sweep": 4.0, "anchors": 10.0, "rule": rule.SECONDS}
TABLES = {**report.TABLES, "distributed": distributed_report.distributed}
RUNS: dict[str, Callable[[Budget, argparse.Namespace], Any]] = {
    "penalty": lambda budget, options: penalty.run(budget, options.compile),
    "sweep": lambda budget, options: penalty.sweep(budget, compiled=options.compile),
    "fisher": lambda budget, options: fisher.run(budget, options.workloads, options.batches),
    "peers": lambda budget, options: peers.run(budget, options.workloads),
    "scaling": lambda budget, options: scaling.run(budget),
    "anchors": lambda budget, options: anchors.run(budget),
    "distributed": lambda budget, options: distributed.run(budget, options.workloads, options.case),
    "rule": lambda budget, options: rule.run(options.case, budget),
    "integrations": lambda budget, options: integrations.run(budget),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code."""
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is available", file=sys.stderr)
        return 2
    if options.what == "readme":
        readme.write()
        return 0
    before, parts = torch.get_num_threads(), list(PARTS[options.what])
    if options.peers:
        parts.insert(parts.index("fisher") + 1, "peers")
    try:
        records = {part: [_run(part, count, options) for count in options.threads or [before]] for part in parts}
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
    seconds = options.seconds or (0.2 if options.quick else SECONDS.get(part, 30.0))
    load, started = _load(), time.perf_counter()
    records = RUNS[part](Budget(torch.device(options.device), options.rounds, seconds, options.quick), options)
    run = {
        "threads": threads,
        "seconds": seconds,
        "keeps_freed_memory": kept,
        "load_average": {"before": load, "after": _load()},
        "wall_seconds": round(time.perf_counter() - started, 1),
        "records": records,
    }
    hardware = environment(options.device)["hardware"]
    print(f"\n{part}: {hardware.get('gpu') or hardware['cpu']}, torch {torch.__version__}, load {load[0]:.1f} before")
    print(aligned(TABLES[part]([run], True)), flush=True)
    return run


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
    add = parser.add_argument
    add("what", choices=tuple(PARTS))
    add("case", nargs="?", help=f"rule: MODULE:CASE, or one of {', '.join(rule.CASES)}; distributed: one of its cases")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, nargs="+", metavar="N", help="one run each; default: PyTorch's")
    add("--workloads", nargs="+", choices=list(KNOWN), help="fisher, ddp: which; default: the small ones, on a GPU all")
    add("--batches", type=int, metavar="N", help="fisher: of a whole call")
    add("--peers", action="store_true", help="fisher, all: other libraries too, as peers does (slow)")
    add("--compile", action="store_true", help="penalty: torch.compile too (minutes)")
    add("--rounds", type=int, help="interleaved rounds (default 40)")
    add("--seconds", type=float, help="a case's time cap (default 30; scaling 3, sweep 4, anchors 10, rule 20 in all)")
    add("--json", type=Path, metavar="PATH", help="write the record here")
    add("--plot", type=Path, metavar="PATH", help="penalty, scaling: draw the record into a PNG")
    add("--quick", action="store_true", help="tiny sizes: a test of these programs, not a measurement")
    options = parser.parse_args(arguments)
    options.workloads = options.workloads or list(KNOWN if options.device == "cuda" else WORKLOADS)
    options.rounds = options.rounds or (4 if options.quick else 40)
    if options.what == "distributed":
        if options.case not in (None, *distributed.CASES):
            parser.error(f"distributed: expected one of {', '.join(distributed.CASES)}, got {options.case!r}")
    elif (options.case is not None) != (options.what == "rule"):
        parser.error("a case goes with rule or distributed, and rule needs one: MODULE:CASE, or the NAME of one")
    try:
        options.case = rule.find(options.case) if options.what == "rule" else options.case
    except ValueError as error:
        parser.error(str(error))
    if options.peers and "fisher" not in PARTS[options.what]:
        parser.error(f"--peers goes with fisher or all, not with {options.what}")
    if options.what == "distributed" and options.device != "cpu":
        parser.error("distributed measures ranks on the CPU, over gloo")
    if options.plot is not None and not set(PARTS[options.what]) & set(figures.DRAWN):
        parser.error(f"--plot draws {', '.join(figures.DRAWN)}, not {options.what}")
    return options


if __name__ == "__main__":
    sys.exit(main())
