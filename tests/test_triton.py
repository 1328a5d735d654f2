"""The Triton backend against the plain-PyTorch backend in float64.

With a GPU these tests run on it. Without one they run in Triton's interpreter, which must be chosen before the first
import of Triton: ``TRITON_INTERPRET=1 pytest tests/test_triton.py``, or by ``test_under_interpreter``, which does that
in a process of its own so that a plain ``pytest`` covers them too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import interpreter  # noqa: E402
from torch import Tensor  # noqa: E402

from wplfast import backends  # noqa: E402
from wplfast.backends import reference  # noqa: E402
from wplfast.backends import triton as backend  # noqa: E402
from wplfast.backends.triton import conv_taps, launch, reduce, tables  # noqa: E402
from wplfast.backends.triton import fisher_embedding as embedding_module  # noqa: E402
from wplfast.backends.triton import fisher_linear as fisher_module  # noqa: E402
from wplfast.backends.triton import penalty_launch as penalty_module  # noqa: E402
from wplfast.backends.triton import prepared as prepared_module  # noqa: E402
from wplfast.ops.layout import flat_dtype, packed_starts, packed_views  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu"
RUNS_HERE = DEVICE == "cuda" or launch.INTERPRETED
on_device = pytest.mark.skipif(not RUNS_HERE, reason="test_under_interpreter runs it")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: Error of a gradient's element relative to the terms it sums: a few roundings of float32, or one of the storage type.
#: The interpreter truncates to bfloat16 where a GPU rounds to nearest.
TRUNCATES = launch.INTERPRETED
GRADIENT = {
    torch.float32: 3e-7,
    torch.bfloat16: 2**-7 if TRUNCATES else 2**-8,
    torch.float16: 2**-10,
    torch.float64: 1e-15,
}
#: A GPU runs programs in another order every time; the interpreter, which takes seconds, does not.
REPEATS = 2 if DEVICE == "cuda" else 1
#: dtypes of parameters and of their Fishers
KINDS = [(dtype, flat_dtype(dtype)) for dtype in DTYPES] + [(dtype, torch.bfloat16) for dtype in DTYPES[:3]]
SIZES = [(0,), (1,), (3, 5), (16,), (2048,), (2049,), (70, 131), (8192 + 3,)]


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_interpreter() -> None:
    interpreter.run(__file__, WPLFAST_BACKEND="triton")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, and draw fresh inputs (the seed is printed on failure)."""
    seed = int(os.environ.get("WPLFAST_TEST_SEED", "0")) or torch.seed() % 2**31
    print(f"WPLFAST_TEST_SEED={seed}")
    torch.manual_seed(seed)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def guarded(size: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Return a random tensor with 64 elements of other memory on both sides, ``shift`` elements off alignment."""
    numel = int(torch.tensor(size).prod())
    buffer = torch.randn(numel + 128 + shift, dtype=torch.float32).to(DEVICE, dtype)
    return buffer[64 + shift : 64 + shift + numel].view(size)


def surroundings(tensor: Tensor) -> Tensor:
    """Return a copy of the memory on both sides of a guarded tensor."""
    start = tensor.storage_offset()
    base = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return torch.cat([base[:start], base[start + tensor.numel() :]])


def anchors(
    dtype: torch.dtype,
    shift: int = 0,
    offset: bool = True,
    sizes: list[tuple[int, ...]] = SIZES,
    fisher: torch.dtype | None = None,
) -> dict:
    """Return the tensors of a penalty call; every other one misaligned by ``shift`` elements, one transposed."""
    wide = flat_dtype(dtype)

    def column(column_dtype: torch.dtype) -> list[Tensor]:
        tensors = [guarded(size, column_dtype, shift * (index % 2)) for index, size in enumerate(sizes)]
        return [t.t() if t.dim() == 2 else t for t in tensors]

    return {
        "theta": column(dtype),
        "theta_hat": column(dtype),
        "offset": [t.mul_(0.1) for t in column(wide)] if offset else [],
        "fisher": [t.square_() for t in column(fisher or wide)],
    }


def scalars(per_tensor: bool, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha, l2 and scale."""
    alpha = torch.rand(count if per_tensor else (), dtype=torch.float64) + 1.0
    return (
        alpha.to(DEVICE),
        torch.tensor(0.3, dtype=torch.float64).to(DEVICE),
        torch.rand((), dtype=torch.float64).to(DEVICE),
    )


def exact(arguments):  # type: ignore[no-untyped-def]
    """Return arguments in float64 on the CPU."""
    if isinstance(arguments, Tensor):
        return arguments.detach().cpu().double()
    return [exact(a) for a in arguments]


def error(result: Tensor, expected: Tensor, start: Tensor | None = None) -> float:
    """Return the relative error in norm; where ``start`` was added to, relative to what was summed, not to the sum."""
    difference = (result.detach().cpu().double() - expected).norm()
    scale = expected if start is None else start.cpu().double().abs() + (expected - start.cpu().double()).abs()
    return float(difference / scale.norm()) if difference else 0.0


def terms(call: tuple) -> list[Tensor]:
    """Return for each parameter the size of what its gradient's elements sum: where they cancel, errors do not."""
    theta, theta_hat, offset, fisher, *coefficients = exact(call)
    positive = [t.abs() for t in theta]
    negative = [[-t.abs() for t in tensors] for tensors in (theta_hat, offset)]
    _, packed = reference.penalty_with_grad(positive, *negative, fisher, *coefficients)
    return packed_views(packed, positive)


def close(result: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Tell whether a gradient is within rounding of the expected one."""
    difference = (result.detach().cpu().double() - expected).abs()
    return bool((difference <= GRADIENT[result.dtype] * size + 1e-7).all())


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tell whether tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_device
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("dtype", "fisher"), KINDS)
def test_penalty(dtype: torch.dtype, fisher: torch.dtype, offset: bool, per_tensor: bool, shift: int) -> None:
    tensors = anchors(dtype, shift, offset, fisher=fisher)
    alpha, l2, scale = scalars(per_tensor, len(SIZES))
    call = (*tensors.values(), alpha, l2)
    value_bound = 1e-14 if dtype == torch.float64 else 2e-7

    value, packed = backend.penalty_with_grad(*call)
    expected_value, expected = reference.penalty_with_grad(*exact(call))
    assert (value.dtype, packed.dtype) == (flat_dtype(dtype), dtype)
    assert error(value, expected_value) < value_bound
    assert error(backend.penalty(*call), expected_value) < value_bound
    sizes = terms(call)
    views = [packed_views(p, tensors["theta"]) for p in (packed, expected)]
    assert all(close(*row) for row in zip(*views, sizes, strict=True))
    assert not packed.isnan().any(), "the gaps of the packed buffer must be zero"

    grad = [guarded(size, dtype, shift) for size in SIZES]
    grad = [g.t() if g.dim() == 2 else g for g in grad]
    untouched = [surroundings(g) for g in grad]
    second = [guarded(size, dtype, shift) for size in SIZES]  # aligned alike: the order of a sum may depend on that
    second = [s.t().copy_(g) if g.dim() == 2 else s.copy_(g) for s, g in zip(second, grad, strict=True)]
    expected_grad = [g.clone() for g in exact(grad)]
    versions = [g._version for g in grad]
    added = backend.penalty_add_grad_(grad, *call, scale)
    assert all(g._version > version for g, version in zip(grad, versions, strict=True))
    reference.penalty_add_grad_(expected_grad, *exact(call), exact(scale))
    assert error(added, expected_value) < value_bound
    sizes = [s + g.cpu().double().abs() for s, g in zip(sizes, second, strict=True)]
    assert all(close(*row) for row in zip(grad, expected_grad, sizes, strict=True))
    assert same_bits([surroundings(g) for g in grad], untouched)

    again = backend.penalty_add_grad_(second, *call, scale)
    value_again, packed_again = backend.penalty_with_grad(*call)
    assert same_bits([added, value, packed, *grad], [again, value_again, packed_again, *second])


@on_device
@pytest.mark.parametrize("fisher", [torch.float32, torch.bfloat16])
def test_penalty_of_large_models_takes_long_chunks_and_a_middle_stage(
    fisher: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalty_module, "MANY_FROM", 0)
    monkeypatch.setattr(reduce, "SPAN", 2)
    tensors = anchors(torch.float32, sizes=[(5,), (8192,), (30_001,), (8191,)], fisher=fisher)
    call = (*tensors.values(), *scalars(True, 4)[:2])
    value, packed = backend.penalty_with_grad(*call)
    expected_value, expected = reference.penalty_with_grad(*exact(call))
    assert error(value, expected_value) < 2e-7
    views = [packed_views(p, tensors["theta"]) for p in (packed, expected)]
    assert all(close(*row) for row in zip(*views, terms(call), strict=True))


@on_device
def test_penalty_tells_fishers_of_two_types_at_one_address_apart() -> None:
    tensors = anchors(torch.float32, sizes=[(5000,)])
    alpha, l2, _ = scalars(False, 1)
    for fisher in (tensors["fisher"][0], tensors["fisher"][0].view(torch.bfloat16)[:5000].abs_().nan_to_num_(posinf=1)):
        fisher.clamp_(max=4)
        call = (tensors["theta"], tensors["theta_hat"], [], [fisher], alpha, l2)
        assert error(backend.penalty(*call), reference.penalty(*exact(call))) < 2e-7


@on_device
@pytest.mark.parametrize("sizes", [[(0,)], [(0,), (0, 3)]])
def test_penalty_of_nothing_is_zero(sizes: list[tuple[int, ...]]) -> None:
    tensors = anchors(torch.bfloat16, sizes=sizes)
    alpha, l2, scale = scalars(False, 1)
    value, packed = backend.penalty_with_grad(*tensors.values(), alpha, l2)
    assert (value.item(), value.dtype, packed.numel()) == (0.0, torch.float32, packed_starts([0])[1])
    assert backend.penalty_add_grad_(tensors["theta"], *tensors.values(), alpha, l2, scale).item() == 0.0


@on_device
def test_penalty_by_hand() -> None:
    wide = {"device": DEVICE, "dtype": torch.float64}
    theta, theta_hat = [torch.tensor([1.0, 2.0], device=DEVICE)], [torch.tensor([0.0, 4.0], device=DEVICE)]
    fisher, grad = [torch.tensor([3.0, 0.5], device=DEVICE)], [torch.tensor([10.0, 20.0], device=DEVICE)]
    alpha, l2, scale = torch.tensor(2.0, **wide), torch.tensor(0.5, **wide), torch.tensor(10.0, **wide)
    value = backend.penalty_add_grad_(grad, theta, theta_hat, [], fisher, alpha, l2, scale)
    assert value.item() == 2 / 2 * (3 * 1 + 0.5 * 4) + 0.5 / 2 * (1 + 4)
    assert grad[0].tolist() == [10 + 10 * (2 * 3 * 1 + 0.5 * 1), 20 + 10 * (2 * 0.5 * -2 + 0.5 * 2)]


@on_device
def test_penalty_tables_are_found_again_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    chunks, grads = tables.TableCache(2), tables.TableCache(2)
    monkeypatch.setattr(penalty_module, "_chunk_tables", chunks)
    monkeypatch.setattr(penalty_module, "_grad_tables", grads)
    original = tables.DeviceTable.__init__
    monkeypatch.setattr(tables.DeviceTable, "__init__", lambda *args: (built.append(1), original(*args))[1])
    alpha, l2, scale = scalars(False, 1)
    cases = [anchors(torch.float32, sizes=[(40,)]) for _ in range(3)]
    grad = [guarded((40,), torch.float32)]
    for tensors in cases[:2] * 3:
        backend.penalty_add_grad_(grad, *tensors.values(), alpha, l2, scale)
    assert len(built) == 3, "two chunk tables and one of gradients"
    backend.penalty_add_grad_([grad[0].clone()], *cases[0].values(), alpha, l2, scale)
    assert len(built) == 4, "moved gradients cost their own table alone"
    backend.penalty(*cases[2].values(), alpha, l2)
    assert (len(built), len(chunks)) == (5, 2)


FROZEN = (2, 5, 6)  # of SIZES


def prepared(
    dtype: torch.dtype = torch.float32,
    fisher: torch.dtype | None = None,
    per_tensor: bool = False,
    frozen: tuple[int, ...] = (),
) -> tuple[prepared_module.TritonPenalty, dict, tuple[Tensor, Tensor, Tensor]]:
    """Return a prepared penalty over parameters of SIZES that have gradients, its tensors, and alpha, l2 and scale."""
    tensors = anchors(dtype, 1, fisher=fisher)
    tensors["theta"] = [torch.nn.Parameter(t, requires_grad=i not in frozen) for i, t in enumerate(tensors["theta"])]
    for p in tensors["theta"]:
        p.grad = torch.randn(p.t().shape, device=DEVICE).to(dtype).t() if p.dim() == 2 else torch.randn_like(p)
    alpha, l2, scale = scalars(per_tensor, len(SIZES))
    constant = torch.rand_like(alpha)
    return prepared_module.TritonPenalty(*tensors.values(), alpha, l2, constant), tensors, (alpha, l2, scale)


def check_added(penalty: prepared_module.TritonPenalty, tensors: dict, coefficients: tuple, starts: list) -> None:
    """Call add_grad_ and compare the value and every ``.grad``, in which was ``starts``, with the float64 oracle."""
    alpha, l2, scale = coefficients
    theta = tensors["theta"]
    call = (*tensors.values(), alpha, l2)
    before = [torch.zeros_like(p) if start is None else start for p, start in zip(theta, starts, strict=True)]
    expected = [exact(b).clone() for b in before]
    value = reference.penalty_add_grad_(expected, *exact(call), exact(scale))
    value += 0.5 * (exact(alpha) * exact(penalty.constant)).sum()
    assert error(penalty.add_grad_(scale), value) < (1e-14 if theta[0].dtype == torch.float64 else 2e-7)
    for p, start, wanted, size in zip(theta, before, expected, terms(call), strict=True):
        if p.requires_grad:
            assert close(p.grad, wanted, size + exact(start).abs())


@on_device
@pytest.mark.parametrize("frozen", [(), FROZEN])
@pytest.mark.parametrize("extension", [False, True])
@pytest.mark.parametrize(("dtype", "fisher"), KINDS)
def test_prepared_penalty(
    dtype: torch.dtype, fisher: torch.dtype, extension: bool, frozen: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extension:
        monkeypatch.setattr(prepared_module, "parameter_table", lambda parameters: None)
    elif prepared_module.parameter_table([]) is None:
        pytest.skip("there is no table in C++")
    penalty, tensors, (alpha, l2, scale) = prepared(dtype, fisher, per_tensor=extension, frozen=frozen)
    theta, call = tensors["theta"], (*tensors.values(), alpha, l2)
    penalty.remember()
    assert penalty.unchanged([])
    expected_value, expected = reference.penalty_with_grad(*exact(call))
    expected_value += 0.5 * (exact(alpha) * exact(penalty.constant)).sum()
    bound = 1e-14 if dtype == torch.float64 else 2e-7
    for _ in range(2):
        value, packed = penalty.with_grad()
        assert (value.dtype, packed.dtype, value.shape) == (flat_dtype(dtype), dtype, ())
        assert error(value, expected_value) < bound
        assert error(penalty.value(), expected_value) < bound
        views = penalty.views(packed), packed_views(expected, theta)
        assert all(close(*row) for row in zip(*views, terms(call), strict=True))

    theta[2].grad = None if frozen else theta[2].grad  # one of the frozen has none, others have some nobody may touch
    for _ in range(2):
        starts = [None if p.grad is None else p.grad.clone() for p in theta]
        versions = [None if p.grad is None else p.grad._version for p in theta]
        check_added(penalty, tensors, (alpha, l2, scale), starts)
        for index, (p, start, version) in enumerate(zip(theta, starts, versions, strict=True)):
            if index in frozen:
                assert start is None or (same_bits([p.grad], [start]) and p.grad._version == version)
            else:
                assert p.grad._version > version
    assert theta[2].grad is None or not frozen


@on_device
@pytest.mark.parametrize("extension", [False, True])
def test_prepared_penalty_where_gradients_are_missing_or_moved(
    extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extension:
        monkeypatch.setattr(prepared_module, "parameter_table", lambda parameters: None)
    penalty, tensors, coefficients = prepared()
    theta = tensors["theta"]
    theta[3].grad = None
    check_added(penalty, tensors, coefficients, [p.grad if p.grad is None else p.grad.clone() for p in theta])
    theta[6].grad = torch.randn_like(theta[6]).contiguous()  # in another memory order than its parameter
    assert theta[6].grad.stride() != theta[6].stride()
    check_added(penalty, tensors, coefficients, [p.grad.clone() for p in theta])
    kept = [p.grad for p in theta]
    for p in theta:
        p.grad = torch.zeros_like(p)
    before = [g.clone() for g in kept]
    check_added(penalty, tensors, coefficients, [torch.zeros_like(p) for p in theta])
    assert same_bits(kept, before), "addresses of gradients that are gone must not be written to"
    theta[4].grad = torch.zeros_like(theta[4]).to_sparse()
    with pytest.raises(ValueError, match=r"\.grad must be dense"):
        penalty.add_grad_(coefficients[2])


@on_device
def test_prepared_penalty_makes_its_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"chunks": 0, "tables": 0, "common": 0}

    def count(owner, method: str, name: str) -> None:  # type: ignore[no-untyped-def]
        original = getattr(owner, method)

        def counting(*arguments):  # type: ignore[no-untyped-def]
            counted[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, method, counting)

    count(penalty_module.Streams, "chunks", "chunks")
    count(tables.DeviceTable, "__init__", "tables")
    count(penalty_module, "_launch", "common")
    penalty, tensors, coefficients = prepared()
    theta = tensors["theta"]
    for _ in range(3):
        penalty.value(), penalty.with_grad(), penalty.add_grad_(coefficients[2])
    assert counted == {"chunks": 1, "tables": 2, "common": 0}
    first = [p.grad for p in theta]
    for p in theta:
        p.grad = torch.zeros_like(p)
    penalty.add_grad_(coefficients[2])
    assert counted == {"chunks": 1, "tables": 3, "common": 0}, "moved gradients cost their own table alone"
    for p, grad in zip(theta, first, strict=True):
        p.grad = grad
    penalty.add_grad_(coefficients[2])
    assert counted == {"chunks": 1, "tables": 3, "common": 0}, "and are found again"


@on_device
def test_prepared_penalty_is_watched_and_of_nothing_zero() -> None:
    penalty, tensors, _ = prepared()
    theta = tensors["theta"]
    penalty.remember()
    holder = {"weight": theta[0]}
    assert penalty.unchanged([(holder, "weight", theta[0])])
    assert not penalty.unchanged([(holder, "weight", theta[1])])
    theta[4].data = theta[4].data.clone()
    assert not penalty.unchanged([])
    empty = [torch.nn.Parameter(torch.empty(0, 3, device=DEVICE))]
    empty[0].grad = torch.empty(0, 3, device=DEVICE)
    alpha, l2, scale = scalars(False, 1)
    anchor = [e.detach() for e in empty]
    nothing = prepared_module.TritonPenalty(empty, anchor, [], anchor, alpha, l2)
    assert nothing.value().item() == nothing.with_grad()[0].item() == nothing.add_grad_(scale).item() == 0.0
    merged = prepared_module.TritonPenalty(empty, anchor, [], anchor, alpha, l2, torch.full_like(alpha, 2.0))
    assert merged.value().item() == pytest.approx(alpha.item(), rel=1e-6)


@on_device
def test_prepared_penalty_of_many_parameters_sums_their_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "_BLOCK", 4)
    monkeypatch.setattr(reduce, "SPAN", 8)
    penalty, tensors, (alpha, l2, _) = prepared(per_tensor=True)
    expected = reference.penalty(*exact((*tensors.values(), alpha, l2)))
    expected += 0.5 * (exact(alpha) * exact(penalty.constant)).sum()
    assert error(penalty.value(), expected) < 2e-7


@on_device
def test_prepared_penalty_of_this_backend_serves_its_device() -> None:
    served = DEVICE == "cuda" or os.environ.get("WPLFAST_BACKEND") == "triton"
    assert (backends.prepared_penalty(DEVICE) is prepared_module.TritonPenalty) == served


@on_device
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA graphs")
def test_prepared_penalty_in_a_cuda_graph() -> None:
    penalty, tensors, coefficients = prepared(frozen=FROZEN)
    theta, scale = tensors["theta"], coefficients[2]
    with torch.cuda.stream(torch.cuda.Stream()):  # a warm-up makes tables and compiles kernels
        penalty.with_grad(), penalty.add_grad_(scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, _ = penalty.with_grad()
        added = penalty.add_grad_(scale)
    for _ in range(3):
        with torch.no_grad():
            for p in theta:
                p.add_(0.1)
        starts = [p.grad.clone() for p in theta]
        expected_grad = exact(starts)
        expected = reference.penalty_add_grad_(expected_grad, *exact((*tensors.values(), *coefficients)))
        expected += 0.5 * (exact(coefficients[0]) * exact(penalty.constant)).sum()
        graph.replay()
        assert error(value, expected) < 2e-7
        assert error(added, expected) < 2e-7
        for p, start, wanted in zip(theta, starts, expected_grad, strict=True):
            assert error(p.grad, wanted) < 1e-6 if p.requires_grad else torch.equal(p.grad, start)


def layer(n: int, t: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return random activations and output gradients."""
    return torch.randn(n, t, d_in).to(DEVICE, dtype), torch.randn(n, t, d_out).to(DEVICE, dtype)


def check_versions(before: tuple[int, int], fisher: Tensor, gradient: Tensor | None) -> None:
    """Check that autograd could know of what was written."""
    assert fisher._version > before[0]
    assert gradient is None or gradient._version > before[1]


def check_fisher(a: Tensor, g: Tensor, weights: Tensor | None, gradient: bool, bound: float) -> None:
    """Compare one call of fisher_linear_ with the float64 oracle, and a second call with the first."""
    shape = (g.shape[2], a.shape[2])
    start = torch.rand(2, *shape, dtype=flat_dtype(a.dtype), device=DEVICE)
    results = []
    for _ in range(2):
        fisher, mean = start.clone()
        versions = fisher._version, mean._version
        backend.fisher_linear_(fisher, a, g, weights, mean if gradient else None)
        check_versions(versions, fisher, mean if gradient else None)
        results.append([fisher, mean])
    assert same_bits(*results)
    fisher, mean = exact(start).clone()
    inputs = [*exact((a, g)), None if weights is None else exact(weights), mean if gradient else None]
    reference.fisher_linear_(fisher, *inputs)
    assert error(results[0][0], fisher, start[0]) < bound
    assert error(results[0][1], mean, start[1]) < bound


SHAPES = [
    (3, 5, 7, 9), (5, 33, 70, 45), (7, 1, 17, 130), (33, 2, 65, 24), (2, 70, 72, 136), (1, 1, 1, 1), (70, 1, 16, 24),
    (1, 100, 1, 66),
]  # fmt: skip


PLAIN, WEIGHTED = (False, None), (True, torch.float64)
VARIANTS = {
    torch.float32: [PLAIN, (True, None), WEIGHTED],
    torch.bfloat16: [PLAIN, WEIGHTED],
    torch.float16: [WEIGHTED],
}


@on_device
@pytest.mark.parametrize(("dtype", "variant"), [(dtype, variant) for dtype in VARIANTS for variant in VARIANTS[dtype]])
@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_linear(dtype: torch.dtype, shape: tuple[int, ...], variant: tuple) -> None:
    gradient, weighted = variant
    weights = None if weighted is None else torch.rand(shape[0], dtype=weighted).to(DEVICE)
    check_fisher(*layer(*shape, dtype), weights, gradient, bound=1e-6)


@on_device
@pytest.mark.parametrize("mode", ["bf16x6", "bf16x3", "tf32", "ieee"])
@pytest.mark.parametrize("t", [1, 20, 70])
def test_fisher_linear_float32_modes(mode: str, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WPLFAST_TRITON_FP32", mode)
    bound = {"bf16x6": 1e-6, "bf16x3": 2e-4 if TRUNCATES else 2e-5, "tf32": 3e-3, "ieee": 1e-6}[mode]
    check_fisher(*layer(5, t, 72, 40), None, True, bound)
    monkeypatch.setenv("WPLFAST_TRITON_FP32", "fp8")
    with pytest.raises(ValueError, match="WPLFAST_TRITON_FP32 must be one of"):
        check_fisher(*layer(1, 2, 3, 4), None, False, bound)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 35])
def test_fisher_linear_strides(dtype: torch.dtype, t: int) -> None:
    n, d_in, d_out = 6, 24, 40
    a, g = layer(n, t, d_in, d_out, dtype)
    time_first = a.transpose(0, 1).contiguous().transpose(0, 1), g.transpose(0, 1).contiguous().transpose(0, 1)
    wider = layer(n, t, d_in + 9, d_out + 8, dtype)
    columns = wider[0][:, :, 9:], wider[1][:, :, :d_out]
    one_sample = layer(1, t, d_in, 1, dtype)[0].expand(n, t, d_in)
    one_step = layer(n, 1, d_in, 1, dtype)[0].expand(n, t, d_in)
    for activations, grad_outputs in (time_first, columns, (one_sample, g), (one_step, g), (a[::2], g[1::2])):
        check_fisher(activations, grad_outputs, None, True, bound=1e-6)


@on_device
def test_fisher_linear_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_module, "WORKSPACE", 4000)
    for t in (1, 3):
        check_fisher(*layer(7, t, 9, 20), torch.rand(7).to(DEVICE), True, bound=1e-6)


@on_device
def test_fisher_linear_in_float64() -> None:
    check_fisher(*layer(3, 4, 5, 6, torch.float64), torch.rand(3).to(DEVICE), True, bound=1e-14)


@on_device
@pytest.mark.parametrize("t", [2, 64])
def test_fisher_linear_keeps_float32_accuracy_where_gradients_cancel(t: int) -> None:
    a, g = layer(4, t, 64, 64)
    g[:, 1::2] = -g[:, ::2] * (1 + 1e-3 * torch.randn(4, t // 2, 1, device=DEVICE))
    a[:, 1::2] = a[:, ::2]
    fisher = torch.zeros(64, 64, device=DEVICE)
    backend.fisher_linear_(fisher, a, g, None, None)
    loop = sum((g[n].cpu().t() @ a[n].cpu()).square() for n in range(4))
    expected = torch.zeros(64, 64, dtype=torch.float64)
    reference.fisher_linear_(expected, *exact((a, g)), None, None)
    assert error(fisher, expected) < max(1e-6, 4 * error(loop, expected))


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5), (3, 4, 5, 0)])
def test_fisher_linear_of_nothing_adds_nothing(shape: tuple[int, ...]) -> None:
    a, g = layer(*shape)
    fisher = torch.rand(shape[3], shape[2], device=DEVICE)
    before = fisher.clone()
    backend.fisher_linear_(fisher, a, g, None, None)
    assert torch.equal(fisher, before)


def conv(
    n: int, m: int, size: tuple, channels: tuple, kernel: tuple, settings: tuple, dtype: torch.dtype, short: int = 0
) -> tuple:
    """Return inputs and output gradients of a convolution, ``short`` positions missing, and its Fisher's shape."""
    stride, padding, dilation, groups = settings
    reach = [s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    positions = [(r - 1) // s + 1 - short for r, s in zip(reach, stride, strict=True)]
    x = torch.randn(n, m, *size, channels[0]).to(DEVICE, dtype)
    g = torch.randn(n, m, *positions, channels[1]).to(DEVICE, dtype)
    return x, g, (channels[1], channels[0] // groups, *kernel)


def check_conv(
    x: Tensor, g: Tensor, shape: tuple, weights: Tensor | None, gradient: bool, settings: tuple, bound: float
) -> None:
    """Compare one call of fisher_conv_ with the float64 oracle, and a second call with the first."""
    start = torch.rand(2, *shape, dtype=flat_dtype(x.dtype), device=DEVICE)
    results = []
    for _ in range(REPEATS):
        fisher, mean = start.clone()
        versions = fisher._version, mean._version
        backend.fisher_conv_(fisher, x, g, weights, mean if gradient else None, *settings)
        check_versions(versions, fisher, mean if gradient else None)
        results.append([fisher, mean])
    assert same_bits(results[0], results[-1])
    fisher, mean = exact(start).clone()
    inputs = [*exact((x, g)), None if weights is None else exact(weights), mean if gradient else None]
    reference.fisher_conv_(fisher, *inputs, *settings)
    assert error(results[0][0], fisher, start[0]) < bound
    assert error(results[0][1], mean, start[1]) < bound


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONVOLUTIONS = {
    "two images": (2, 2, (4, 5), (16, 24), (3, 2), ((2, 1), (1, 0), (1, 2), 1), BF16),
    "odd widths": (3, 1, (3, 9), (20, 17), (1, 2), ((1, 1), (0, 1), (1, 1), 1), FP32),
    "no tap sees all": (2, 1, (3, 3), (16, 8), (2, 2), ((1, 1), (2, 2), (1, 1), 1), BF16),
    "one dimension": (5, 2, (9,), (20, 17), (3,), ((2,), (1,), (1,), 1), FP16, 1),
    "three dimensions": (2, 2, (4, 3, 3), (16, 16), (2, 1, 2), ((2, 1, 1), (1, 1, 0), (1, 1, 2), 1), BF16),
    "several tiles": (2, 1, (6,), (272, 144), (2,), ((1,), (0,), (1,), 2), BF16),
    "packed groups": (2, 1, (3, 11), (24, 16), (2, 1), ((1, 1), (1, 0), (1, 1), 4), FP32),
    "last block part full": (3, 1, (5,), (96, 48), (3,), ((1,), (1,), (1,), 6), BF16),
    "padded groups": (2, 1, (5,), (12, 24), (2,), ((1,), (0,), (1,), 3), BF16),
    "strided points": (3, 1, (5, 4), (24, 16), (1, 1), ((2, 2), (0, 0), (1, 1), 1), BF16),
    "points": (3, 2, (5, 4), (24, 16), (1, 1), ((1, 1), (0, 0), (1, 1), 1), BF16),
    "one position": (9, 1, (3, 3), (3, 8), (3, 3), ((1, 1), (0, 0), (1, 1), 1), FP32),
    "one position in place": (9, 1, (2, 2), (16, 8), (2, 2), ((1, 1), (0, 0), (1, 1), 1), BF16),
    "colours": (3, 2, (6, 7), (3, 9), (3, 3), ((2, 2), (1, 1), (1, 1), 1), BF16),
    "few channels": (3, 1, (3, 2, 5), (6, 64), (1, 2, 2), ((1, 2, 2), (0, 1, 0), (1, 1, 2), 2), FP32),
    "depthwise": (3, 2, (6, 7), (9, 9), (3, 3), ((2, 2), (1, 1), (1, 1), 9), FP32),
    "depthwise multiplied": (5, 1, (3, 2, 4), (8, 16), (1, 2, 2), ((1, 1, 1), (0, 1, 1), (1, 2, 1), 8), BF16, 1),
    "depthwise in octets": (1, 1, (21,), (72, 72), (5,), ((1,), (2,), (1,), 72), FP16),
    "float64": (2, 1, (4, 4), (4, 4), (2, 2), ((1, 1), (0, 0), (1, 1), 2), torch.float64),
}


@on_device
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_fisher_conv(name: str) -> None:
    n, m, size, channels, kernel, settings, *rest = CONVOLUTIONS[name]
    x, g, shape = conv(n, m, size, channels, kernel, settings, *rest)
    bound = 1e-14 if x.dtype == torch.float64 else 1e-6
    gradient = len(name) % 2 == 0  # half of the cases
    check_conv(x, g, shape, torch.rand(n).to(DEVICE), gradient, settings, bound)
    if name in ("one dimension", "colours", "depthwise"):
        check_conv(x, g, shape, None, not gradient, settings, bound)


@on_device
def test_fisher_conv_in_several_launches_and_without_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_module, "WORKSPACE", 2000)
    monkeypatch.setattr(conv_taps, "_MAX_SCRATCH", 0)
    settings = (1,), (1,), (1,), 1
    for channels in ((17, 20), (3, 9)):
        x, g, shape = conv(4, 1, (7,), channels, (2,), settings, FP32)
        check_conv(x, g, shape, torch.rand(4).to(DEVICE), True, settings, 1e-6)
    x, g, shape = conv(1, 1, (7,), (16, 24), (2,), settings, BF16)  # one sample cannot be split
    check_conv(x, g, shape, None, True, settings, 1e-6)


@on_device
@pytest.mark.parametrize(("channels", "groups"), [((16, 16), 1), ((3, 8), 1), ((8, 8), 8)])
def test_fisher_conv_leaves_unseen_inputs_alone(channels: tuple[int, int], groups: int) -> None:
    settings = (2, 2), (0, 0), (1, 1), groups
    x, g, shape = conv(2, 1, (9, 9), channels, (1, 2), settings, FP32, short=1)
    seen = x.clone()
    x[:, :, 1::2] = x[:, :, 7:] = x[:, :, :, 6:] = float("inf")
    results = []
    for inputs in (x, seen):
        results.append(torch.zeros(shape, device=DEVICE))
        backend.fisher_conv_(results[-1], inputs, g, None, None, *settings)
    assert same_bits(results[:1], results[1:])


@on_device
@pytest.mark.parametrize(
    ("x", "g"), [((0, 1, 4, 8), (0, 1, 3, 8)), ((2, 0, 4, 8), (2, 0, 3, 8)), ((2, 1, 4, 8), (2, 1, 0, 8)),
                 ((2, 1, 4, 0), (2, 1, 3, 8)), ((2, 1, 4, 8), (2, 1, 3, 0))],
)  # fmt: skip
def test_fisher_conv_of_nothing_adds_nothing(x: tuple[int, ...], g: tuple[int, ...]) -> None:
    fisher = torch.rand(g[3], x[3], 2, device=DEVICE)
    before = fisher.clone()
    backend.fisher_conv_(fisher, torch.randn(x).to(DEVICE), torch.randn(g).to(DEVICE), None, None, [1], [0], [1], 1)
    assert torch.equal(fisher, before)


def uses(n: int, t: int, v: int, unused: float) -> Tensor:
    """Return random indices below v, small ones more often, and negative ones."""
    indices = (torch.rand(n, t) ** 3 * v).long()
    indices[torch.rand(n, t) < unused] = -3
    return indices.to(DEVICE)


def check_embedding(indices: Tensor, g: Tensor, v: int, weights: Tensor | None, gradient: bool, bound: float) -> None:
    """Compare one call of fisher_embedding_ with the float64 oracle, and a second call with the first."""
    start = torch.rand(2, v, g.shape[2], dtype=flat_dtype(g.dtype), device=DEVICE)
    results = []
    for _ in range(REPEATS):
        fisher, mean = start.clone()
        versions = fisher._version, mean._version
        backend.fisher_embedding_(fisher, indices, g, weights, mean if gradient else None)
        check_versions(versions, fisher, mean if gradient else None)
        results.append([fisher, mean])
    assert same_bits(results[0], results[-1])
    fisher, mean = exact(start).clone()
    weights = None if weights is None else exact(weights)
    reference.fisher_embedding_(fisher, indices.cpu(), exact(g), weights, mean if gradient else None)
    assert error(results[0][0], fisher, start[0]) < bound
    assert error(results[0][1], mean, start[1]) < bound


@on_device
@pytest.mark.parametrize("shape", [(4, 30, 3, 20), (1, 100, 2, 8), (40, 1, 4, 24), (2, 30, 2, 300), (3, 4, 90, 5)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fisher_embedding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    n, t, v, d = shape
    weights = torch.rand(n).to(DEVICE) if n > 1 else None
    g = torch.randn(n, t, d).to(DEVICE, dtype)
    check_embedding(uses(n, t, v, 0.2), g, v, weights, n > 2, 1e-6)


@on_device
@pytest.mark.parametrize(("dtype", "bound"), [(FP16, 1e-6), (torch.float64, 1e-14)])
def test_fisher_embedding_of_other_types(dtype: torch.dtype, bound: float) -> None:
    g = torch.randn(3, 9, 12).to(DEVICE, dtype)
    check_embedding(uses(3, 9, 4, 0.2), g, 4, torch.rand(3, dtype=torch.float64).to(DEVICE), True, bound)


@on_device
def test_fisher_embedding_with_runs_of_every_length_across_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SPAN", 4), ("ROWS", 4), ("SPANS", 2)):
        monkeypatch.setattr(embedding_module, name, value)
    for n, t, v, unused in [(9, 2, 1, 0), (2, 23, 1, 0), (9, 6, 2, 0.3), (8, 8, 3, 0), (5, 9, 6, 0.1), (1, 4, 9, 0.5)]:
        check_embedding(uses(n, t, v, unused), torch.randn(n, t, 3).to(DEVICE), v, torch.rand(n).to(DEVICE), True, 1e-6)


@on_device
def test_fisher_embedding_in_several_launches_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_module, "MAX_USES", 20)
    check_embedding(uses(5, 9, 4, 0), torch.randn(5, 9, 3).to(DEVICE), 4, torch.rand(5).to(DEVICE), False, 1e-6)
    for n, t, v, d, unused in [
        (0, 3, 4, 5, 0),
        (3, 0, 4, 5, 0),
        (3, 4, 5, 0, 0),
        (3, 4, 0, 5, 1.1),
        (3, 40, 2, 5, 1.1),
    ]:
        fisher = torch.rand(v, d, device=DEVICE)
        before = fisher.clone()
        backend.fisher_embedding_(fisher, uses(n, t, v, unused), torch.randn(n, t, d).to(DEVICE), None, None)
        assert torch.equal(fisher, before)


LAYOUTS = {
    "columns": lambda x: x,
    "steps": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "samples": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "every other": lambda x: torch.cat([x, x], 2)[:, :, ::2],
    "shifted": lambda x: torch.cat([x, x], 2)[:, :, x.shape[2] - 1 : -1],
}


@on_device
@pytest.mark.parametrize("layouts", [("columns",) * 2, ("steps",) * 2, ("columns", "steps"), ("steps", "samples"),
                                     ("expanded", "columns"), ("every other", "shifted")])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_grads(dtype: torch.dtype, layouts: tuple[str, str]) -> None:
    for n, t, d in [(3, 70, 24), (1, 130, 8), (2, 150, 5), (5, 1, 33), (2, 49, 200)][:: 1 if dtype == BF16 else 3]:
        a, g = (LAYOUTS[layout](torch.randn(n, t, d).to(DEVICE, dtype)) for layout in layouts)
        results = [backend.scale_grads(a, g) for _ in range(REPEATS)]
        expected, size = reference.scale_grads(*exact((a, g))), reference.scale_grads(*exact((a.abs(), g.abs())))
        assert (results[0].shape, results[0].dtype) == ((n, d), flat_dtype(dtype))
        assert results[0].is_contiguous()
        bound = 1e-15 if dtype == torch.float64 else 3e-7
        assert bool(((exact(results[0]) - expected).abs() <= bound * size).all())
        assert same_bits(results[:1], results[-1:])


@on_device
def test_scale_grads_of_nothing_are_zero() -> None:
    for shape in [(0, 3, 4), (3, 0, 4), (3, 4, 0)]:
        a = torch.ones(shape, device=DEVICE)
        assert torch.equal(backend.scale_grads(a, a), torch.zeros(shape[0], shape[2], device=DEVICE))


@on_device
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (0, 4), (4, 0), (700, 300), (1000, 3), (3, 2, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_squares(dtype: torch.dtype, shape: tuple[int, ...], weighted: bool) -> None:
    grads = torch.randn(shape).to(DEVICE, dtype)
    weights = torch.rand(shape[0]).to(DEVICE) if weighted else None
    start = torch.rand(shape[1:], dtype=flat_dtype(dtype), device=DEVICE)
    results = [start.clone(), start.clone()]
    for fisher in results:
        version = fisher._version
        backend.accumulate_squares_(fisher, grads, weights)
        assert fisher._version > version or grads.numel() == 0
    assert same_bits(results[:1], results[1:])
    expected = exact(start).clone()
    reference.accumulate_squares_(expected, exact(grads), None if weights is None else exact(weights))
    assert error(results[0], expected) < (1e-14 if dtype == torch.float64 else 2e-7)


@on_device
def test_accumulate_squares_of_many_samples() -> None:
    n_samples = 100_000 if DEVICE == "cuda" else 20_000
    grads = torch.rand(n_samples, 3).to(DEVICE) + 0.5
    fisher = torch.zeros(3, device=DEVICE)
    backend.accumulate_squares_(fisher, grads, None)
    assert error(fisher, exact(grads).square().sum(0)) < 2e-7


@on_device
@pytest.mark.parametrize("factor", [1.0, 0.37, -3e3, 0.0, float("nan"), float("inf"), 1 + 1e-9])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_unless_one(dtype: torch.dtype, factor_dtype: torch.dtype, factor: float) -> None:
    times = torch.tensor(factor, dtype=factor_dtype).to(DEVICE)
    for numel, shift in [(1, 0), (4096, 0), (17 * 4096 + 21, 1), (8192, 3), (16 * 4096 * 2, 0)][
        :: 1 if factor < 1 else 2
    ]:
        tensor = guarded((numel,), dtype, shift)
        start, untouched, version = tensor.clone(), surroundings(tensor), tensor._version
        backend.scale_unless_one_(tensor, times)
        assert tensor._version > version
        assert same_bits([surroundings(tensor)], [untouched])
        if times.to(flat_dtype(dtype)) == 1:
            assert same_bits([tensor], [start])
            continue
        result, expected = exact(tensor), exact(start) * exact(times)
        smallest = torch.finfo(dtype).smallest_normal  # below it, roundings are absolute
        near = (result - expected).abs() <= GRADIENT[dtype] * expected.abs() + smallest
        assert bool((near | (result == expected) | (result.isnan() & expected.isnan())).all())


@on_device
def test_scale_unless_one_of_nothing_and_of_matrices() -> None:
    times = torch.tensor(0.5, device=DEVICE)
    backend.scale_unless_one_(torch.empty(0, device=DEVICE), times)
    matrix = guarded((3, 70), torch.float32)
    start = matrix.clone()
    backend.scale_unless_one_(matrix, times)
    assert torch.equal(matrix, start / 2)


@on_device
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs 40 GB of GPU memory")
def test_penalty_beyond_two_to_the_31_elements() -> None:
    numel = 2**31 + 5
    theta = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE)
    theta[-1] = 3.0
    fisher = torch.ones(numel, device=DEVICE)
    alpha, l2, _ = scalars(False, 1)
    value, packed = backend.penalty_with_grad([theta], [torch.zeros_like(theta)], [], [fisher], alpha, l2)
    assert value.item() == pytest.approx(4.5 * (alpha + l2).item(), rel=1e-6)
    assert packed[numel - 1].item() == pytest.approx(3 * (alpha + l2).item(), rel=8e-3)
    assert not packed[:-100].any()
