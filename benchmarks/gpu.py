"""Everything that is measured on a GPU, in one call of less than eight minutes: ``make gpu-bench``.

    python -m benchmarks.gpu --json out/gpu.json                          # build, measure, print tables last
    python -m benchmarks.gpu --json out/gpu.json --parts linear profile   # some parts
    python -m benchmarks.gpu --json out/gpu.json --parts tiles            # for tuning: every tile of linear layers
    python -m benchmarks.gpu --json out/gpu.json --device cpu --quick     # a rehearsal without a GPU, not a measurement

Each part runs in a process of its own with a time cap, so that none can stop another; what fails is recorded with its
traceback, and the exit code says so. The record is written after every case, the tables go beside it as text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
BUILD_SECONDS, TOTAL_SECONDS = 150, 450
GRACE = 25  # seconds that a case may run on after its part's time, before its process is ended
STARTS = 3  # processes for one part: each ends at most one case that did not work
SHOWN = 11000  # characters of the table at the end, of the 12,000 that a reader may see


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code: 1 where anything failed."""
    options = _parse(arguments)
    if options.worker:
        return _work(options)
    from .gpu_report import section

    started, folder = time.monotonic(), options.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    plan = {part: options.seconds or PARTS[part][2] for part in options.parts}
    print("plan, seconds:", ", ".join(f"{part} {seconds:g}" for part, seconds in plan.items()), flush=True)
    record: dict[str, Any] = {"plan_seconds": plan, "quick": options.quick, "device": options.device, "parts": {}}
    record |= {"given_commit": options.commit, "sources": digest(), "build": None if options.no_build else _build()}
    for part, seconds in plan.items():
        left = TOTAL_SECONDS - (time.monotonic() - started)
        path = folder / f"{options.json.stem}_{part}.json"
        path.unlink(missing_ok=True)
        if left < 10:
            found = parts.load(path) | {"left_out": {"all": parts.LATE}}
        else:
            found = _run(part, path, min(seconds, left), options)
        record["parts"][part] = found
        record["wall_seconds"] = round(time.monotonic() - started, 1)
        write_json(options.json, record)
        words = f"{len(found['cases'])} cases in {found.get('seconds', 0)} s"
        words += f"; FAILED: {', '.join(found['errors'])}" if found["errors"] else ""
        print(f"{part}: {words}; left out: {len(found['left_out'])}", flush=True)
    tables, failures = section(record), _failures(record)
    write_bytes(options.json.with_suffix(".txt"), (tables + "\n").encode())
    print(_shortened(tables, failures))
    return 1 if failures else 0


def digest() -> str:
    """Return a hash of the sources, which says what was measured where no git tells."""
    total = hashlib.sha256()
    for folder, pattern in (("wplfast", "**/*.py"), ("csrc", "*"), ("benchmarks", "**/*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file():
                total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _build() -> dict[str, Any]:
    """Build the extension in place, without a look at what is installed or could be downloaded."""
    started = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count() or 1}"]
    code, output = _process(command, BUILD_SECONDS, dict(os.environ))
    seconds = round(time.monotonic() - started, 1)
    print(f"build: {'done' if code == 0 else f'exit code {code}'} in {seconds} s", flush=True)
    return {"code": code, "seconds": seconds, "output": output[-4000:]}


def _run(part: str, path: Path, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in processes of its own, a new one after each that ended early; return its record."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--parts", part, "--device", options.device]
    command += ["--json", str(path)] + ["--quick"] * options.quick
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    started, outputs, code = time.monotonic(), [], 0
    for _ in range(STARTS):
        left = seconds - (time.monotonic() - started)
        if outputs and left < 5:
            break
        code, output = _process([*command, "--seconds", f"{left:.0f}"], left + GRACE, environment)
        outputs.append(output)
        if code == 0 or not path.exists():  # done, or nothing was even begun: another start would do no better
            break
    record = parts.load(path)
    if code and not record["errors"]:
        record["errors"]["the process"] = f"exit code {code}"
    record |= {"code": code, "seconds": round(time.monotonic() - started, 1)}
    if code or record["errors"]:
        record["output"] = "\n".join(outputs)[-4000:]
    return record


def _process(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int, str]:
    """Run a program in the checkout; return its exit code, 124 where it took too long, and what it wrote."""
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

    (part,) = options.parts
    module, maker, seconds = PARTS[part]
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    write_json(options.json, parts.load(options.json) | {"place": environment(options.device)})

    def works() -> bool:  # after an illegal access nothing of its process does
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return torch.ones(2, device=device).sum().item() == 2
        except Exception:  # any: errors of CUDA have several types
            return False

    cases = getattr(importlib.import_module(f".{module}", __package__), maker)(device, options.quick)
    return 3 if "lost" in parts.run(cases, options.json, options.seconds or seconds, works) else 0


def _failures(record: dict[str, Any]) -> list[str]:
    """Return a line for everything that failed: the end of its traceback."""
    lines = []
    if record["build"] and record["build"]["code"]:
        lines.append(f"build: {record['build']['output'].strip()[-300:]}")
    for part, found in record["parts"].items():
        for case, words in found["errors"].items():
            last = words.strip().splitlines()[-1] if words.strip() else "no message"
            lines.append(f"FAILED {part} / {case}: {last[:240]}")
        if set(found["errors"]) == {"the process"}:
            lines.append(found.get("output", "").strip()[-400:])
    return lines


def _shortened(tables: str, failures: list[str]) -> str:
    """Return tables and failures, cut where a reader would not see the beginning."""
    ending = "\n".join(failures)[-3500:]
    room = SHOWN - len(ending)
    cut = tables if len(tables) <= room else tables[:room] + "\n... (the rest is in the text file beside the record)"
    return f"\n{cut}\n\n{ending}" if ending else f"\n{cut}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="PATH", help="write the record here")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--parts", nargs="+", choices=list(PARTS), default=[part for part in PARTS if part not in OPTIONAL])
    add("--seconds", type=float, help="each part's time cap instead of the plan's")
    add("--commit", default="", help="the commit, for a copy of the checkout without git")
    add("--no-build", action="store_true", help="take the extension as it is")
    add("--quick", action="store_true", help="tiny sizes: a test of these programs, not a measurement")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.json = options.json.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
