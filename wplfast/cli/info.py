"""``wplfast info``: what is installed and what will run where."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from .. import __version__, backends


def info() -> list[tuple[str, str]]:
    """Return what there is to know about this installation, as pairs of label and value."""
    rows = [
        ("wplfast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("cpu served by", backends.serving("cpu")),
        ("cuda served by", backends.serving("cuda")),
    ]
    cpp = backends.available().get("cpp")
    rows.append(("cpp instruction set", cpp.ISA if cpp is not None else "-"))
    rows.append(("threads", str(torch.get_num_threads())))
    if torch.cuda.is_available():
        rows += [(f"gpu {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    else:
        rows.append(("gpu", "none"))
    rows += kernels()
    rows += [(f"{name} is missing", reason) for name, reason in backends.missing().items()]
    return rows


def kernels() -> list[tuple[str, str]]:
    """Return which packs of precompiled Triton kernels there are, and which GPU they serve."""
    if "triton" not in backends.available():
        return []
    from ..backends.triton import kernel
    from ..backends.triton.packs import archives as packs

    launcher = {
        "jit": "Triton's own launcher (WPLFAST_KERNELS=relaunch, auto: faster ones, which no GPU has tried yet)",
        "relaunch": "Triton's own launcher, then as compiled (WPLFAST_KERNELS=relaunch)",
        "auto": "packs, else Triton's JIT (WPLFAST_KERNELS=auto)",
        "pack": "packs alone (WPLFAST_KERNELS=pack)",
    }
    rows = [("kernels launched by", launcher[kernel.mode()])]
    for arch, path in sorted(packs.present().items()):
        pack = packs.open_pack(path)
        held = "unusable" if pack is None else f"{len(pack)} kernels by Triton {pack.triton}"
        rows.append((f"kernels sm_{arch}", f"{held}, {path.stat().st_size / 1e6:.1f} MB"))
    if len(rows) == 1:
        rows.append(("kernels", "none precompiled"))
    for i in range(torch.cuda.device_count()):
        pack = packs.find(torch.cuda.get_device_capability(i)) if kernel.SERVER is not None else None
        rows.append(
            (f"gpu {i} kernels from", "Triton's JIT" if pack is None else f"{pack.path.name}, else Triton's JIT")
        )
    return rows


def _version(package: str) -> str:
    """Return an installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "info",
        help="what is installed, and what will run where",
        description="Print versions, backends, instruction set, threads, GPUs, and who launches kernels on them.",
        epilog="example: wplfast info",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = info()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    return 0
