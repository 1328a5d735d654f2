"""What only the C++ backend has: threads, instruction sets, raw addresses, and a run of its kernels under sanitizers.

That its results are right is checked beside the other backends in ``test_ops.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from wplfast import backends
from wplfast.backends import reference

if "cpp" not in backends.available():
    pytest.skip(f"the C++ backend is missing: {backends.missing().get('cpp')}", allow_module_level=True)

from wplfast.backends import cpp

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512"]
#: An operator's name, the shape of F, what its gradients are products of, and settings.
Call: TypeAlias = "tuple[str, list[int], tuple[Tensor, Tensor], tuple[Any, ...]]"


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    """Leave torch's number of threads as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_anchors(sizes: list[int], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    return {
        "theta": [torch.randn(size).to(dtype) for size in sizes],
        "theta_hat": [torch.randn(size).to(dtype) for size in sizes],
        "offset": [0.01 * torch.randn(size, dtype=wide(dtype)) for size in sizes],
        "fisher": [torch.rand(size, dtype=wide(dtype)) for size in sizes],
    }


#: (N, M, S, C_in, C_out, K, stride, padding, dilation, groups): tiles with patches on either side, groups, depthwise.
CONVOLUTIONS = [
    (33, 1, (12, 12), 8, 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (5, 2, (25, 21), 3, 30, (5, 3), (2, 1), (2, 1), (1, 2), 1),
    (300, 1, (4, 4), 5, 70, (4, 4), (1, 1), (0, 0), (1, 1), 1),
    (20, 1, (9, 8), 40, 60, (3, 3), (1, 2), (1, 1), (1, 1), 2),
    (40, 1, (16, 17), 70, 70, (3, 3), (1, 1), (1, 1), (1, 1), 70),
    (9, 2, (100,), 12, 24, (5,), (2,), (4,), (2,), 6),
    (6, 1, (5, 6, 7), 4, 9, (3, 2, 3), (1, 1, 2), (1, 0, 1), (1, 2, 1), 1),
    (12, 1, (9, 9), 20, 30, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def random_convolution(case: tuple[Any, ...], dtype: torch.dtype) -> Call:
    n, m, size, c_in, c_out, kernel, stride, padding, dilation, groups = case
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    positions = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in spans]
    x, g = torch.randn(n, m, *size, c_in).to(dtype), torch.randn(n, m, *positions, c_out).to(dtype)
    return "fisher_conv_", [c_out, c_in // groups, *kernel], (x, g), (stride, padding, dilation, groups)


def random_linear(n: int, t: int, d_in: int, d_out: int, dtype: torch.dtype) -> Call:
    a, g = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
    return "fisher_linear_", [d_out, d_in], (a, g), ()


def random_embedding(n: int, t: int, d: int, v: int, dtype: torch.dtype) -> Call:
    return "fisher_embedding_", [v, d], (torch.randint(-1, v, (n, t)), torch.randn(n, t, d).to(dtype)), ()


def accumulated(name: str, shape: list[int], inputs: tuple[Tensor, Tensor], settings: tuple[Any, ...]) -> list[Tensor]:
    """Add to a random Fisher and a gradient of zero with random weights, and return both."""
    fisher = torch.rand(shape, dtype=wide(inputs[1].dtype))
    gradient = torch.zeros_like(fisher)
    getattr(cpp, name)(fisher, *inputs, torch.rand(len(inputs[1])), gradient, *settings)
    return [fisher, gradient]


def all_results(dtype: torch.dtype) -> list[Tensor]:
    """Run every operator on inputs that only the seed decides."""
    torch.manual_seed(0)
    anchors = random_anchors([100_003, 0, 1, 7, 4096, 65_537, 300], dtype)
    coefficients = (torch.rand(7, dtype=torch.float64), scalar(0.01))
    value, packed = cpp.penalty_with_grad(**anchors, alpha=coefficients[0], l2=coefficients[1])
    grad = [torch.randn(t.shape).to(dtype) for t in anchors["theta"]]
    added = cpp.penalty_add_grad_(grad, *anchors.values(), *coefficients, scalar(0.5))
    results = [value, packed, added, *grad, cpp.penalty(*anchors.values(), *coefficients)]
    for n, t, d_in, d_out in ((40, 1, 300, 130), (9, 33, 250, 301), (2, 500, 100, 70), (64, 5, 784, 10)):
        results += accumulated(*random_linear(n, t, d_in, d_out, dtype))
    for case in CONVOLUTIONS:
        results += accumulated(*random_convolution(case, dtype))
    for n, t, d, v in ((50, 40, 70, 20), (30, 20, 300, 5000)):
        results += accumulated(*random_embedding(n, t, d, v, dtype))
    for size in ((30, 100, 65), (4, 65, 3000)):
        a, g = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        results += [cpp.scale_grads(a, g), cpp.scale_grads(a.transpose(1, 2), g.transpose(1, 2))]
    for n, numel in ((10_000, 33), (50, 70_000)):
        squares = torch.zeros(numel, dtype=wide(dtype))
        cpp.accumulate_squares_(squares, torch.randn(n, numel).to(dtype), torch.rand(n))
        results.append(squares)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = all_results(dtype)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for index, (got, want) in enumerate(zip(all_results(dtype), expected, strict=True)):
            assert torch.equal(got, want), f"result {index} differs with {threads} threads"


def as_float64(arguments: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [t.to(torch.float64, copy=True) for t in tensors] for name, tensors in arguments.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_and_empty_tensors(dtype: torch.dtype, shift: int) -> None:
    sizes = [0, 1, 5, 16, 63, 1000, 4097, 0]
    torch.manual_seed(shift)
    anchors = {
        name: [torch.cat([t.new_full((shift,), torch.nan), t, t.new_full((9,), torch.nan)])[shift:-9] for t in tensors]
        for name, tensors in random_anchors(sizes, dtype).items()
    }
    coefficients = (scalar(1.5), scalar(0.1))
    value, packed = cpp.penalty_with_grad(**anchors, alpha=coefficients[0], l2=coefficients[1])
    want_value, want_packed = reference.penalty_with_grad(**as_float64(anchors), alpha=coefficients[0], l2=scalar(0.1))
    assert relative_error(value, want_value) < 1e-6
    assert packed.shape == want_packed.shape
    assert relative_error(packed, want_packed) < 2 * torch.finfo(dtype).eps

    memory = [torch.full((size + 2 * shift,), 3.0, dtype=dtype) for size in sizes]
    grad = [block[shift : shift + size] for block, size in zip(memory, sizes, strict=True)]
    cpp.penalty_add_grad_(grad, *anchors.values(), *coefficients, scalar(1.0))
    for block, size in zip(memory, sizes, strict=True):
        assert (block[:shift] == 3).all()
        assert (block[shift + size :] == 3).all()


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)])
def test_empty_fisher_inputs_add_nothing(sizes: tuple[int, int, int, int]) -> None:
    n_samples, steps, d_in, d_out = sizes
    fisher = torch.ones(d_out, d_in)
    cpp.fisher_linear_(fisher, torch.randn(n_samples, steps, d_in), torch.randn(n_samples, steps, d_out), None, None)
    assert (fisher == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_come_through(bad: float, dtype: torch.dtype) -> None:
    for position in (0, 17, 99):
        anchors = random_anchors([100], dtype)
        anchors["theta"][0][position] = bad
        grad = [torch.zeros(100, dtype=dtype)]
        value = cpp.penalty_add_grad_(grad, *anchors.values(), scalar(1.0), scalar(0.0), scalar(1.0))
        assert not value.isfinite()
        assert grad[0].isfinite().logical_not().nonzero().flatten().tolist() == [position]
        fisher, grads = torch.zeros(100, dtype=wide(dtype)), torch.zeros(3, 100, dtype=dtype)
        grads[1, position] = bad
        cpp.accumulate_squares_(fisher, grads, None)
        assert fisher.isfinite().logical_not().nonzero().flatten().tolist() == [position]


def test_in_place_operators_advance_the_version_counter() -> None:
    x, g = torch.randn(4, 1, 5, 2), torch.randn(4, 1, 5, 3)
    calls = [
        ("fisher_linear_", (3, 2), (x[:, 0], g[:, 0]), ()),
        ("fisher_embedding_", (3, 2), (torch.tensor([[0], [1]]), torch.randn(2, 1, 2)), ()),
        ("fisher_conv_", (3, 2, 1), (x, g), ([1], [0], [1], 1)),
    ]
    for name, shape, inputs, settings in calls:
        fisher, gradient = torch.zeros(shape), torch.zeros(shape)
        before = fisher._version, gradient._version
        getattr(cpp, name)(fisher, *inputs, None, gradient, *settings)
        assert fisher._version > before[0], name
        assert gradient._version > before[1], name
    before = fisher._version
    cpp.accumulate_squares_(fisher, torch.randn(4, 3, 2, 1), None)
    assert fisher._version > before


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_float64(isa: str) -> None:
    """Each path runs in its own process; a machine without it falls back to the next one below."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, test_cpp
from wplfast.backends import cpp
assert test_cpp.ISAS.index(cpp.ISA) <= test_cpp.ISAS.index({isa!r})
for dtype in test_cpp.DTYPES:
    test_cpp.check_against_float64(dtype)
print(cpp.ISA)
"""
    result = run_python(code, WPLFAST_ISA=isa)
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}; {result.stdout.strip()} was tested")


def check_against_float64(dtype: torch.dtype) -> None:
    """Compare every operator, at ragged sizes, with the reference in float64."""
    torch.manual_seed(1)
    linear = ((5, 33, 70, 45), (7, 1, 17, 130), (2, 401, 40, 61), (300, 2, 33, 12), (5, 5, 90, 3))
    embeddings = ((50, 40, 70, 20), (30, 20, 33, 5000), (3, 4, 5, 6))
    for bound, calls in (
        (2e-6, [random_linear(*sizes, dtype) for sizes in linear]),
        (3e-6, [random_convolution(case, dtype) for case in CONVOLUTIONS]),
        (1e-6, [random_embedding(*sizes, dtype) for sizes in embeddings]),
    ):
        for name, shape, inputs, settings in calls:
            w = torch.rand(len(inputs[1]))
            got, want = torch.zeros(2, *shape, dtype=wide(dtype)), torch.zeros(2, *shape, dtype=torch.float64)
            exact = [t.double() if t.is_floating_point() else t for t in inputs]
            getattr(cpp, name)(got[0], *inputs, w, got[1], *settings)
            getattr(reference, name)(want[0], *exact, w, want[1], *settings)
            assert relative_error(got[0], want[0]) < bound, (name, shape)
            assert relative_error(got[1], want[1]) < bound, (name, shape)
    for size in ((3, 100, 65), (4, 65, 300), (2, 3, 1)):
        a, g = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        for first, second in ((a, g), (a.transpose(1, 2), g.transpose(1, 2))):
            assert relative_error(cpp.scale_grads(first, second), (first.double() * second.double()).sum(1)) < 1e-6
    anchors = random_anchors([0, 1, 31, 1000, 70_001], dtype)
    value, packed = cpp.penalty_with_grad(**anchors, alpha=scalar(2.0), l2=scalar(0.1))
    expected = reference.penalty_with_grad(**as_float64(anchors), alpha=scalar(2.0), l2=scalar(0.1))
    assert relative_error(value, expected[0]) < 1e-6
    assert relative_error(packed, expected[1]) < 2 * torch.finfo(dtype).eps
    grads = torch.randn(3000, 37).to(dtype)
    squares, expected_squares = torch.zeros(37, dtype=wide(dtype)), torch.zeros(37, dtype=torch.float64)
    cpp.accumulate_squares_(squares, grads, None)
    reference.accumulate_squares_(expected_squares, grads.double(), None)
    assert relative_error(squares, expected_squares) < 1e-6


def test_bf16_gradient_is_rounded_once() -> None:
    """Equal to fp32 arithmetic followed by one rounding, also where fp32 lies on a tie."""
    torch.manual_seed(0)
    anchors = random_anchors([5000], torch.bfloat16)
    grad = torch.randn(5000).bfloat16()
    fd = anchors["fisher"][0] * (anchors["theta"][0].float() - anchors["theta_hat"][0].float())
    want = (
        (grad.double() + 0.5 * fd.double()).float().bfloat16()
    )  # 0.5 * fd is exact: one rounding to fp32, one to bf16
    cpp.penalty_add_grad_(
        [grad], anchors["theta"], anchors["theta_hat"], [], anchors["fisher"], scalar(1.0), scalar(0.0), scalar(0.5)
    )
    assert torch.equal(grad, want)


def test_every_half_and_bfloat16_survives() -> None:
    """Adding nothing to a gradient returns it, for all 65,536 values (NaN stays NaN)."""
    pattern = torch.arange(1 << 16).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        grad = pattern.view(dtype).clone()
        zeros = [torch.zeros(1 << 16, dtype=dtype)]
        fisher = [torch.zeros(1 << 16)]
        cpp.penalty_add_grad_([grad], zeros, zeros, [], fisher, scalar(1.0), scalar(0.0), scalar(1.0))
        assert torch.equal(grad.float().nan_to_num(7.0), pattern.view(dtype).float().nan_to_num(7.0))


def test_unknown_isa_is_an_error() -> None:
    result = run_python("import wplfast", WPLFAST_ISA="sse9")
    assert result.returncode != 0
    assert "ValueError: WPLFAST_ISA must be 'avx512', 'avx2' or 'portable', got 'sse9'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_under_address_and_undefined_behaviour_sanitizers(isa: str, sanitized_harness: Path) -> None:
    rounds = os.environ.get("WPLFAST_TEST_ROUNDS", "30")
    result = subprocess.run(
        [str(sanitized_harness), rounds, str(ISAS.index(isa))],
        capture_output=True,
        text=True,
        env=os.environ | {"WPLFAST_ISA": isa},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def sanitized_harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile tests/native/fuzz_kernels.cpp with the kernels, or skip where that is impossible."""
    required = "cpp" in os.environ.get("WPLFAST_REQUIRE", "").split(",")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        reason = "no C++ compiler" if compiler is None else "no csrc/ beside the tests"
        pytest.fail(reason) if required else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("native")
    kernels = [path for path in (ROOT / "csrc").glob("*.cpp") if path.name != "bindings.cpp"]
    sanitizers = ["-fopenmp", "-fsanitize=address,undefined"]
    flags = ["-std=c++17", "-g1", "-Wno-psabi", *sanitizers, "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-c"]
    # Unoptimised kernels run for a second longer, and are compiled in a third of the time.
    sources = {"-O0": kernels, "-O1": list((ROOT / "tests" / "native").glob("*.cpp"))}
    commands = [[*compiler.split(), *flags, level, *map(str, paths)] for level, paths in sources.items()]
    program = folder / "fuzz_kernels"
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda command: compiled(command, folder), commands))
    if all(result.returncode == 0 for result in results):
        objects = sorted(map(str, folder.glob("*.o")))
        results.append(compiled([*compiler.split(), *sanitizers, *objects, "-o", str(program)], folder))
    if failures := [result.stderr for result in results if result.returncode != 0]:
        reason = f"the harness does not compile: {failures[0][-2000:]}"
        pytest.fail(reason) if required else pytest.skip(reason)
    return program


def compiled(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
