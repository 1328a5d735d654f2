"""Packs of precompiled kernels: what is found in them, and what is launched, on a CUDA driver that runs nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import pytest

triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import wplfast  # noqa: E402
from wplfast.backends.triton import kernel, launch, penalty_kernel, scale, squares  # noqa: E402
from wplfast.backends.triton.packs import archives as packs  # noqa: E402
from wplfast.backends.triton.packs import precompile  # noqa: E402
from wplfast.backends.triton.packs.cases import CASES  # noqa: E402

pytestmark = [
    pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(packs.EXTENSION is None, reason="packs are launched by the C++ extension"),
    pytest.mark.skipif(sys.platform != "linux", reason="the pretended driver is built for Linux"),
]
ROOT = Path(__file__).parent.parent
ARCH = 90

#: Makes the pack of the tests: a few kernels, compiled as any pack's.
BUILD = """
import sys
from pathlib import Path
import torch
from wplfast.backends.triton.packs import precompile, cases
from wplfast.backends.triton import scale_unless_one_, squares
from wplfast.backends.triton.launch import OPTIONS

out, grads = torch.empty(64), torch.empty(8, 64)
own = {
    "one": lambda: cases.accumulate_squares_(out, grads, None),
    "weights": lambda: cases.accumulate_squares_(out, grads, torch.empty(8, dtype=torch.float64)),
    "wide": lambda: squares.accumulate_squares_kernel[(1,)](
        out, grads, None, 8, 1 << 33, ADD=True, HAS_WEIGHTS=False, ROWS=8, BLOCK=256, num_warps=4, **OPTIONS),
    "aligned": lambda: scale_unless_one_(torch.empty(4096), torch.empty(())),
    "unaligned": lambda: scale_unless_one_(torch.empty(4097)[1:], torch.empty(())),
    "penalty": lambda: cases._penalty(torch.float32, torch.float32, 4096, False, False),
}
precompile.CASES["tests"] = own.values
precompile.write(Path(sys.argv[1]), 90, precompile.record(90, ["tests"]).compiled)
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small pack."""
    path = tmp_path_factory.mktemp("packs") / f"sm_{ARCH}.zip"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", BUILD, str(path)], check=True, env=environment, timeout=300)
    return path.parent


def outcome(folder: Path, libraries: Path, *parts: str) -> dict:
    """Run parts of pack_launches.py on the pretended driver."""
    settings = {"WPLFAST_PACKS": str(folder), "PYTHONPATH": str(ROOT), "FAKE_CUDA_DEVICES": "3"}
    environment = fake_cuda.environment(libraries, **settings)
    program = [sys.executable, str(ROOT / "tests/pack_launches.py"), *parts]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("libraries"))


def test_the_driver_is_given_what_tritons_own_gives_it(folder: Path, libraries: Path) -> None:
    found = outcome(folder, libraries, "comparisons", "relaunched")
    for given in found["comparisons"].values():
        assert [event[0] for event in given["jit"]] == ["load", "launch", "launch"]
        assert given["pack"] == given["jit"]  # code, grid, block, shared memory, stream, bytes of arguments
    wide = found["comparisons"]["wide"]["pack"][1]
    assert wide[wide.index("grid") + 1] == "2,3,4"
    assert "0000000002000000" in wide
    first, *others = found["relaunched"]["penalty"]
    assert [event[0] for event in first] == ["load", "launch"] * 2
    for other in others:
        assert [event[1] for event in other] == ["penalty_kernel", "sum_partials_kernel"]
        for again, before in zip(other, first[1::2], strict=True):
            args = before.index("args") + 1
            assert again[:args] == before[:args]
            assert again[args] == before[args] or again[1] == "sum_partials_kernel"


def test_errors_threads_and_devices(folder: Path, libraries: Path) -> None:
    # Triton's own driver is never asked for: where packs serve, no C compiler is needed.
    found = outcome(folder, libraries, "failures", "many")
    failures = found["failures"]
    assert failures["launch"] == failures["again"]
    assert failures["launch"] == "RuntimeError: cuLaunchKernel: an error for a test (CUDA error 700)"
    assert "takes 9 arguments, got 8" in failures["few"]
    assert "32-bit sizes was given 1099511627776" in failures["large"]
    assert "too large" in failures["grid"]
    assert "no pack in" in failures["unknown"]
    assert found["many"] == {"launches": 1600, "where": [["1", "0x64"], ["2", "0x65"], ["3", "0x66"]]}


class Jit:
    """Counts launches by the JIT in place of compiling them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        monkeypatch.setattr(kernel.Kernel, "jit", lambda function, *_: self.launches.append(function.__name__))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jit]:
    """Let a server of a pretended GPU take launches, and the JIT count them."""
    packs.open_pack.cache_clear()
    jit = Jit(monkeypatch)
    yield jit
    packs.open_pack.cache_clear()


def launched(capability: int = ARCH) -> None:
    """Launch a kernel that the tests' pack has for its target."""
    before = kernel.serve(fake_cuda.server(capability=capability))
    try:
        squares.accumulate_squares_(torch.zeros(64), torch.zeros(8, 64), None)
    finally:
        kernel.serve(before)


def rewritten(source: Path, to: Path, **changes: object) -> None:
    """Write a pack with a changed manifest, or with other bytes in place of its code."""
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if "code" in changes:
        code = changes.pop("code")
        files = {name: code if name.endswith(".cubin") else data for name, data in files.items()}  # type: ignore[misc]
    files[packs.MANIFEST] = json.dumps({**json.loads(files[packs.MANIFEST]), **changes}).encode()
    with zipfile.ZipFile(to, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def damage(kind: str, source: Path, to: Path) -> None:
    """Write a pack that is damaged in a way."""
    data = bytearray(source.read_bytes())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "empty":
        data = bytearray()
    elif kind == "code":  # every byte between the headers of the first kernel's code and the next file
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            starts = sorted(info.header_offset for info in archive.infolist())
        for start, end in zip(starts[1:], [*starts[2:], starts[-1] + 200], strict=True):
            data[start + 90 : end] = bytes(end - start - 90)
    else:
        changes: dict = {"sources": {"sources": "0" * 64}, "format": {"format": 99}, "kernels": {"kernels": []}}[kind]
        rewritten(source, to, **changes)
        return
    to.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sources", "made from other kernel sources"),
        ("format", "has format 99"),
        ("kernels", "cannot be read"),
        ("truncated", "cannot be read"),
        ("empty", "cannot be read"),
        ("code", "cannot be loaded, Triton compiles it instead"),
    ],
)
def test_a_pack_that_does_not_fit_leaves_launches_to_the_jit(
    kind: str, message: str, folder: Path, served: Jit, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    damage(kind, folder / f"sm_{ARCH}.zip", tmp_path / f"sm_{ARCH}.zip")
    monkeypatch.setenv("WPLFAST_PACKS", str(tmp_path))
    for _ in range(2):
        launched()
    assert served.launches == ["accumulate_squares_kernel"] * 2
    assert caplog.text.count(message) == 1


def test_without_a_driver_the_jit_is_left_to_say_so(
    folder: Path, served: Jit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    monkeypatch.setenv("WPLFAST_PACKS", str(folder))
    launched()
    assert served.launches == ["accumulate_squares_kernel"]
    assert "the CUDA driver cannot be loaded" in caplog.text


@pytest.mark.parametrize("capability", [80, 89, 100, 103, 120])
def test_other_gpus_are_left_to_the_jit(
    capability: int, folder: Path, served: Jit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WPLFAST_PACKS", str(folder))
    launched(capability)
    assert served.launches == ["accumulate_squares_kernel"]
    assert caplog.text == ""


def test_which_target_serves_which_gpu() -> None:
    served = {arch: [c for c in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121) if packs.serves(arch, divmod(c, 10))]
              for arch in (80, 86, 90, 100, 120)}  # fmt: skip
    assert served == {80: [80, 86, 87, 89], 86: [86, 87, 89], 90: [90], 100: [100], 120: [120]}


def by_triton(function: kernel.Kernel, args: tuple, options: dict) -> str:
    """Return what Triton's own binder specialises a launch on, as text."""
    *_, binder = function.device_caches[0]
    _, specialised, _ = binder(*args, **options)
    parts = []
    for kind, value in specialised:
        if kind == "constexpr":
            parts.append(f"={value.name if isinstance(value, triton.language.dtype) else repr(value)}")
        else:
            parts.append(kind + (value or ""))
    return ",".join(parts)


NUMBERS = (0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**33, 2**63 - 1)


@pytest.fixture
def target() -> Iterator[None]:
    """Let Triton compile for the tests' target."""
    kernels = (squares.accumulate_squares_kernel, scale.scale_grads_kernel, penalty_kernel.penalty_kernel)
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(precompile.Target(ARCH))
    for function in kernels:
        function.device_caches.clear()
    yield
    for function in kernels:
        function.device_caches.clear()
    vars(triton.runtime.driver).update(before)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("exchange", [True, False])
def test_keys_say_what_triton_specialises_on(exchange: bool) -> None:
    tables = kernel.Tables(kernel.EXCHANGE if exchange else None)
    buffer = torch.zeros(256)
    tensors = [None, buffer, buffer[1:], buffer[4:], buffer.bfloat16()[1:], buffer.long(), buffer.int(), buffer.byte()]
    tensors += [torch.nn.Parameter(buffer), buffer.half(), buffer.double(), torch.empty(0)]
    checked = set()

    def check(function: kernel.Kernel, *args: object, **options: object) -> None:
        key = tables.table(function).key(args, options)
        parts = key.rpartition(",")[0]
        assert parts == by_triton(function, args, options)
        checked.add(parts)

    for number in NUMBERS:
        for x in tensors:
            constants = {"ADD": True, "HAS_WEIGHTS": x is not None, "ROWS": 8, "BLOCK": number, "num_warps": 4}
            check(squares.accumulate_squares_kernel, buffer, buffer, x, number, 64, **constants)
            check(squares.accumulate_squares_kernel, buffer, x, None, 7, number, **constants)
        check(scale.scale_grads_kernel, buffer, buffer, buffer[1:], *[number] * 8, *[1] * 8, num_stages=2)
    for x in tensors:  # not told apart by alignment
        types = triton.language.float32, triton.language.bfloat16, triton.language.float64
        check(penalty_kernel.penalty_kernel, x, None, x, x, x, x, x, *types, 0, False, True, 2048, 1, 512)
    assert len(checked) > 200


def test_arguments_of_other_kinds_are_left_to_triton() -> None:
    table = kernel.Tables().table(squares.accumulate_squares_kernel)
    x = torch.zeros(64)
    constants = {"ADD": True, "HAS_WEIGHTS": False, "ROWS": 8, "BLOCK": 256}
    assert table.key((x, x, None, 8, 64), constants) is not None
    strange = [True, 1.5, 2**63, x.bool(), torch.float32, "text", (1, 2), SimpleNamespace(data_ptr=lambda: 16)]
    for value in strange:
        assert table.key((x, x, None, value, 64), constants) is None
        assert table.key((x, value, None, 8, 64), constants) is None
    for value in (1.5, torch.float32, (1, 2), "a,b", 2**80):
        assert table.key((x, x, None, 8, 64), constants | {"ROWS": value}) is None
    assert table.key((x, x, None, 8), constants) is None, "an argument is missing"
    assert table.key((x, x, None, 8, 64, True, False, 8, 256, 9), {}) is None, "one too many"
    assert table.key((x, x, None, 8, 64), constants | {"num_ctas": 2}) is None, "an option that packs do not know"
    assert table.key((x, x, None, 8, 64, False), constants) is None, "given twice"


def test_a_pack_is_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    pack = packs.Pack(folder / f"sm_{ARCH}.zip")
    compiled = [
        (name, key, entry, pack.image(entry))
        for name, entries in pack.kernels.items()
        for key, entry in entries.items()
    ]
    precompile.write(tmp_path / "one.zip", ARCH, compiled)
    precompile.write(tmp_path / "two.zip", ARCH, compiled[::-1])
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes() == pack.path.read_bytes()


def test_every_launched_kernel_is_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PRETENDED", {"processors": 132, "capability": ARCH})
    launch.n_processors.cache_clear()
    recorder = precompile.Recorder(ARCH, shard=-1)  # compiles nothing
    before = kernel.serve(recorder)
    try:
        for cases in CASES.values():
            for case in cases():
                case()
    finally:
        kernel.serve(before)
        launch.n_processors.cache_clear()
    modules = [module for name, module in sys.modules.items() if name.startswith("wplfast.backends.triton.")]
    kernels = {
        value.__name__ for module in modules for value in vars(module).values() if isinstance(value, kernel.Kernel)
    }
    assert {name for name, _ in recorder.seen} == kernels
    assert len(kernels) > 10


def test_targets_that_triton_cannot_compile_for_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precompile.main(["--archs", "75", "--out", str(tmp_path)]) == 1
    assert "from 80 on, got 75" in capsys.readouterr().err


def test_environment_and_information(folder: Path) -> None:
    program = [sys.executable, "-m", "wplfast", "info"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WPLFAST_PACKS": str(folder)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    assert f"kernels sm_{ARCH}" in done.stdout
    assert f"kernels by Triton {triton.__version__}" in done.stdout
    wrong = subprocess.run(program, capture_output=True, text=True, env={**environment, "WPLFAST_KERNELS": "aot"})
    assert "must be 'jit', 'relaunch', 'auto' or 'pack', got 'aot'" in wrong.stderr + wrong.stdout


@pytest.mark.parametrize(
    ("archs", "label"), [("", ""), ("80;90", "+sm80.sm90"), ("90, 80 100", "+sm80.sm90.sm100"), ("80;ninety", None)]
)
def test_a_wheel_says_what_it_was_precompiled_for(archs: str, label: str | None) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    environment = {**os.environ, "WPLFAST_CUDA_ARCHS": archs}
    program = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    if label is None:
        assert done.returncode != 0
        assert "must be targets such as '80;90;100', got '80;ninety'" in done.stderr
    else:
        assert done.stdout.split()[-1] == wplfast.__version__ + label
