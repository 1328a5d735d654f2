"""Every kernel once with small odd sizes under NVIDIA's compute-sanitizer: ``python tests/sanitize.py``.

memcheck finds accesses outside of allocations (without torch's cache, so that each tensor is one), racecheck hazards in
shared memory. ``python tests/sanitize.py --kernels`` is what it runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck")


def compute_sanitizer() -> str | None:
    """Return where the tool is: on the path, or with the CUDA toolkit."""
    places = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((place for place in places if place and Path(place).exists()), None)


class Check:
    """The tool's runs, side by side."""

    def __init__(self, tool: str, folder: Path) -> None:
        self._started = time.time()
        self._runs: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        for name in TOOLS:
            log = folder / f"{name}.log"
            options = [
                f"--tool={name}",
                "--error-exitcode=9",
                "--target-processes=application-only",
                "--print-limit=20",
            ]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [tool, *options, sys.executable, __file__, "--kernels"],
                    cwd=ROOT,
                    env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._runs[name] = process, log

    def finish(self, seconds: float) -> dict[str, Any]:
        """Wait, at most so long, and tell what was found."""
        found: dict[str, Any] = {"tools": {}}
        end = time.time() + seconds
        for name, (process, log) in self._runs.items():
            try:
                code = process.wait(max(0.1, end - time.time()))
                result = {0: "clean", 9: "errors"}.get(code, f"failed with exit code {code}")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                result = "unfinished"
            text = log.read_text(errors="replace")
            if result == "clean" and "all kernels ran" not in text:
                result = "failed: the kernels did not run to their end"
            found["tools"][name] = {"result": result, "log": text[-8000:]}
        results = {name: run["result"] for name, run in found["tools"].items()}
        told = ", ".join(f"{name} {result}" for name, result in results.items())
        found["result"] = "errors" if "errors" in results.values() else told
        found["seconds"] = round(time.time() - self._started, 1)
        return found


class Missing:
    """Stands for the tool where there is none: the result says so."""

    def finish(self, seconds: float) -> dict[str, Any]:
        """Tell that nothing was checked."""
        return {"result": "NOT RUN: compute-sanitizer was not found on PATH or in /usr/local/cuda*/bin", "tools": {}}


def start(folder: Path) -> Check | Missing:
    """Start the tool, if there is one."""
    tool = compute_sanitizer()
    return Missing() if tool is None else Check(tool, folder)


def run_kernels(device: str) -> None:
    """Call every operator for every dtype, aligned and not."""
    import torch

    os.environ["WPLFAST_TEST_DEVICE"] = device
    import test_gpu_operators as cases
    from gpu_cases import map_nested

    there = torch.device(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, make in cases.INPUTS.items():
            inputs = make(dtype)
            cases.call(name, map_nested(lambda t: t.to(there), inputs))
            shifted = map_nested(lambda t: cases.shifted(t, there) if t.dim() else t.to(there), inputs)
            cases.call(name, shifted)
            if there.type == "cuda":
                torch.cuda.synchronize()
            print(name, dtype, flush=True)
    print("all kernels ran", flush=True)


def main() -> int:
    """Run the tool and print what it found; exit code 0 if it is clean, 1 if not, 3 if it is missing."""
    import tempfile

    if "--kernels" in sys.argv:
        run_kernels("cpu" if "--cpu" in sys.argv else "cuda")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = start(Path(folder)).finish(float(os.environ.get("WPLFAST_SANITIZE_LIMIT", "420")))
    for name, run in found["tools"].items():
        print(f"---- {name}: {run['result']}\n{run['log'] if run['result'] != 'clean' else ''}")
    print(f"sanitizer: {found['result']}")
    if not found["tools"]:
        return 3
    return 0 if all(run["result"] == "clean" for run in found["tools"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
