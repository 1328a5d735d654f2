"""What the compiler makes of the Triton kernels, without a GPU: spills, vector widths, tensor-core instructions.

Kernels are compiled ahead of time for three generations. The resource table is printed (``pytest -s``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from ahead import (  # noqa: E402
    SHARED,
    TENSOR_CORES,
    asynchronous_copies,
    compile_kernel,
    compile_linear,
    product_loop,
    programs_per_processor,
    resources,
    vector_widths,
)
from triton.backends.compiler import GPUTarget  # noqa: E402

from wplfast.backends.triton import (  # noqa: E402
    conv_depthwise,
    conv_taps,
    conv_unfold,
    fisher_config,
    fisher_embedding,
    fisher_plan,
    launch,
    penalty_kernel,
    reduce,
    scale,
    scale_unless_one,
    split,
    squares,
)
from wplfast.backends.triton import kernel as kernels  # noqa: E402
from wplfast.backends.triton.launch import Relaunched  # noqa: E402
from wplfast.backends.triton.prepared import TritonPenalty  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")

ARCHITECTURES = [80, 90, 100, 120]
#: Bytes that a thread may spill: the assembler puts a value or two into memory on one or another architecture though
#: registers are free (which, differs between versions of Triton), outside the loops on tensor cores. With Triton 3.7 up
#: to 32 bytes, of threads with 40 (penalty, sm_100) and 48 registers (embedding, sm_90).
FEW_BYTES = 32 if triton.__version__.startswith("3.7.") else 16

#: Columns of tensor memory.
COLUMNS = 512


def report(name: str, arch: int, used: dict[str, int], remark: str) -> None:
    """Print one row of the resource table."""
    print(f"{name:44} sm_{arch:<4} {used['registers']:4} regs {used['spills']:4} spills {used['shared']:7} B  {remark}")


PENALTY = {"chunks": "*i64", "partials": "*fp64", "alpha": "*fp64", "l2": "*fp64"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("n_blocks", [penalty_kernel.FEW_BLOCKS, penalty_kernel.MANY_BLOCKS])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("mode", [penalty_kernel.VALUE, penalty_kernel.STORE, penalty_kernel.ACCUMULATE])
@pytest.mark.parametrize(("dtype", "fisher"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_penalty_moves_16_bytes_a_thread(
    dtype: str, fisher: str, mode: int, offset: bool, n_blocks: int, arch: int
) -> None:
    pointers, types = dict(PENALTY), {"fp32": triton.language.float32, "bf16": triton.language.bfloat16}
    constants = {
        "TYPE": types[dtype], "FISHER": types[fisher], "WIDE": types["fp32"], "MODE": mode, "HAS_OFFSET": offset,
        "PER_TENSOR": True, "BLOCK": penalty_kernel.BLOCK, "N_BLOCKS": n_blocks, "TAIL": penalty_kernel.TAIL,
        "grads": None, "packed": None, "scale": None,
    }  # fmt: skip
    if mode == penalty_kernel.STORE:
        pointers["packed"] = f"*{dtype}"
        del constants["packed"]
    if mode == penalty_kernel.ACCUMULATE:
        pointers |= {"grads": "*i64", "scale": "*fp64"}
        del constants["grads"], constants["scale"]
    compiled = compile_kernel(penalty_kernel.penalty_kernel, arch, pointers, constants, num_warps=penalty_kernel.WARPS)
    used = resources(compiled)
    loads, stores = vector_widths(compiled.asm["ptx"], "ld"), vector_widths(compiled.asm["ptx"], "st")
    name = f"penalty {dtype} F {fisher} mode {mode} offset {int(offset)} blocks {n_blocks}"
    report(name, arch, used, f"ld {loads} st {stores}")
    assert used["spills"] <= FEW_BYTES
    # Three programs of 8 warps fit a multiprocessor; of a value's, whose loop is unrolled, two load as much at a time.
    assert used["registers"] <= (88 if mode == penalty_kernel.VALUE and n_blocks > 1 else 80)
    assert used["shared"] <= 64, "streams of different widths must not meet by way of shared memory"
    elements = penalty_kernel.BLOCK // (32 * penalty_kernel.WARPS)
    streams = 2 + (mode == penalty_kernel.ACCUMULATE)  # theta, theta_hat, grad
    sizes = {"fp32": 4, "bf16": 2}
    size = sizes[dtype]
    halves = elements * sizes[fisher] // 8 if fisher == "bf16" and dtype == "fp32" else 0  # see the kernel's comment
    assert loads.get(8, 0) >= halves
    assert loads.get(16, 0) >= elements * (4 * offset + size * streams + (0 if halves else sizes[fisher])) // 16
    assert (stores.get(16, 0) >= elements * size // 16) == (mode != penalty_kernel.VALUE)


def tile_for(monkeypatch, arch: int, operands, size: int, steps: int, gradient: bool):  # type: ignore[no-untyped-def]
    """Return the tile that a GPU of another architecture would take."""
    monkeypatch.setattr(fisher_plan, "generation", lambda device: fisher_config.rows_of(arch))
    monkeypatch.setattr(fisher_plan, "n_processors", lambda device: 132)
    layer = fisher_plan.Layer(size, size, 8, steps)
    return fisher_plan.choose_plan.__wrapped__(torch.device("cpu"), operands, layer, gradient).tile


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("steps", "gradient"), [(512, False), (512, True), (16, False)])
@pytest.mark.parametrize("kind", ["half", "terms", "tf32", "ieee"])
def test_fisher_linear_resources(kind: str, steps: int, gradient: bool, arch: int) -> None:
    operands = {
        "half": fisher_config.Operands(1, torch.bfloat16),
        "terms": fisher_config.Operands(3, torch.bfloat16),
    }.get(kind, fisher_config.Operands(1, torch.float32, kind))
    for tile in fisher_config.tiles_of(fisher_config.rows_of(arch), operands, steps, gradient):
        compiled = compile_linear(arch, operands, tile, steps, gradient)
        used, ptx = resources(compiled), compiled.asm["ptx"]
        products = len(re.findall(TENSOR_CORES[arch], ptx))
        name = f"fisher {kind} {tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages} T{steps} grad {int(gradient)}"
        report(name, arch, used, f"mma {products} cp.async {asynchronous_copies(ptx)}")
        assert used["spills"] <= FEW_BYTES
        assert not [line for line in product_loop(compiled) if re.search(r"\b(LDL|STL)\b", line)]
        assert used["shared"] <= SHARED[arch]
        assert (getattr(compiled.metadata, "tmem_size", None) or 0) <= COLUMNS, "tensor memory"
        assert programs_per_processor(arch, used["registers"], used["shared"], tile.warps) >= 1
        assert products > 0 or kind == "ieee"
        # Both kinds of stores, as wide as they go.
        assert set(vector_widths(ptx, "st")) == {16}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("terms", "steps", "changes"),
    [
        (3, 64, {"SQUARE": False}),  # T = 1, the squares of float32 as one GEMM
        (1, 512, {"HAS_WEIGHTS": True}),
    ],
)
def test_fisher_linear_variants(terms: int, steps: int, changes: dict[str, bool], arch: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    operands = fisher_config.Operands(terms, torch.bfloat16)
    tile = tile_for(monkeypatch, arch, operands, 4096, steps, False)
    compiled = compile_linear(arch, operands, tile, steps, False, **changes)
    used = resources(compiled)
    report(f"fisher {terms} T{steps} {changes}", arch, used, "")
    assert re.search(TENSOR_CORES[arch], compiled.asm["ptx"])
    assert used["spills"] == 0


#: Terms of the operands, channels of both sides, positions of a sample, plain gradient, changed constants. The tiles
#: are those of the linear kernel, of which more rows are checked above: here a few stand for all.
CONVOLUTIONS = [
    (1, 512, 784, False, {}),
    (1, 512, 784, True, {"HAS_WEIGHTS": True}),
    (1, 64, 3136, False, {"PACKED": True, "OUT_PITCH": 8, "IN_PITCH": 8, "WIDE_ROWS": False}),
    (3, 512, 784, False, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("terms", "size", "steps", "gradient", "changes"), CONVOLUTIONS)
def test_fisher_conv_resources(terms, size, steps, gradient, changes, arch, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    tile = tile_for(monkeypatch, arch, fisher_config.Operands(terms, torch.bfloat16), size, steps, gradient)
    pointers = {"fisher": "*fp32", "grad_outputs": "*bf16", "inputs": "*bf16", "gradient": "*fp32", "weights": "*fp32"}
    constants = {
        "BM": tile.m, "BN": tile.n, "BH": tile.k // 8, "BW": 8, "PACKED": False, "OUT_PITCH": 0, "IN_PITCH": 0,
        "TERMS": terms, "PRECISION": "ieee", "UPCAST": False, "ONE": steps <= tile.k, "ADD": False,
        "HAS_WEIGHTS": False, "HAS_GRADIENT": gradient, "WIDE_ROWS": True,
    } | changes  # fmt: skip
    for name, present in (("weights", constants["HAS_WEIGHTS"]), ("gradient", gradient)):
        if not present:
            constants[name] = None
            del pointers[name]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = compile_kernel(conv_taps.fisher_conv_kernel, arch, pointers, constants, **options)
    used, ptx = resources(compiled), compiled.asm["ptx"]
    copies, stores = asynchronous_copies(ptx), vector_widths(ptx, "st")
    name = f"conv {terms} {tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages} T{steps} {changes or gradient}"
    report(name, arch, used, f"mma {len(re.findall(TENSOR_CORES[arch], ptx))} cp.async {copies} st {stores}")
    assert used["spills"] <= FEW_BYTES
    assert not [line for line in product_loop(compiled) if re.search(r"\b(LDL|STL)\b", line)]
    assert used["shared"] <= SHARED[arch]
    assert (getattr(compiled.metadata, "tmem_size", None) or 0) <= COLUMNS, "tensor memory"
    assert re.search(TENSOR_CORES[arch], ptx)
    assert copies[16] > 0, "operands must come 16 bytes at a time"
    assert copies[4] == copies[8] == 0
    assert set(stores) == {16} or constants["PACKED"]


@pytest.mark.parametrize(("dtype", "arch"), [("fp32", 90), *[("bf16", arch) for arch in ARCHITECTURES]])
def test_kernels_that_wait_for_memory_load_16_bytes_a_thread(dtype: str, arch: int) -> None:
    both = {"fisher": "*fp32", "gradient": "*fp32", "partials": "*fp32", "mean_partials": "*fp32", "tokens": "*i64"}
    rows = {"UNIT": 8, "SPAN": fisher_embedding.SPAN, "BLOCK": fisher_embedding.BLOCK, "HAS_GRADIENT": True}
    uses = {"grad_outputs": f"*{dtype}", "weights": "*fp32", "order": "*i64"}
    scales = {"out": "*fp32", "activations": f"*{dtype}", "grad_outputs": f"*{dtype}"}
    units = {"T_UNIT": 8, "D_UNIT": 8, "A_UNIT": 8, "G_UNIT": 8}
    depthwise = {"fisher": "*fp32", "grad_outputs": f"*{dtype}", "inputs": f"*{dtype}"}
    cases = [
        (
            "embedding", fisher_embedding.fisher_embedding_kernel, both | uses,
            rows | {"ROWS": fisher_embedding.ROWS, "HAS_WEIGHTS": True}, fisher_embedding.WARPS, 96,
        ),
        (
            "fold_spans", fisher_embedding.fold_spans_kernel, both, rows | {"SPANS": fisher_embedding.SPANS},
            fisher_embedding.WARPS, 128,
        ),
        (
            "depthwise", conv_depthwise.fisher_depthwise_kernel, depthwise,
            {
                "BC": conv_depthwise.CHANNELS, "BH": 1, "BW": conv_depthwise.BOX, "TAPS": conv_depthwise.TAPS,
                "OCTETS": True, "REPEAT": False, "HAS_WEIGHTS": False, "HAS_GRADIENT": False, "weights": None,
                "gradient": None,
            },
            conv_depthwise.WARPS, 128,
        ),
    ]  # fmt: skip
    for name, steps, columns, a_dim, g_dim in (
        ("columns", 16, 128, scale.COLUMNS, scale.COLUMNS),
        ("steps", 256, 8, scale.STEPS, scale.STEPS),
        ("both", 16, 128, scale.COLUMNS, scale.STEPS),
    ):
        constants = units | {"BT": steps, "BD": columns, "A_DIM": a_dim, "G_DIM": g_dim}
        cases.append((f"scale {name}", scale.scale_grads_kernel, scales, constants, scale.WARPS, 128))
    for name, kernel, pointers, constants, warps, most in cases:
        compiled = compile_kernel(kernel, arch, pointers, constants, num_warps=warps)
        used, loads = resources(compiled), vector_widths(compiled.asm["ptx"], "ld")
        report(f"{name} {dtype}", arch, used, f"ld {loads} st {vector_widths(compiled.asm['ptx'], 'st')}")
        assert used["spills"] <= FEW_BYTES
        assert used["registers"] <= most
        assert loads.get(16, 0) > 0
        assert loads.get(2, 0) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_small_kernels_do_not_spill(arch: int) -> None:
    cases = {
        "sum_partials": (
            reduce.sum_partials_kernel,
            {"partials": "*fp64", "out": "*fp32", "alpha": "*fp64", "constant": "*fp64"},
            {"SPAN": reduce.SPAN, "BLOCK": 1024, "HAS_CONSTANT": True},
        ),
        "fold_partials": (reduce.fold_partials_kernel, {"partials": "*fp32", "out": "*fp32"}, {"BLOCK": 1024}),
        "fold_taps": (reduce.fold_taps_kernel, {"partials": "*fp32", "out": "*fp32"}, {"ROWS": 64, "TAPS": 16}),
        "unfold": (
            conv_unfold.unfold_kernel,
            {"inputs": "*fp32", "out": "*bf16"},
            {"TERMS": 3, "ROWS": 8, "COLUMNS": 128},
        ),
        "split": (
            split.split_kernel,
            {"x": "*fp32", "out": "*bf16"},
            {"weights": None, "TERMS": 3, "SQUARE": False, "HAS_WEIGHTS": False, "BLOCK": 1024},
        ),
        "accumulate_squares": (
            squares.accumulate_squares_kernel,
            {"out": "*fp32", "grads": "*bf16", "weights": "*fp32"},
            {"ADD": True, "HAS_WEIGHTS": True, "ROWS": squares.ROWS, "BLOCK": squares.BLOCK},
        ),
    }
    for name, (kernel, pointers, constants) in cases.items():
        compiled = compile_kernel(kernel, arch, pointers, constants, num_warps=4)
        used = resources(compiled)
        widths = f"ld {vector_widths(compiled.asm['ptx'], 'ld')} st {vector_widths(compiled.asm['ptx'], 'st')}"
        report(name, arch, used, widths)
        assert used["spills"] <= FEW_BYTES


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("factor", ["fp32", "fp64"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_scale_unless_one_loads_the_factor_first_and_16_bytes_a_thread_then(dtype: str, factor: str, arch: int) -> None:
    pointers, constants = {"tensor": f"*{dtype}", "factor": f"*{factor}"}, {"BLOCK": scale_unless_one.BLOCK}
    kernel = scale_unless_one.scale_unless_one_kernel
    compiled = compile_kernel(kernel, arch, pointers, constants, num_warps=scale_unless_one.WARPS)
    used, ptx = resources(compiled), compiled.asm["ptx"]
    loads, stores = vector_widths(ptx, "ld"), vector_widths(ptx, "st")
    report(f"scale_unless_one {dtype} factor {factor}", arch, used, f"ld {loads} st {stores}")
    assert used["spills"] == 0
    assert used["registers"] <= 64, "four programs of 8 warps must fit a multiprocessor"
    wide = constants["BLOCK"] * int(dtype[2:]) // 8 // (32 * scale_unless_one.WARPS) // 16 if dtype != "bf16" else 2
    assert (loads.get(16, 0), stores.get(16, 0)) == (wide, wide)
    ptx = re.sub(r"\n\s*(?:\.loc|//|\$L__tmp)[^\n]*", "", ptx)
    leaving = re.search(r"setp\.(?:eq|neu)\.f\d+[^\n]*\n\s*@!?%p\d+ bra\s+(\$L\w+);", ptx)
    assert leaving, "one branch, behind a comparison with 1, must lead out"
    assert ptx[: leaving.start()].count("ld.global") == 1
    last = ptx.index(f"\n{leaving[1]}:")
    assert last > leaving.end()
    assert not re.search(r"(ld|st)\.global", ptx[last:])
    assert re.search(r"ret;", ptx[last:])


class Launcher:
    """Notes what a kernel is launched with, in place of launching it."""

    launches: list[tuple[str, tuple]] = []  # noqa: RUF012

    def __init__(self, source, metadata) -> None:  # type: ignore[no-untyped-def]
        self._name = metadata.name

    def __call__(self, *arguments: object) -> None:
        self.launches.append((self._name, arguments))


class Utilities:
    """What Triton asks of a GPU's driver to load a kernel."""

    def load_binary(self, *arguments: object) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[90]}


class Driver:
    """A GPU that does nothing: kernels on CPU tensors are compiled as by any launch, and not run."""

    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches() -> Iterator[list[tuple[str, tuple]]]:
    """Let a driver that does nothing take launches, and return what they were given."""
    kernels = (penalty_kernel.penalty_kernel, reduce.sum_partials_kernel, scale_unless_one.scale_unless_one_kernel)

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()
        Launcher.launches.clear()

    forget()
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(Driver())
    yield Launcher.launches
    forget()
    vars(triton.runtime.driver).update(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prepared_penalties_launch_what_the_jit_would(
    dtype: torch.dtype, launches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "RELAUNCHES", True)
    looks, run = [], triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **kwargs: (looks.append(1), run(*args, **kwargs))[1])
    theta = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (5000, 7)]
    fisher = [torch.rand(p.shape, dtype=torch.float64 if dtype == torch.float64 else torch.bfloat16) for p in theta]
    for p in theta:
        p.grad = torch.zeros_like(p)
    one = torch.ones((), dtype=torch.float64)
    penalty = TritonPenalty(theta, [p.detach().clone() for p in theta], [], fisher, one, one, one)
    for evaluate in (penalty.value, penalty.with_grad, lambda: penalty.add_grad_(one)):
        launches.clear()
        for _ in range(3):
            evaluate()
        assert [name for name, _ in launches] == ["penalty_kernel", "sum_partials_kernel"] * 3
        for first, *others in (launches[0::2], launches[1::2]):
            for other in others:
                assert len(other[1]) == len(first[1])
                for given, jitted in zip(other[1], first[1], strict=True):
                    if isinstance(jitted, torch.Tensor):  # a table, or a new buffer
                        assert (given.dtype, given.shape) == (jitted.dtype, jitted.shape)
                    elif type(jitted).__name__ == "LazyDict":  # what profilers are told
                        assert given.get() == jitted.get()
                    else:
                        assert given == jitted
    for kernel, compiled in ((penalty_kernel.penalty_kernel, 3), (reduce.sum_partials_kernel, 1)):
        assert len(kernel.device_caches[0][0]) == compiled, "one for each mode, one for their sums"
    assert len(looks) == 4, "the JIT looks at the first launches alone"


def test_scale_unless_one_is_compiled_once_for_all_sizes(launches: list) -> None:
    buffer, factor = torch.zeros(100_000), torch.zeros(8)
    for numel in (1, 15, 16, 4096, 4097, 99_000):
        scale_unless_one.scale_unless_one_(buffer[:numel], factor[numel % 3])
    compiled = scale_unless_one.scale_unless_one_kernel.device_caches[0][0]
    assert len(compiled) == 1
    scale_unless_one.scale_unless_one_(buffer[1:], factor[1])
    assert len(compiled) == 2, "memory that is not aligned is another matter"
    assert len(launches) == 7


def test_a_kernel_that_cannot_be_launched_again_goes_through_the_jit(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "RELAUNCHES", True)
    tried, jitted = [], []

    class Compiled(triton.compiler.CompiledKernel):
        def __init__(self) -> None:
            pass

        def __del__(self) -> None:
            pass

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*arguments: object) -> None:
                tried.append(arguments)
                raise TypeError("function takes exactly 3 arguments (2 given)")

            return run

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *arguments, **options: jitted.append(arguments) or Compiled()

    kernel = Relaunched(Kernel())
    for number in range(4):
        kernel[(1,)](number, num_warps=4)
    assert jitted == [(0,), (1,), (2,), (3,)]
    assert tried == [(1,)], "once is enough"
    assert "cannot be launched again" in caplog.text
