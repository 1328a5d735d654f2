"""The Triton backend's Fisher kernels against plain PyTorch in float64; see triton_cases.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import interpreter  # noqa: E402
from torch import Tensor  # noqa: E402
from triton_cases import (  # noqa: E402
    DEVICE,
    DTYPES,
    REPEATS,
    RUNS_HERE,
    TRUNCATES,
    error,
    exact,
    on_device,
    same_bits,
)

from wplfast.backends import reference  # noqa: E402
from wplfast.backends import triton as backend  # noqa: E402
from wplfast.backends.triton import conv_taps, squares  # noqa: E402
from wplfast.backends.triton import fisher_embedding as embedding_module  # noqa: E402
from wplfast.backends.triton import fisher_linear as fisher_module  # noqa: E402
from wplfast.ops.layout import flat_dtype  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_interpreter() -> None:
    interpreter.run(__file__, WPLFAST_BACKEND="triton")


def layer(n: int, t: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return random activations and output gradients."""
    return torch.randn(n, t, d_in).to(DEVICE, dtype), torch.randn(n, t, d_out).to(DEVICE, dtype)


def check(
    operator: str,
    shape: tuple[int, ...],
    inputs: tuple[Tensor, Tensor],
    weights: Tensor | None,
    gradient: bool,
    bound: float,
    settings: tuple = (),
) -> None:
    """Compare one call of an operator with the float64 oracle, and a second call with the first."""
    start = torch.rand(2, *shape, dtype=flat_dtype(inputs[1].dtype), device=DEVICE)
    results = []
    for _ in range(REPEATS):
        fisher, mean = start.clone()
        versions = fisher._version, mean._version
        getattr(backend, operator)(fisher, *inputs, weights, mean if gradient else None, *settings)
        assert fisher._version > versions[0], "autograd could not know of what was written"
        assert mean._version > versions[1] or not gradient
        results.append([fisher, mean])
    assert same_bits(results[0], results[-1])
    fisher, mean = exact(start).clone()
    wide = [exact(t) if t.is_floating_point() else t.cpu() for t in inputs]
    weights = None if weights is None else exact(weights)
    getattr(reference, operator)(fisher, *wide, weights, mean if gradient else None, *settings)
    assert error(results[0][0], fisher, start[0]) < bound
    assert error(results[0][1], mean, start[1]) < bound


def check_fisher(a: Tensor, g: Tensor, weights: Tensor | None, gradient: bool, bound: float) -> None:
    check("fisher_linear_", (g.shape[2], a.shape[2]), (a, g), weights, gradient, bound)


SHAPES = [
    (3, 5, 7, 9), (5, 33, 70, 45), (7, 1, 17, 130), (33, 2, 65, 24), (2, 70, 72, 136), (1, 1, 1, 1), (70, 1, 16, 24),
    (1, 100, 1, 66),
]  # fmt: skip
if DEVICE == "cpu":  # a program prepares a row of a sample, and the interpreter takes milliseconds for each
    SHAPES[1], SHAPES[3], SHAPES[4], SHAPES[7] = (3, 33, 70, 45), (9, 2, 65, 24), (2, 66, 72, 136), (1, 70, 1, 66)


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
    check_fisher(*layer(5 if DEVICE == "cuda" else 3, t, 72, 40), None, True, bound)
    monkeypatch.setenv("WPLFAST_TRITON_FP32", "fp8")
    with pytest.raises(ValueError, match="WPLFAST_TRITON_FP32 must be one of"):
        check_fisher(*layer(1, 2, 3, 4), None, False, bound)


@on_device
@pytest.mark.parametrize(("dtype", "t"), [(torch.float32, 1), (torch.float32, 6), (torch.bfloat16, 1),
                                          (torch.bfloat16, 35), (torch.bfloat16, 66)])  # fmt: skip
def test_fisher_linear_strides(dtype: torch.dtype, t: int) -> None:
    """Operands of float32 are brought into one order before; others are read in place, at 66 steps in two chunks."""
    n, d_in, d_out = 4, 24, 40
    a, g = layer(n, t, d_in, d_out, dtype)
    time_first = a.transpose(0, 1).contiguous().transpose(0, 1), g.transpose(0, 1).contiguous().transpose(0, 1)
    wider = layer(n, t, d_in + 9, d_out + 8, dtype)
    columns = wider[0][:, :, 9:], wider[1][:, :, :d_out]
    one_sample = layer(1, t, d_in, 1, dtype)[0].expand(n, t, d_in)
    one_step = layer(n, 1, d_in, 1, dtype)[0].expand(n, t, d_in)
    for activations, grad_outputs in (time_first, columns, (one_sample, g), (one_step, g), (a[::2], g[1::2])):
        check_fisher(activations, grad_outputs, None, True, bound=1e-6)


@on_device
@pytest.mark.parametrize("t", [1, 33])
def test_fisher_linear_gives_the_same_bits_again(t: int) -> None:
    (a, g), weights, results = layer(3, t, 70, 45), torch.rand(3).to(DEVICE), []
    for _ in range(2):
        results.append([torch.zeros(45, 70, device=DEVICE) for _ in range(2)])
        backend.fisher_linear_(results[-1][0], a, g, weights, results[-1][1])
    assert same_bits(*results)


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
    check("fisher_conv_", shape, (x, g), weights, gradient, bound, settings)


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


def uses(n: int, t: int, v: int, unused: float) -> Tensor:
    """Return random indices below v, small ones more often, and negative ones."""
    indices = (torch.rand(n, t) ** 3 * v).long()
    indices[torch.rand(n, t) < unused] = -3
    return indices.to(DEVICE)


def check_embedding(indices: Tensor, g: Tensor, v: int, weights: Tensor | None, gradient: bool, bound: float) -> None:
    check("fisher_embedding_", (v, g.shape[2]), (indices, g), weights, gradient, bound)


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
def test_fisher_embedding_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_module, "MAX_USES", 20)
    check_embedding(uses(5, 9, 4, 0), torch.randn(5, 9, 3).to(DEVICE), 4, torch.rand(5).to(DEVICE), False, 1e-6)


#: The largest relative error of one operation.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float64)}

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
        bound = 16 * ROUNDING[flat_dtype(dtype)]  # of up to 150 terms that the interpreter adds one after the other
        assert bool(((exact(results[0]) - expected).abs() <= bound * size).all())
        assert same_bits(results[:1], results[-1:])


#: Several splits of the samples, whose ends fill no block of rows, and two blocks of columns.
LONG = (700, 300) if DEVICE == "cuda" else (201, 300)


@on_device
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (0, 4), (4, 0), LONG, (LONG[0] + 50, 3), (3, 2, 5)])
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
def test_accumulate_squares_loses_nothing_beside_a_large_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of about 1 after one of 2^24, to which float32 adds nothing below 1, in every row of a block."""
    monkeypatch.setattr(squares, "MIN_SAMPLES", 1 << 20)  # one program sums all
    grads = torch.rand(400, 3).to(DEVICE) + 0.5
    grads[: squares.ROWS] = 4096
    fisher = torch.zeros(3, device=DEVICE)
    backend.accumulate_squares_(fisher, grads, None)
    assert error(fisher, exact(grads).square().sum(0)) < 2e-7


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@on_device
def test_of_nothing_nothing_is_added() -> None:
    """Sizes of which one is zero, and indices of which none is used."""
    linear = [(0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5), (3, 4, 5, 0)]
    conv = [((0, 1, 4, 8), (0, 1, 3, 8)), ((2, 0, 4, 8), (2, 0, 3, 8)), ((2, 1, 4, 8), (2, 1, 0, 8)),
            ((2, 1, 4, 0), (2, 1, 3, 8)), ((2, 1, 4, 8), (2, 1, 3, 0))]  # fmt: skip
    embedding = [(0, 3, 4, 5, 0), (3, 0, 4, 5, 0), (3, 4, 5, 0, 0), (3, 4, 0, 5, 1.1), (3, 40, 2, 5, 1.1)]
    calls = [
        *[(backend.fisher_linear_, (o, i), layer(n, t, i, o), ()) for n, t, i, o in linear],
        *[(backend.fisher_conv_, (g[3], x[3], 2), (random(*x), random(*g)), ([1], [0], [1], 1)) for x, g in conv],
        *[
            (backend.fisher_embedding_, (v, d), (uses(n, t, v, unused), random(n, t, d)), ())
            for n, t, v, d, unused in embedding
        ],
    ]
    for operator, shape, inputs, settings in calls:
        fisher = torch.rand(shape, device=DEVICE)
        before = fisher.clone()
        operator(fisher, *inputs, None, None, *settings)
        assert torch.equal(fisher, before), (operator, shape)


@on_device
def test_scale_grads_of_nothing_are_zero() -> None:
    for shape in [(0, 3, 4), (3, 0, 4), (3, 4, 0)]:
        a = torch.ones(shape, device=DEVICE)
        assert torch.equal(backend.scale_grads(a, a), torch.zeros(shape[0], shape[2], device=DEVICE))
