"""Everything that is measured on a GPU, in one call of less than eight minutes: ``make gpu-bench``.

    python -m benchmarks.gpu --json out/gpu.json                          # measure, print tables last
    python -m benchmarks.gpu --json out/gpu.json --parts linear profile   # some parts
    python -m benchmarks.gpu --json out/gpu.json --parts tiles            # for tuning: every tile of linear layers
    python -m benchmarks.gpu --json out/gpu.json --device cpu --quick     # a rehearsal without a GPU, not a measurement

Each part runs in a process of its own with a time cap, so that none can stop another; what fails is recorded with its
traceback, and the exit code says so. The record is written after every case, the tables go beside it as text.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .plumbing import parts
from .plumbing.record import write_bytes, write_json

ROOT = Path(__file__).resolve().parent.parent
#: part -> (module, what makes its cases, seconds after which no further case begins). In the order in which they run.
PARTS: dict[str, tuple[str, str, float]] = {
    "roofs": ("roofs", "cases", 15),
    "linear": ("kernels", "linear_cases", 50),
    "fisher": ("fisher", "cases", 110),
    "penalty": ("penalty_kernels", "cases", 45),
    "layers": ("layers", "cases", 45),
    "profile": ("passes", "cases", 30),
    "peers": ("peers", "cases", 35),
    "compiled": ("penalty_kernels", "compiled_cases", 60),
    "tiles": ("tiles", "cases", 60),
}
OPTIONAL = ("tiles",)  # part of a run only where asked for
TOTAL_SECONDS = 450
GRACE = 25  # seconds that a case may run on after its part's time, before its process is ended
STARTS = 3  # processes for one part: each ends at most one case that did not work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code: 1 where anything failed."""
    options = _parse(arguments)
    if options.worker:
        return _work(options)
    from .gpu_report import section

    started, plan = time.monotonic(), {part: options.seconds or PARTS[part][2] for part in options.parts}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    print("plan, seconds:", ", ".join(f"{part} {seconds:g}" for part, seconds in plan.items()), flush=True)
    record: dict[str, Any] = {"plan_seconds": plan, "quick": options.quick, "device": options.device, "parts": {}}
    record["given_commit"] = options.commit
    for part, seconds in plan.items():
        left = TOTAL_SECONDS - (time.monotonic() - started)
        late = parts.EMPTY | {"left_out": {"all": parts.LATE}}
        record["parts"][part] = found = late if left < 10 else _run(part, min(seconds, left), options)
        record["wall_seconds"] = round(time.monotonic() - started, 1)
        write_json(options.json, record)
        words = f"; FAILED: {', '.join(found['errors'])}" if found["errors"] else ""
        print(f"{part}: {len(found['cases'])} cases, {len(found['left_out'])} left out{words}", flush=True)
    tables, failures = section(record), list(_failures(record))
    write_bytes(options.json.with_suffix(".txt"), (tables + "\n").encode())
    print("", tables, "", *failures, sep="\n")
    return 1 if failures else 0


def _run(part: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in processes of its own, a new one after each that ended early; return its record."""
    path = options.json.parent / f"{options.json.stem}_{part}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--parts", part, "--device", options.device]
    command += ["--json", str(path)] + ["--quick"] * options.quick
    started, output, code = time.monotonic(), "", 0
    for _ in range(STARTS):
        left = seconds - (time.monotonic() - started)
        if output and left < 5:
            break
        code, words = _process([*command, "--seconds", f"{left:.0f}"], left + GRACE)
        output += words
        if code == 0 or not path.exists():  # done, or nothing was even begun: another start would do no better
            break
    record = parts.load(path)
    if code and not record["errors"]:
        record["errors"]["the process"] = f"exit code {code}: {output[-400:]}"
    return record | {"code": code, "seconds": round(time.monotonic() - started, 1), "output": output[-4000:]}


def _process(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a program in the checkout; return its exit code, 124 where it took too long, and what it wrote."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as any process of its own lives
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, str(error)
        words = ""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code, words = 124, f"\nended after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its session is its own: this ends what it started too
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace") + words


def _work(options: argparse.Namespace) -> int:
    """Run one part in this process; return 3 where it lost the device."""
    import torch

    from .plumbing.record import environment

    module, maker, seconds = PARTS[options.parts[0]]
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    write_json(options.json, parts.load(options.json) | {"place": environment(options.device)})

    def works() -> bool:  # after an illegal access nothing of its process does
        try:
            torch.cuda.empty_cache()
            return torch.ones(2, device=device).sum().item() == 2
        except Exception:  # any: errors of CUDA have several types
            return False

    cases = getattr(importlib.import_module(f".{module}", __package__), maker)(device, options.quick)
    return 3 if "lost" in parts.run(cases, options.json, options.seconds or seconds, works) else 0


def _failures(record: dict[str, Any]) -> Iterator[str]:
    """Yield a line for everything that failed: the end of its traceback."""
    for part, found in record["parts"].items():
        for case, words in found["errors"].items():
            yield f"FAILED {part} / {case}: {words.strip().splitlines()[-1][:240]}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--json", type=lambda path: Path(path).resolve(), required=True, metavar="PATH", help="write the record here")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--parts", nargs="+", choices=list(PARTS), default=[part for part in PARTS if part not in OPTIONAL])
    add("--seconds", type=float, help="each part's time cap instead of the plan's")
    add("--commit", default="", help="the commit, for a copy of the checkout without git")
    add("--quick", action="store_true", help="tiny sizes: a test of these programs, not a measurement")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
