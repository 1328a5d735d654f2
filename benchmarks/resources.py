"""What the compiler makes of the Fisher kernels, without a GPU: a record, and the page ``KERNELS.md`` from it.

    python -m benchmarks.resources                  # compile everything with the Triton that is installed
    python -m benchmarks.resources --page           # write the page from the record alone

Registers differ between versions of Triton; ``tests/test_tiles.py`` compares the record with the version it names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from wplfast.backends.triton import fisher_config, fold_tiles
from wplfast.backends.triton.fisher_config import Operands, Tile
from wplfast.backends.triton.fisher_linear import fisher_linear_kernel

from .candidates.matrices import DESCRIPTORS, HALF, TERMS
from .candidates.tma import fisher_tma_kernel
from .plumbing.ahead import (
    TENSOR_CORES,
    asynchronous_copies,
    compile_kernel,
    product_loop,
    programs_per_processor,
    resources,
    vector_widths,
)
from .plumbing.record import write_bytes, write_json

ARCHITECTURES = (80, 90, 100, 120)
RECORD = Path(__file__).parent / "results" / "kernels.json"
PAGE = Path(__file__).parent / "KERNELS.md"
KINDS = {
    "bf16": Operands(1, torch.bfloat16),
    "fp32 as bf16x6": Operands(3, torch.bfloat16),
    "tf32": Operands(1, torch.float32, "tf32"),
    "ieee": Operands(1, torch.float32, "ieee"),
}


@dataclass(frozen=True)
class Case:
    """One compiled kernel: ``default`` tiles are those that the library chooses from."""

    arch: int
    kind: str
    tile: Tile
    steps: int
    gradient: bool
    default: bool = True
    tma: bool = False

    @property
    def name(self) -> str:
        """Return what the record calls it."""
        t = self.tile
        what = ("" if self.default else "candidate ") + ("tma " if self.tma else "") + self.kind
        tail = " with gradient" if self.gradient else ""
        return f"sm_{self.arch} {what} {t.m}x{t.n}x{t.k} w{t.warps} s{t.stages} T={self.steps}{tail}"


def cases() -> Iterator[Case]:
    """Yield every row of the tile table for every architecture, and the candidates for sm_90."""
    for arch in ARCHITECTURES:
        for kind, operands in KINDS.items():
            for steps, gradient in ((512, False), (512, True), (16, False)):
                for tile in fisher_config.tiles_of(fisher_config.rows_of(arch), operands, steps, gradient):
                    yield Case(arch, kind, tile, steps, gradient)
    for tiles, kind, tma in ((HALF, "bf16", False), (TERMS, "fp32 as bf16x6", False), (DESCRIPTORS, "bf16", True)):
        for tile in tiles:
            yield Case(90, kind, tile, 512, False, default=False, tma=tma)


def compile_linear(arch: int, operands: Operands, tile: Tile, steps: int, gradient: bool, **changes: bool) -> Any:
    """Compile the linear layer's kernel."""
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[operands.dtype]
    constants: dict[str, Any] = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": fold_tiles.GROUP, "TERMS": operands.terms,
        "PRECISION": operands.precision, "UPCAST": False, "SQUARE": True, "ONE": steps <= tile.k,
        "HAS_WEIGHTS": False, "HAS_GRADIENT": gradient,
    } | changes  # fmt: skip
    optional = {
        "fisher": True, "gradient": gradient, "weights": constants["HAS_WEIGHTS"], "partials": True,
        "mean_partials": gradient,
    }  # fmt: skip
    pointers = dict.fromkeys(("grad_outputs", "activations"), f"*{element}")
    pointers |= {name: "*fp32" for name, present in optional.items() if present}
    constants |= {name: None for name, present in optional.items() if not present}
    return compile_kernel(fisher_linear_kernel, arch, pointers, constants, num_warps=tile.warps, num_stages=tile.stages)


def compile_descriptors(arch: int, tile: Tile) -> Any:
    """Compile the candidate with tensor descriptors."""
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": fold_tiles.GROUP, "UPCAST": False}
    constants |= {"WHOLE": True, "SHARED": True}
    pointers = {"fisher": "*fp32", "partials": "*fp32"}
    for name, width in (("grad_outputs", tile.m), ("activations", tile.n)):
        pointers[name] = f"tensordesc<bf16[1,{tile.k},{width}]>"
    return compile_kernel(fisher_tma_kernel, arch, pointers, constants, num_warps=tile.warps, num_stages=tile.stages)


def measure(case: Case) -> dict[str, Any]:
    """Compile a case and return its row."""
    if case.tma:
        compiled = compile_descriptors(case.arch, case.tile)
    else:
        compiled = compile_linear(case.arch, KINDS[case.kind], case.tile, case.steps, case.gradient)
    ptx, used = compiled.asm["ptx"], resources(compiled)
    return {
        **used,
        "programs": programs_per_processor(case.arch, used["registers"], used["shared"], case.tile.warps),
        "tensor_core": len(re.findall(TENSOR_CORES[case.arch], ptx)),
        "copies": {str(width): count for width, count in asynchronous_copies(ptx).items() if count},
        "stores": {str(width): count for width, count in vector_widths(ptx, "st").items()},
        "loop": len(product_loop(compiled)) or None,
    }


def page(records: dict[str, dict[str, Any]]) -> str:
    """Return the page for records by version of Triton."""
    lines = [
        "# What the compiler makes of the Fisher kernels", "",
        "Compiled ahead of time, without a GPU; nothing here was timed. Made by `python -m benchmarks.resources`.", "",
        "Bytes are those of one asynchronous copy or store of a thread, with how many the code has; copies by TMA are",
        "none of a thread's. Programs: how many a multiprocessor holds, by registers, shared memory and threads, on",
        "the GPU of a generation that has least. Loop: machine instructions of the loop on tensor cores.",
    ]  # fmt: skip
    for version, record in sorted(records.items()):
        lines += ["", f"## Triton {version}", ""]
        head = "kernel|registers|spilled bytes|shared KiB|programs|tensor-core instructions|copies|stores|loop"
        lines += [f"| {head.replace('|', ' | ')} |", "|" + "---|" * 9]
        for name, row in record.items():
            copies, stores = (
                ", ".join(f"{count} x {width} B" for width, count in row[key].items()) or "-"
                for key in ("copies", "stores")
            )
            shown = (row["registers"], row["spills"], f"{row['shared'] / 1024:.0f}", row["programs"])
            cells = (name, *shown, row["tensor_core"], copies, stores, row["loop"] or "-")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.resources", description=__doc__, formatter_class=form)
    parser.add_argument("--page", action="store_true", help="compile nothing")
    options = parser.parse_args(arguments)
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not options.page:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(cases())
            rows = pool.map(measure, found)
            records[triton.__version__] = dict(zip((case.name for case in found), rows, strict=True))
        write_json(RECORD, records)
    write_bytes(PAGE, page(records).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
