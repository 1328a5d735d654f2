"""Triton of several versions, devices that kernels do not fit, kernels that cannot be started, and who launches them.

Other versions of Triton lie in folders of their own, ``triton-<version>`` in the virtual environment, where ``make
test`` installs them; ``WPLFAST_TRITONS`` names other folders.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from test_triton_aot import Driver, Launcher, Utilities  # noqa: E402

from wplfast import backends  # noqa: E402
from wplfast.backends import reference  # noqa: E402
from wplfast.backends import triton as operators  # noqa: E402
from wplfast.backends.triton import fisher_config, fisher_plan, give_way, kernel, launch, penalty_launch  # noqa: E402
from wplfast.backends.triton.prepared import TritonPenalty  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

#: What other versions compile of tests/test_triton_aot.py: every kernel for every target, the largest tiles.
KERNELS = (
    "linear_variants or conv_resources or small_kernels or load_16_bytes or (linear_resources and terms-512-False-100)"
    " or (linear_resources and half-512-True-90) or (penalty_moves and bf16-fp32-2-True-2)"
    " or (factor_first and fp32-fp32)"
)


def other_tritons() -> list[Path]:
    """Return folders with other versions of Triton."""
    named = os.environ.get("WPLFAST_TRITONS")
    folders = [Path(p) for p in named.split(os.pathsep)] if named else sorted(Path(sys.prefix).glob("triton-*"))
    return [folder for folder in folders if (folder / "triton/__init__.py").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("folder", other_tritons() or [None], ids=lambda f: f.name if f else "none")
def test_other_versions_compile_every_kernel_within_its_limits(folder: Path | None) -> None:
    if folder is None:
        pytest.skip("no other version of Triton: `make test` downloads them (TRITONS), WPLFAST_TRITONS names folders")
    paths = [str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if found == triton.__version__:
        pytest.skip(f"Triton {found} is the one that all other tests run with")
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short"]
    program += ["tests/test_triton_aot.py", "-k", KERNELS]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"Triton {found}: {done.stdout[-4000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# ---- devices that kernels do not fit, or cannot be started on --------------------------------------------------------


NO_IMAGE = RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device")


class Device(Driver):
    """A GPU that does nothing but spoil what it is to add to, and may have little memory or refuse kernels."""

    def __init__(self) -> None:
        self.shared = 227 << 10
        self.refused: dict[str, Exception] = {}
        self.loads_left = 1 << 30
        self.added_to: list[torch.Tensor] = []
        device = self

        class Spoiling(Launcher):
            def __call__(self, *arguments: object) -> None:
                super().__call__(*arguments)
                for tensor in device.added_to:
                    if any(isinstance(a, torch.Tensor) and a.data_ptr() == tensor.data_ptr() for a in arguments):
                        tensor.fill_(float("nan"))

        class Limited(Utilities):
            def get_device_properties(self, number: int) -> dict[str, int]:
                return {"max_shared_mem": device.shared}

            def load_binary(self, name: str, *arguments: object) -> tuple[int, ...]:
                device.loads_left -= 1
                if name in device.refused or device.loads_left < 0:
                    raise device.refused.get(name, NO_IMAGE)
                return super().load_binary(name, *arguments)

        self.utils, self.launcher_cls = Limited(), Spoiling


def all_kernels() -> list[kernel.Kernel]:
    """Return every kernel that is launched."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("wplfast.backends.triton.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, kernel.Kernel)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Let such a GPU take what kernels on CPU tensors launch; nothing is known of it before or after."""
    monkeypatch.delenv("WPLFAST_REQUIRE", raising=False)
    known = (give_way._GAVE_WAY, give_way._STARTED, fisher_plan._UNFIT, penalty_launch._SUMMED, Launcher.launches)

    def forget() -> None:
        for function in all_kernels():
            function.device_caches.clear()
        for collection in known:
            collection.clear()
        fisher_plan.choose_plan.cache_clear()
        triton.compiler.compiler.max_shared_mem.cache_clear()

    forget()
    before, server = dict(vars(triton.runtime.driver)), kernel.serve(None)
    device = Device()
    triton.runtime.driver.set_active(device)
    yield device
    forget()
    gc.collect()  # compiled kernels ask the driver to unload them
    kernel.serve(server)
    vars(triton.runtime.driver).update(before)


def layer(dtype: torch.dtype = torch.bfloat16, t: int = 64) -> tuple:
    """Return the arguments of ``fisher_linear_``."""
    a, g = torch.randn(3, t, 128).to(dtype), torch.randn(3, t, 128).to(dtype)
    return torch.rand(128, 128), a, g, torch.rand(3), torch.rand(128, 128)


def in_torch(operator: str, arguments: tuple) -> tuple:
    """Return the arguments after plain PyTorch, which leaves those given alone."""
    copies = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments)
    getattr(reference, operator)(*copies)
    return copies


def launched(name: str) -> int:
    """Return how often a kernel was launched."""
    return sum(kernel_name == name for kernel_name, _ in Launcher.launches)


def test_a_tile_that_does_not_fit_gives_way_to_a_smaller_one_for_good(gpu: Device) -> None:
    tile = fisher_plan.choose_plan(torch.device("cpu"), fisher_config.Operands(1, torch.bfloat16),
                                   fisher_plan.Layer(128, 128, 3, 64), True).tile  # fmt: skip
    gpu.shared = 40 << 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators.fisher_linear_(*layer())
    assert launched("fisher_linear_kernel") == 1
    (unfit,) = fisher_plan._UNFIT.values()
    assert tile in unfit
    compiled = {c.metadata.shared for c in kernels_of("fisher_linear_kernel")}
    assert min(compiled) <= gpu.shared < max(compiled)
    n_compiled = len(compiled)
    operators.fisher_linear_(*layer())
    assert launched("fisher_linear_kernel") == 2
    assert len({c.metadata.shared for c in kernels_of("fisher_linear_kernel")}) == n_compiled, "nothing is tried twice"


def kernels_of(name: str) -> list:
    """Return what was compiled of a kernel."""
    from wplfast.backends.triton.fisher_linear import fisher_linear_kernel

    assert fisher_linear_kernel.__name__ == name
    return list(fisher_linear_kernel.device_caches[0][0].values())


def test_a_device_that_no_tile_fits_gets_plain_pytorch(gpu: Device) -> None:
    gpu.shared = -1
    arguments = layer(t=16)
    expected = in_torch("fisher_linear_", arguments)
    with pytest.warns(RuntimeWarning, match=r"no tile for .* fits") as caught:
        operators.fisher_linear_(*arguments)
    assert len(caught) == 1
    assert torch.equal(arguments[0], expected[0])
    assert torch.equal(arguments[4], expected[4])


@pytest.mark.parametrize("kind", list(fisher_config._TILES))
def test_smaller_tiles_end_and_can_be_multiplied(kind: tuple[int, str]) -> None:
    for candidates in fisher_config._TILES[kind]:
        for tile in candidates:
            needs, smaller = [], tile
            while smaller is not None:
                needs.append((smaller.m + smaller.n) * smaller.k * smaller.stages)
                assert min(smaller.m, smaller.n, smaller.k) >= 16
                smaller = fisher_config.smaller(smaller)
            assert needs == sorted(set(needs), reverse=True)
            assert needs[-1] * 2 * 3 <= 16 << 10, "three terms of bfloat16 fit any device"


CALLS = {
    # operator, kernel that fails, arguments
    "squares": ("accumulate_squares_", "accumulate_squares_kernel",
                lambda: (torch.rand(8, 40), torch.randn(5, 8, 40), torch.rand(5, dtype=torch.float64))),
    "linear": ("fisher_linear_", "fisher_linear_kernel", layer),
    "linear, its sums, after the products": ("fisher_linear_", "fold_tiles_kernel",
                                             lambda: (torch.rand(9, 13), *layer_parts(13, 9), None, torch.rand(9, 13))),
    "linear, split before": ("fisher_linear_", "split_kernel", lambda: layer(torch.float32)),
    "conv": ("fisher_conv_", "fisher_conv_kernel", lambda: conv(16, 24, 1)),
    "conv, its sums": ("fisher_conv_", "fold_taps_kernel", lambda: conv(16, 24, 1)),
    "depthwise": ("fisher_conv_", "fisher_depthwise_kernel", lambda: conv(8, 8, 8)),
    "unfolded": ("fisher_conv_", "unfold_kernel", lambda: conv(3, 8, 1)),
    "embedding": ("fisher_embedding_", "fisher_embedding_kernel", lambda: embedding()),
    "scale": ("scale_unless_one_", "scale_unless_one_kernel", lambda: (torch.rand(100), torch.tensor(0.5))),
}  # fmt: skip


def layer_parts(d_in: int, d_out: int) -> tuple:
    return torch.randn(3, 20, d_in).bfloat16(), torch.randn(3, 20, d_out).bfloat16()


def conv(c_in: int, c_out: int, groups: int, shift: int = 0) -> tuple:
    x, g = torch.randn(2, 1, 6, 7, c_in), torch.randn(2, 1, 6, 7, c_out)
    shape = c_out, c_in // groups, 3, 3
    fisher, gradient = torch.rand(shape), torch.rand(9 * c_out * c_in // groups + shift)[shift:].view(shape)
    return fisher, x, g, torch.rand(2), gradient, [1, 1], [1, 1], [1, 1], groups


def embedding() -> tuple:
    return torch.rand(11, 16), torch.randint(-1, 11, (3, 9)), torch.randn(3, 9, 16), None, torch.rand(11, 16)


@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_that_cannot_be_started_gives_way_to_plain_pytorch(call: str, gpu: Device) -> None:
    name, failing, arguments = CALLS[call]
    operator, given = getattr(operators, name), arguments()
    expected = in_torch(name, given)
    gpu.refused[failing] = NO_IMAGE
    with pytest.warns(RuntimeWarning, match=f"{failing} cannot be compiled or started.*no kernel image") as caught:
        operator(*given)
    assert len(caught) == 1
    for result, right in zip(given, expected, strict=True):
        assert torch.equal(result, right) if isinstance(right, torch.Tensor) else result == right
    n_launches, again = len(Launcher.launches), arguments()
    expected = in_torch(name, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator(*again)
    assert len(Launcher.launches) == n_launches, "plain PyTorch serves it from here on"
    assert torch.equal(again[0], expected[0])
    (found,) = backends.gave_way()
    assert failing in found
    assert name in found


def one_step() -> tuple:
    """Return the arguments of ``fisher_linear_`` for T = 1: several kernels add, the gradient's after the Fisher's."""
    accumulators = [torch.rand(24, 40) for _ in range(2)]
    return accumulators[0], torch.randn(70, 1, 40).bfloat16(), torch.randn(70, 1, 24).bfloat16(), None, accumulators[1]


@pytest.mark.parametrize(
    ("name", "arguments"), [("fisher_linear_", one_step), ("fisher_conv_", lambda: conv(16, 24, 1, shift=1))]
)
def test_whichever_kernel_fails_nothing_is_added_twice(name: str, arguments, gpu: Device) -> None:  # type: ignore[no-untyped-def]
    spoiled = 0
    for number in range(20):
        given = arguments()
        gpu.added_to, gpu.loads_left = [given[0], given[4]], number
        expected = in_torch(name, given)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(operators, name)(*given)
        if not caught:
            break
        assert torch.equal(given[0], expected[0])
        assert torch.equal(given[4], expected[4])
        spoiled += any(tensor.data_ptr() in (given[0].data_ptr(), given[4].data_ptr())
                       for _, launch_arguments in Launcher.launches
                       for tensor in launch_arguments if isinstance(tensor, torch.Tensor))  # fmt: skip
        for collection in (give_way._GAVE_WAY, give_way._STARTED, Launcher.launches):
            collection.clear()
        for function in all_kernels():
            function.device_caches.clear()
    assert given[0].isnan().all(), "without a failure the device has added"
    assert 1 < number < 19
    assert spoiled > 0, "a kernel has failed after another one had added"


def penalty_arguments(dtype: torch.dtype) -> list:
    theta = [torch.randn(300).to(dtype), torch.randn(7).to(dtype)]
    one = torch.ones((), dtype=torch.float64)
    return [theta, [torch.randn_like(p) for p in theta], [], [torch.rand(p.shape) for p in theta], one, one]


@pytest.mark.parametrize("failing", ["penalty_kernel", "sum_partials_kernel"])
def test_penalties_give_way(failing: str, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.refused[failing] = NO_IMAGE
    arguments, scale = penalty_arguments(torch.float32), torch.tensor(0.7, dtype=torch.float64)
    grads = [torch.randn_like(p) for p in arguments[0]]
    right = [g.clone() for g in grads]
    value = reference.penalty_add_grad_(right, *arguments, scale)
    gpu.added_to = grads
    with pytest.warns(RuntimeWarning, match=f"{failing} cannot be compiled or started"):
        assert operators.penalty_add_grad_(grads, *arguments, scale) == value
    assert all(map(torch.equal, grads, right))
    assert not [name for name, _ in Launcher.launches if name == "penalty_kernel"]
    with pytest.warns(RuntimeWarning, match=failing):
        assert operators.penalty(*arguments) == reference.penalty(*arguments)
    with pytest.warns(RuntimeWarning, match=failing):
        assert torch.equal(operators.penalty_with_grad(*arguments)[1], reference.penalty_with_grad(*arguments)[1])


@pytest.mark.parametrize("failing", ["penalty_kernel", "sum_partials_kernel"])
def test_prepared_penalties_give_way(failing: str, gpu: Device) -> None:
    gpu.refused[failing] = NO_IMAGE
    arguments, scale = penalty_arguments(torch.float32), torch.tensor(0.7, dtype=torch.float64)
    arguments[0] = [torch.nn.Parameter(p) for p in arguments[0]]
    for p in arguments[0]:
        p.grad = torch.randn_like(p)
    right = [p.grad.clone() for p in arguments[0]]
    with torch.no_grad():
        expected = reference.penalty_add_grad_(right, *arguments, scale)
        penalty = TritonPenalty(*arguments, None)
        for _ in range(2):  # on the CPU its dispatcher's operators are those of another backend
            torch.testing.assert_close(penalty.value(), expected)
        torch.testing.assert_close(penalty.add_grad_(scale), expected)
    for p, grad in zip(arguments[0], right, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_inside_a_capture_it_is_an_error(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.refused["scale_grads_kernel"] = gpu.refused["fisher_linear_kernel"] = NO_IMAGE
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given = layer()
    before = given[0].clone()
    with pytest.raises(RuntimeError, match=r"fisher_linear_kernel cannot be .* inside the capture of a CUDA graph"):
        operators.fisher_linear_(*given)
    assert torch.equal(given[0], before)
    with pytest.raises(RuntimeError, match="inside the capture"):
        operators.scale_grads(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert not backends.gave_way()


def test_where_triton_is_required_it_is_an_error(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.refused["fisher_linear_kernel"] = NO_IMAGE
    monkeypatch.setenv("WPLFAST_REQUIRE", "cpp,triton")
    with pytest.raises(kernel.KernelError, match="fisher_linear_kernel"):
        operators.fisher_linear_(*layer())
    assert not backends.gave_way()


@pytest.mark.parametrize("text", ["out of memory", "an illegal memory access was encountered"])
def test_what_is_not_the_kernels_fault_is_raised_as_it_is(text: str, gpu: Device) -> None:
    gpu.refused["fisher_linear_kernel"] = RuntimeError(f"Triton Error [CUDA]: {text}")
    with pytest.raises(RuntimeError, match=text) as raised:
        operators.fisher_linear_(*layer())
    assert not isinstance(raised.value, kernel.KernelError)
    assert not backends.gave_way()


def test_nothing_of_a_failed_call_is_kept(gpu: Device) -> None:
    gpu.refused["fisher_linear_kernel"] = NO_IMAGE
    given = layer()
    kept = [weakref.ref(x) for x in given]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operators.fisher_linear_(*given)
    del given
    NO_IMAGE.__traceback__ = None
    gc.collect()
    assert not [x for x in kept if x() is not None]


def test_other_dtypes_are_still_served_by_kernels(gpu: Device) -> None:
    gpu.loads_left = 0
    with pytest.warns(RuntimeWarning, match="for torch.bfloat16"):
        operators.fisher_linear_(*layer())
    gpu.loads_left = 100
    operators.fisher_linear_(*layer(torch.float16))
    assert launched("fisher_linear_kernel") == 1


# ---- who launches ----------------------------------------------------------------------------------------------------


def gpu_has_passed() -> bool:
    """Tell whether a record of ``make gpu-test`` that passed on a GPU is among the results."""
    for path in RESULTS.glob("gpu-tests*.json"):
        found = json.loads(path.read_text())
        clean = not found["failures"] and not found["problems"] and found["counts"].get("passed", 0) > 0
        if clean and found["machine"].get("gpu") and found["machine"]["device"] == "cuda":
            return True
    return False


def test_tritons_own_launcher_is_the_default_until_a_gpu_has_passed() -> None:
    assert kernel.DEFAULT == "jit" or gpu_has_passed()


@pytest.mark.parametrize(
    ("chosen", "relaunches", "said"),
    [(None, False, "Triton's own launcher (WPLFAST_KERNELS=relaunch, auto"), ("relaunch", True, "then as compiled"),
     ("auto", True, "packs, else Triton's JIT")],
)  # fmt: skip
def test_the_environment_says_who_launches(chosen: str | None, relaunches: bool, said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "WPLFAST_KERNELS"}
    environment |= {} if chosen is None else {"WPLFAST_KERNELS": chosen}
    code = "from wplfast.backends.triton import kernel; print(kernel.RELAUNCHES)"
    code += "; from wplfast.cli import main; main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, _, rest = done.stdout.partition("\n")
    assert first == str(relaunches)
    assert said in rest


def test_by_default_every_launch_of_a_prepared_penalty_is_tritons(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, jit = [], kernel.Kernel.jit
    monkeypatch.setattr(kernel, "RELAUNCHES", False)
    monkeypatch.setattr(kernel.Kernel, "jit", lambda *args: (looks.append(args[0].__name__), jit(*args))[1])
    penalty = TritonPenalty(*penalty_arguments(torch.float32), None)
    for _ in range(3):
        penalty.value()
    assert looks == ["penalty_kernel", "sum_partials_kernel"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", ["jit", "relaunch", "auto"])
def test_every_way_to_launch_gives_right_results(chosen: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("on a GPU alone")
    environment = {**os.environ, "WPLFAST_KERNELS": chosen, "WPLFAST_REQUIRE": "triton"}
    program = [sys.executable, "-m", "wplfast", "selftest", "--device", "cuda"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
