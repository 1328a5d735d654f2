"""Records of runs: where they ran, and files that are either whole or untouched."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return hardware, versions and, in a git checkout, the commit that a run stands for."""
    import torch  # here, so that a program can write records before torch is imported, or wplfast is built

    import wplfast

    system = f"{platform.system()} {platform.machine()}"
    hardware: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": system}
    if device.startswith("cuda"):
        hardware |= _gpu(torch.cuda.get_device_properties(device))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "wplfast": wplfast.__version__}
    if device.startswith("cuda"):
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": version("triton")}
        versions["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    backend = wplfast.backends.serving(torch.device(device).type)
    return {"hardware": hardware, "versions": versions, "backend": backend, "commit": _commit()}


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under another name and move it into place, so that a failure leaves the old one as it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _gpu(properties: Any) -> dict[str, Any]:
    """Return what torch tells about a GPU."""
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_processors": properties.multi_processor_count,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_l2_bytes": getattr(properties, "L2_cache_size", None),
    }


def version(package: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Return the CPU's name as the system tells it."""
    from wplfast.backends.processor import first_of  # here, as above

    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = first_of(cpuinfo.read_text())
        if "model name" in found:  # which a virtual machine may shorten to that of all generations
            keys = (("family", "cpu family"), ("model", "model"))
            numbers = [f"{name} {found[key]}" for name, key in keys if key in found]
            return found["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout around this file, marked where wplfast or benchmarks differ from it."""
    root = Path(__file__).resolve().parents[2]
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if not commit:
        return None
    paths = ("wplfast", "csrc", "benchmarks/*.py")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", *paths)
    return f"{commit}-dirty" if changed else commit


def _output(*command: str) -> str | None:
    """Return what a command prints, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
