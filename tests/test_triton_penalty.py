"""The Triton backend's penalty, and scaling of its gradient, against plain PyTorch in float64; see triton_cases.py."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import interpreter  # noqa: E402
from torch import Tensor  # noqa: E402
from triton_cases import (  # noqa: E402
    DEVICE,
    DTYPES,
    GRADIENT,
    RUNS_HERE,
    combined,
    error,
    exact,
    guarded,
    on_device,
    same_bits,
    surroundings,
)

from wplfast import backends  # noqa: E402
from wplfast.backends import reference  # noqa: E402
from wplfast.backends import triton as backend  # noqa: E402
from wplfast.backends.triton import penalty_launch as penalty_module  # noqa: E402
from wplfast.backends.triton import prepared as prepared_module  # noqa: E402
from wplfast.backends.triton import reduce, tables  # noqa: E402
from wplfast.ops.layout import flat_dtype, packed_starts, packed_views  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

#: dtypes of parameters and of their Fishers
KINDS = [(dtype, flat_dtype(dtype)) for dtype in DTYPES] + [(dtype, torch.bfloat16) for dtype in DTYPES[:3]]
SIZES = [(0,), (1,), (3, 5), (16,), (2048,), (2049,), (70, 131), (8192 + 3,)]


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_interpreter() -> None:
    interpreter.run(__file__, WPLFAST_BACKEND="triton")


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


@on_device
@pytest.mark.parametrize(
    ("kind", "offset", "per_tensor", "shift"), combined(KINDS, [False, True], [False, True], [0, 1])
)
def test_penalty(kind: tuple[torch.dtype, torch.dtype], offset: bool, per_tensor: bool, shift: int) -> None:
    dtype, fisher = kind
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
@pytest.mark.parametrize(("kind", "extension", "frozen"), combined(KINDS, [False, True], [(), FROZEN]))
def test_prepared_penalty(
    kind: tuple[torch.dtype, torch.dtype], extension: bool, frozen: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, fisher = kind
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


@on_device
@pytest.mark.parametrize(
    ("dtype", "factor_dtype", "factor"),
    combined(DTYPES, [torch.float32, torch.float64], [1.0, 0.37, -3e3, 0.0, float("nan"), float("inf"), 1 + 1e-9]),
)
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
