"""Makes packs: ``python -m wplfast.backends.triton.packs.precompile --archs 80 90 100 --out FOLDER``.

What a pack holds is found by running this backend's operators (``precompile_cases``) with launches recorded in place
of run: Triton compiles each for the target as it would at run time. No GPU is needed. What is written down about the
arguments of a launch is compared with what Triton has compiled for them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .... import __version__
from .. import kernel, launch
from ..fisher_plan import choose_plan
from . import archives as packs
from .archives import FORMAT, MANIFEST, Precompiled
from .cases import CASES

OLDEST = 80
#: Processors that targets pass for: as many as a large GPU has. They decide about grids, not about kernels.
PROCESSORS = 132
#: Shared memory of a program in KiB, where a target has less than the largest.
_SHARED, _MOST_SHARED = {86: 99, 89: 99, 120: 99, 121: 99}, 227
#: Columns of tensor memory, where a target has it.
_MOST_COLUMNS = 512
#: One compiled kernel: function, what its arguments are like, entry of the manifest, code.
Compiled = tuple[str, str, Precompiled, bytes]


class Target:
    """A driver for Triton that knows what to compile for, and launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """Return the device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """Compiles what is launched, once for each kind of arguments; every shard of several compiles a part of them.

    Args:
        arch: target, such as 90.
        shard: which part, from 0 on.
        shards: of how many.
    """

    def __init__(self, arch: int, shard: int = 0, shards: int = 1) -> None:
        self._arch, self._shard, self._shards = arch, shard, shards
        self._tables = kernel.Tables()
        self.compiled: list[Compiled] = []
        self.seen: set[tuple[str, str]] = set()
        self.too_large: list[str] = []

    def launch(self, function: kernel.Kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Compile what this would launch."""
        name = function.__name__
        key = self._tables.table(function).key(args, options)
        if key is None:
            raise RuntimeError(f"a launch of {name} has arguments of a kind that packs do not know")
        if (name, key) in self.seen:
            return
        self.seen.add((name, key))
        if zlib.crc32(f"{name} {key}".encode()) % self._shards != self._shard:
            return
        try:
            compiled = function.run(*args, grid=grid, warmup=True, **options)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]  # it may go on with the whole program
            raise RuntimeError(
                f"Triton {triton.__version__} cannot compile {name}({key}) for sm_{self._arch}: {reason}"
            ) from None
        expected = described(compiled, options)
        if key != expected:
            raise RuntimeError(f"{name} was launched with {key}, but Triton compiled {expected}")
        shared = compiled.metadata.shared
        if shared > _SHARED.get(self._arch, _MOST_SHARED) << 10:
            self.too_large.append(f"{name}({key}): {shared} bytes of shared memory")
            return
        if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > _MOST_COLUMNS:
            self.too_large.append(f"{name}({key}): {columns} columns of tensor memory")
            return
        code = compiled.asm["cubin"]
        image = hashlib.sha256(code).hexdigest()[:32] + ".cubin"
        entry = Precompiled(compiled.name, image, compiled.metadata.num_warps, shared, parameters(compiled, key))
        self.compiled.append((name, key, entry, code))


def described(compiled: Any, options: dict[str, Any]) -> str:
    """Return what Triton specialised a kernel on, as ``_C.LaunchTable`` writes it for the arguments of a launch."""
    source, parts = compiled.src, []
    for index, name in enumerate(source.fn.arg_names):
        kind = source.signature[name]
        if kind == "constexpr":
            value = source.constants[index,]
            parts.append(f"={value.name if isinstance(value, triton.language.dtype) else repr(value)},")
        else:
            divisible = ["tt.divisibility", 16] in [list(fact) for fact in source.attrs.get((index,), [])]
            parts.append(kind + "D" * divisible + ",")
    for name in kernel.OPTION_NAMES:
        value = getattr(compiled.metadata, name)
        parts.append("/" + (f"={value!r}" if name in options else ""))
    return "".join(parts)


def parameters(compiled: Any, key: str) -> str:
    """Return which arguments the code takes, as ``_C.LoadedKernel`` wants it; compared with what the code declares."""
    numbers = {"i32": "i", "i32D": "i", "i64": "l", "i64D": "l"}
    parts = key.rpartition(",")[0].split(",")
    kinds = ["-" if part[0] == "=" else "p" if part[0] == "*" else numbers[part] for part in parts]
    metadata = compiled.metadata
    entry = compiled.asm["ptx"].partition(f".entry {compiled.name}(")[2].partition(")")[0]
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[bsu](\d+)", entry)]
    expected = [4 if kind == "i" else 8 for kind in kinds if kind != "-"] + [8, 8]
    scratch = metadata.global_scratch_size, metadata.profile_scratch_size
    plain = (metadata.num_ctas, *scratch, metadata.launch_pdl, metadata.launch_cooperative_grid) == (1, 0, 0, 0, 0)
    if sizes != expected or not plain:
        raise RuntimeError(
            f"{compiled.name} takes {sizes} bytes of parameters, expected {expected}, or needs {metadata}"
        )
    return "".join(kinds)


def record(arch: int, chosen: Sequence[str] = tuple(CASES), shard: int = 0, shards: int = 1) -> Recorder:
    """Run cases for a target; return what was compiled. It stays what this process compiles for."""
    launch.PRETENDED.update(processors=PROCESSORS, capability=arch)
    for remembered in (launch.n_processors, launch.capability, choose_plan):
        remembered.cache_clear()
    triton.runtime.driver.set_active(Target(arch))
    triton.knobs.compilation.disable_line_info = True  # a third of the code, and paths of this machine
    recorder = Recorder(arch, shard, shards)
    kernel.serve(recorder)
    for name in chosen:
        for case in CASES[name]():
            case()
    return recorder


def _compile(arch: int, chosen: Sequence[str], shard: int, shards: int) -> tuple[list[Compiled], list[str]]:
    """Return one shard's kernels and what was left out, in a process of its own."""
    torch.set_num_threads(1)
    recorder = record(arch, chosen, shard, shards)
    return recorder.compiled, recorder.too_large


def write(path: Path, arch: int, compiled: Sequence[Compiled]) -> None:
    """Write a pack, the same bytes for the same kernels."""
    entries: dict[str, dict[str, Any]] = {}
    images = {entry.image: code for _, _, entry, code in compiled}
    for name, key, entry, _ in sorted(compiled, key=lambda item: item[:2]):
        entries.setdefault(name, {})[key] = asdict(entry)
    manifest = {
        "format": FORMAT, "wplfast": __version__, "triton": triton.__version__, "arch": arch,
        "sources": packs.sources(), "kernels": entries,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in ((MANIFEST, json.dumps(manifest, indent=1).encode()), *sorted(images.items())):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def build(archs: Sequence[int], out: Path, chosen: Sequence[str] = tuple(CASES), jobs: int = 2) -> list[Path]:
    """Make packs for targets and return their files."""
    for arch in archs:
        if arch < OLDEST:
            raise ValueError(f"packs are for targets from {OLDEST} on, got {arch}")
    if launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 compiles nothing: unset it to make packs")
    if packs.EXTENSION is None:
        raise ImportError("packs are launched by the C++ extension wplfast._C, which is missing")
    paths, shards = [], 2 * jobs
    for arch in archs:
        started = time.perf_counter()
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:  # a process has one target
            tasks = [pool.submit(_compile, arch, chosen, shard, shards) for shard in range(shards)]
            found = [task.result() for task in tasks]
        compiled = [kernel for kernels, _ in found for kernel in kernels]
        path = out / f"sm_{arch}.zip"
        write(path, arch, compiled)
        paths.append(path)
        seconds, size = time.perf_counter() - started, path.stat().st_size
        print(f"{path}: {len(compiled)} kernels, {seconds:.0f} s, {size / 1e6:.1f} MB", flush=True)
        for _, left_out in found:
            for what in left_out:
                print(f"{path}: left out {what}", flush=True)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m wplfast.backends.triton.packs.precompile", description="Make packs."
    )
    parser.add_argument("--archs", type=int, nargs="+", required=True, help="targets, such as 80 90 100")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the packs")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what to compile for")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.archs, arguments.out, arguments.cases, arguments.jobs)
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
