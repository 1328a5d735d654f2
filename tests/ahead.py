"""What a compiler makes of a Triton kernel, without a GPU: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wplfast.backends.triton import fold_tiles
from wplfast.backends.triton.fisher_config import Operands, Tile
from wplfast.backends.triton.fisher_linear import fisher_linear_kernel
from wplfast.backends.triton.launch import OPTIONS

#: Instructions of the tensor cores in PTX.
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma", 120: r"\bmma\.sync"}
#: Shared memory a program may take. Consumer GPUs of a generation have less than its server GPU.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
#: Registers, shared memory and threads of a multiprocessor, of the GPU with least of a generation.
_PROCESSOR = {80: (65536, 100 << 10, 1536), 90: (65536, 228 << 10, 2048), 100: (65536, 228 << 10, 2048),
              120: (65536, 100 << 10, 1536)}  # fmt: skip


def compile_kernel(
    kernel: Any, arch: int, pointers: Mapping[str, str], constants: Mapping[str, object], **options: int
) -> Any:
    """Compile a kernel: ``pointers`` name the types of the pointer arguments, integers are 32 bits wide."""
    names = kernel.arg_names
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    # A launch finds its tensors on 16-byte boundaries, and tells the compiler so except where the kernel forbids it.
    unspecialised = set(kernel.do_not_specialize_on_alignment)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in pointers and n not in unspecialised and pointers[n].startswith("*")
    }
    source = ASTSource(kernel, signature, dict(constants), aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**OPTIONS, **options})


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


def resources(compiled: Any) -> dict[str, int]:
    """Return registers a thread, bytes a thread that spill to memory, and shared memory of a program."""
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool(compiled, "cuobjdump", "--dump-resource-usage")))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]), "shared": compiled.metadata.shared}


def programs_per_processor(arch: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds at once; each takes 1 KiB of shared memory beyond its own."""
    most_registers, most_shared, threads = _PROCESSOR[arch]
    of_registers = most_registers // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, most_shared // (shared + 1024), threads // (32 * warps), 32)


def vector_widths(ptx: str, instruction: str) -> dict[int, int]:
    """Return how many global loads or stores of each width in bytes the code has."""
    widths: dict[int, int] = {}
    pattern = rf"{instruction}\.global(?:\.[a-zA-Z_0-9:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    for count, bits in re.findall(pattern, ptx):
        width = int(count or 1) * int(bits) // 8
        widths[width] = widths.get(width, 0) + 1
    return widths


def asynchronous_copies(ptx: str) -> dict[int, int]:
    """Return how many asynchronous copies of each width in bytes the code has."""
    return {b: len(re.findall(rf"cp\.async\.c[ag]\.shared\.global .*?, 0x{b:x}\b", ptx)) for b in (4, 8, 16)}


def product_loop(compiled: Any) -> list[str]:
    """Return the machine instructions of the loop on tensor cores, none if there is no such loop.

    It is the shortest one with most of their instructions: code that was moved out of line jumps back into it too.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in _tool(compiled, "nvdisasm", "-c").splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
    for index, line in enumerate(instructions):
        jump = re.search(r"BRA.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump[1], index + 1) <= index:
            body = instructions[labels[jump[1]] : index + 1]
            products = sum(bool(re.search(r"[HQ]G?MMA|UTC\w*MMA", other)) for other in body)
            if products:
                loops.append((-products, len(body), body))
    return min(loops)[2] if loops else []


def _tool(compiled: Any, name: str, option: str) -> str:
    """Return what a tool of the compiler's says about the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
