"""What a Triton launch costs the host: compiled at run time by the JIT, or from a pack; at first use, and ever after.

    python -m benchmarks.launches [--device cuda] [--json]

Without a GPU, launches go to a CUDA driver that does nothing (``plumbing/fake_cuda.c``): what is measured is then the
host's part alone, compilation and the way to the driver, and no real driver's. Each way runs in a process of its own,
with an empty Triton cache; the pack is made beforehand, for the calls measured here, and its making is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .plumbing import fake_cuda
from .plumbing.record import environment
from .timing import Spread

ROOT = Path(__file__).parent.parent
#: Launches between two looks at the clock (a GPU's queue holds more), and how often that is repeated.
LAUNCHES, ROUNDS = 200, 31
WAYS = ("jit", "pack")


def calls() -> dict[str, Callable[[], object]]:
    """Return calls as training makes them, by name."""
    from wplfast.backends.triton.packs import cases

    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "linear, bfloat16, 128 steps": partial(cases._linear, bf16, 8, 128, 512, 512),
        "linear, float32, one step": partial(cases._linear, fp32, 64, 1, 512, 512),
        "convolution 64 to 64, 28 x 28": partial(cases._conv, fp32, 8, (64, 64), 28, 3),
        "embedding": partial(cases._embedding, bf16, 4, 64, 256, False),
        "layer norm": partial(cases._scale, bf16, 64, 128, 768, False),
        "biases": partial(cases._squares, bf16, 8, 64, False),
        "penalty, all forms": partial(cases._penalty, fp32, fp32, 4096, False, False),
    }


def _place(device: str) -> AbstractContextManager[object]:
    """Return a context in which tensors are made where kernels run."""
    return torch.device(device) if device.startswith("cuda") else nullcontext()


def _arch(device: str) -> int:
    """Return the target to compile for."""
    if not device.startswith("cuda"):
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _processors(device: str) -> int:
    """Return how many processors there are, which decides about some calls' kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.startswith("cuda") else 132


def _synchronise(device: str) -> None:
    """Wait for what was launched."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _seconds(run: Callable[[], object], device: str) -> float:
    """Return how long a call takes, with what it launches."""
    started = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - started


def _microseconds(run: Callable[[], object], device: str) -> dict[str, float]:
    """Return the host's time for one of many launches, as a spread over several rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(LAUNCHES):
            run()
        times.append((time.perf_counter() - started) / LAUNCHES)
        _synchronise(device)
    return asdict(Spread.of(times, 1e6))


def measure(way: str, device: str) -> dict[str, Any]:
    """Measure one way of launching in this process."""
    import triton

    from wplfast.backends.triton import kernel, scale_unless_one
    from wplfast.backends.triton.launch import OPTIONS, PRETENDED, Relaunched

    PRETENDED.update(processors=_processors(device), capability=_arch(device))
    cold: dict[str, float] = {}
    started = time.perf_counter()
    if way == "jit":
        if device.startswith("cuda"):
            triton.runtime.driver.active.get_current_target()
        else:
            triton.runtime.driver.set_active(fake_cuda.triton_driver(_arch(device)))
        kernel.serve(None)
    elif not device.startswith("cuda"):
        kernel.serve(fake_cuda.server(required=True, capability=_arch(device)))
    cold["driver, or server of packs"] = time.perf_counter() - started
    with _place(device):
        torch.empty(1).zero_()  # the GPU's context is not of interest
        for name, call in calls().items():
            cold[name] = _seconds(call, device)
        one = torch.zeros(64), torch.zeros(()), 64, scale_unless_one.BLOCK
    function, options = scale_unless_one.scale_unless_one_kernel, {"num_warps": scale_unless_one.WARPS, **OPTIONS}
    again = Relaunched(function)
    warm = {
        "launch": _microseconds(lambda: function[(1,)](*one, **options), device),
        "launch again, known kind": _microseconds(lambda: again[(1,)](*one, **options), device),
    }
    return {"cold_seconds": cold, "warm_microseconds": warm}


def make_pack(folder: Path, device: str) -> int:
    """Make a pack of what is measured here; return the number of its kernels."""
    from wplfast.backends.triton import scale_unless_one_
    from wplfast.backends.triton.packs import precompile

    def cases() -> list[Callable[[], object]]:
        return [*calls().values(), lambda: scale_unless_one_(torch.zeros(64), torch.zeros(()))]

    precompile.PROCESSORS = _processors(device)
    precompile.CASES["benchmark"] = cases  # type: ignore[assignment]
    compiled = precompile.record(_arch(device), ["benchmark"]).compiled
    precompile.write(folder / f"sm_{_arch(device)}.zip", _arch(device), compiled)
    return len(compiled)


def run(device: str = "cpu") -> dict[str, Any]:
    """Measure all ways on a device; return the record."""
    record: dict[str, Any] = {**environment(device), "device": device, "driver": "the GPU's"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: Mapping[str, str] = os.environ
        if not device.startswith("cuda"):
            record["driver"] = "one that does nothing, in place of a GPU's"
            settings = fake_cuda.environment(fake_cuda.build(folder / "libraries"), FAKE_CUDA_QUIET="1")
        record["kernels"] = _worker("build", device, folder / "packs", settings)
        for way in WAYS:
            kernels = {"TRITON_CACHE_DIR": str(folder / "cache" / way), "WPLFAST_KERNELS": way}
            record[way] = _worker(way, device, folder / "packs", {**settings, **kernels})
    return record


def _worker(task: str, device: str, folder: Path, settings: Mapping[str, str]) -> Any:
    """Run a task in a process of its own and return what it found."""
    command = [sys.executable, "-m", "benchmarks.launches", "--task", task, "--device", device, "--folder", str(folder)]
    done = subprocess.run(
        command, env={**settings, "WPLFAST_PACKS": str(folder)}, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def table(record: Mapping[str, Any]) -> str:
    """Return a record as tables in Markdown."""
    lines = [f"{record['kernels']} kernels; the driver is {record['driver']}.", ""]
    lines += ["| first use, seconds | JIT | pack |", "|---|---|---|"]
    jit, pack = (record[way]["cold_seconds"] for way in WAYS)
    lines += [f"| {name} | {jit[name]:.3f} | {pack[name]:.4f} |" for name in jit]
    lines += [f"| all | {sum(jit.values()):.2f} | {sum(pack.values()):.3f} |", ""]
    lines += ["| host, microseconds a launch, median [quartiles] | JIT | pack |", "|---|---|---|"]
    jit, pack = (record[way]["warm_microseconds"] for way in WAYS)
    lines += [f"| {name} | {Spread(**jit[name])} | {Spread(**pack[name])} |" for name in jit]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the record instead of tables")
    parser.add_argument("--task", choices=("build", *WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.task == "build":
        print(make_pack(arguments.folder, arguments.device))
    elif arguments.task:
        print(json.dumps(measure(arguments.task, arguments.device)))
    else:
        record = run(arguments.device)
        print(json.dumps(record, indent=1) if arguments.json else table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
