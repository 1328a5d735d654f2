"""The op contract: every backend against hand-computed numbers and against the plain-PyTorch backend in float64."""

from __future__ import annotations

import os

import pytest
import torch

from wplfast import backends, ops
from wplfast.ops import layout

#: Relative to the norm of the exact result; the accumulators are float32, the inputs rounded to the dtype beforehand.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
DTYPES = list(TOLERANCE)
#: What serves the device of this run; the interpreter is chosen before Triton is imported.
BACKENDS = {"cpu": ["reference", "cpp"], "cuda": ["reference", "triton"], "rehearsal": ["reference"]}[
    os.environ.get("WPLFAST_TEST_DEVICE", "cpu")
]
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS = ["triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A backend's functions, as the dispatcher would call them."""
    found = backends.available().get(request.param)
    if found is None:
        reason = backends.missing()[request.param]
        assert request.param not in os.environ.get("WPLFAST_REQUIRE", ""), reason
        pytest.skip(f"{request.param} is not available: {reason}")
    return found


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def anchors(shapes, dtype, offset):
    """Random theta, theta_hat, offset, fisher."""
    theta = [torch.randn(s).to(dtype) for s in shapes]
    theta_hat = [(t.double() + 0.1 * torch.randn(t.shape)).to(dtype) for t in theta]
    wide = layout.flat_dtype(dtype)
    offsets = [0.01 * torch.randn(s, dtype=wide) for s in shapes] if offset else []
    return theta, theta_hat, offsets, [torch.rand(s, dtype=wide) for s in shapes]


def in_float64(tensors):
    return [t.double() for t in tensors]


SHAPES = {
    "one": [(1,)],
    "odd": [(3, 5), (7,), (1,), (2, 3, 4)],
    "empty among others": [(0,), (5,), (0, 3)],
    "beyond a block": [(4097,), (33, 129), (8192,)],
    "many": [(17,)] * 50,
}


# ---- hand-computed numbers ---------------------------------------------------------------------------------


def test_penalty_by_hand(backend):
    theta, theta_hat = [torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 4.0])]
    fisher = [torch.tensor([2.0, 3.0])]
    args = (theta, theta_hat, [], fisher, scalar(10.0), scalar(1.0))
    # 10/2 (2*1 + 3*4) + 1/2 (1 + 4) = 72.5; gradient 10*2*1 + 1 = 21, 10*3*(-2) + 2 = -58
    assert backend.penalty(*args).item() == 72.5
    value, packed = backend.penalty_with_grad(*args)
    assert value.item() == 72.5
    assert packed[:2].tolist() == [21.0, -58.0]
    grad = [torch.tensor([100.0, 100.0])]
    assert backend.penalty_add_grad_(grad, *args, scalar(0.5)).item() == 72.5
    assert grad[0].tolist() == [110.5, 71.0]


def test_offset_and_alpha_per_parameter_by_hand(backend):
    theta, theta_hat = [torch.tensor([3.0]), torch.tensor([1.0])], [torch.tensor([1.0]), torch.tensor([0.0])]
    offset, fisher = [torch.tensor([0.5]), torch.tensor([0.0])], [torch.tensor([4.0]), torch.tensor([2.0])]
    alpha = torch.tensor([2.0, 0.0], dtype=torch.float64)
    # 2/2 * 4 * (3 - 1 - 0.5)^2 = 9; gradient 2*4*1.5 = 12
    value, packed = backend.penalty_with_grad(theta, theta_hat, offset, fisher, alpha, scalar(0.0))
    starts, _ = layout.packed_starts([1, 1])
    assert value.item() == 9.0
    assert [packed[s].item() for s in starts] == [12.0, 0.0]


def test_fisher_linear_by_hand(backend):
    a = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])  # [N=2, T=2, I=2]
    g = torch.tensor([[[1.0], [2.0]], [[-1.0], [1.0]]])  # [2, 2, 1]
    # per-sample gradients: [1+6, 2+0] = [7, 2] and [-1, 0]
    fisher, gradient = torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2)
    backend.fisher_linear_(fisher, a, g, None, gradient)
    assert fisher.tolist() == [[150.0, 4.0]]
    assert gradient.tolist() == [[6.0, 2.0]]
    fisher = torch.zeros(1, 2)
    backend.fisher_linear_(fisher, a, g, torch.tensor([2.0, 3.0]), None)
    assert fisher.tolist() == [[101.0, 8.0]]


def test_fisher_conv_by_hand(backend):
    # One channel, X = [1, 2, 3], a kernel of 2 with padding 1: positions see [0, 1], [1, 2], [2, 3], [3, 0].
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    g = torch.tensor([1.0, 0.0, -1.0, 2.0]).view(1, 1, 4, 1)
    fisher, gradient = torch.full((1, 1, 2), 100.0), torch.zeros(1, 1, 2)
    options = {"stride": [1], "padding": [1], "dilation": [1], "groups": 1}
    backend.fisher_conv_(fisher, x, g, torch.tensor([2.0]), gradient, **options)
    # per-sample gradient: [0 - 2 + 6, 1 - 3 + 0] = [4, -2]
    assert fisher.flatten().tolist() == [132.0, 108.0]
    assert gradient.flatten().tolist() == [8.0, -4.0]
    # The first half of the positions alone, and the same image as both images of a sample and as two samples.
    fisher = torch.zeros(1, 1, 2)
    backend.fisher_conv_(
        fisher, x.expand(1, 2, 3, 1).contiguous(), g[:, :, :2].expand(1, 2, 2, 1).contiguous(), None, None, **options
    )
    assert fisher.flatten().tolist() == [0.0, 4.0]
    fisher = torch.zeros(1, 1, 2)
    backend.fisher_conv_(
        fisher, x.expand(2, 1, 3, 1).contiguous(), g[:, :, :2].expand(2, 1, 2, 1).contiguous(), None, None, **options
    )
    assert fisher.flatten().tolist() == [0.0, 2.0]


def test_fisher_embedding_by_hand(backend):
    indices = torch.tensor([[0, 2, 0], [2, -1, -5]])
    g = torch.tensor([[[1.0], [2.0], [3.0]], [[5.0], [7.0], [9.0]]])
    fisher, gradient = torch.tensor([[100.0], [0.0], [0.0]]), torch.zeros(3, 1)
    backend.fisher_embedding_(fisher, indices, g, None, gradient)
    assert fisher.flatten().tolist() == [116.0, 0.0, 29.0]  # (1 + 3)^2; 2^2 + 5^2
    assert gradient.flatten().tolist() == [4.0, 0.0, 7.0]
    fisher = torch.zeros(3, 1)
    backend.fisher_embedding_(fisher, indices, g, torch.tensor([0.5, 2.0]), None)
    assert fisher.flatten().tolist() == [8.0, 0.0, 52.0]


def test_embedding_index_beyond_the_table(backend, device):
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("undefined on a device: nothing looks at the indices there")
    fisher, gradient = torch.zeros(3, 2), torch.zeros(3, 2)
    with pytest.raises(IndexError, match="must be below 3, got 3"):
        backend.fisher_embedding_(fisher, torch.tensor([[0, 1, 3]]), torch.ones(1, 3, 2), None, gradient)
    assert not fisher.any()
    assert not gradient.any()


def test_scale_grads_by_hand(backend):
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    g = torch.tensor([[[5.0, 6.0], [7.0, -8.0]]])
    assert backend.scale_grads(a, g).tolist() == [[26.0, -20.0]]


def test_squares_by_hand(backend):
    fisher = torch.tensor([1.0, 0.0])
    backend.accumulate_squares_(fisher, torch.tensor([[1.0, 2.0], [3.0, -4.0]]), None)
    assert fisher.tolist() == [11.0, 20.0]
    backend.accumulate_squares_(fisher, torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([0.0, 0.5]))
    assert fisher.tolist() == [15.5, 28.0]


# ---- random inputs against float64 -------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [False, True], ids=["one anchor", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_penalty_against_float64(backend, shapes, dtype, offset):
    args = anchors(shapes, dtype, offset)
    alpha, l2, scale = scalar(2.7), scalar(0.3), scalar(-1.5)
    exact_value, exact = backends.available()["reference"].penalty_with_grad(*map(in_float64, args), alpha, l2)
    exact = layout.packed_views(exact, args[0])
    assert relative(backend.penalty(*args, alpha, l2), exact_value) <= TOLERANCE[dtype]
    value, packed = backend.penalty_with_grad(*args, alpha, l2)
    assert relative(value, exact_value) <= TOLERANCE[dtype]
    epsilon = torch.finfo(dtype).eps
    start = [torch.randn(s).to(dtype) for s in shapes]
    grads = [s.clone() for s in start]
    assert relative(backend.penalty_add_grad_(grads, *args, alpha, l2, scale), exact_value) <= TOLERANCE[dtype]
    for view, e, before, after in zip(layout.packed_views(packed, args[0]), exact, start, grads, strict=True):
        torch.testing.assert_close(view.double(), e, rtol=4 * epsilon, atol=4e-7 if dtype != torch.float64 else 1e-15)
        expected = before.double() - 1.5 * e
        atol = 4 * torch.finfo(layout.flat_dtype(dtype)).eps * (before.double().abs() + 1.5 * e.abs() + 1)
        assert ((after.double() - expected).abs() <= epsilon * expected.abs() + atol).all()


def check_fisher(operator, inputs, weights, per_sample, tolerance, *settings):
    """Let an operator add to F and to the gradient, and compare with sums of per-sample gradients; return F."""
    w = torch.ones(len(per_sample), dtype=torch.float64) if weights is None else weights.double()
    shape, wide = per_sample.shape[1:], layout.flat_dtype(inputs[1].dtype)
    fisher, gradient = torch.full(shape, 0.5, dtype=wide), torch.ones(shape, dtype=wide)
    operator(fisher, *inputs, weights, gradient, *settings)
    assert relative(fisher, 0.5 + torch.einsum("n,n...->...", w, per_sample.square())) <= tolerance
    assert relative(gradient, 1 + torch.einsum("n,n...->...", w, per_sample)) <= tolerance
    return fisher


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "size",
    [(3, 5, 7, 9), (4, 1, 17, 130), (5, 33, 70, 45), (1, 4, 1, 1), (9, 2, 100, 33), (2, 300, 64, 10), (0, 3, 4, 5)],
    ids=str,
)
def test_fisher_linear_against_float64(backend, size, dtype, weighted):
    n, t, d_in, d_out = size
    a, g = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
    w = torch.rand(n) if weighted else None
    per_sample = torch.einsum("nto,nti->noi", g.double(), a.double())
    check_fisher(backend.fisher_linear_, (a, g), w, per_sample, 1e-6)


def test_fisher_linear_takes_strides(backend):
    a, g = torch.randn(6, 4, 20), torch.randn(6, 4, 30)
    expected = torch.zeros(15, 10)
    backend.fisher_linear_(expected, a[..., 5:15].contiguous(), g[..., :15].contiguous(), None, None)
    fisher = torch.zeros(15, 10)
    time_first = a.transpose(0, 1).contiguous().transpose(0, 1)  # [N, T, D] in memory order [T, N, D]
    backend.fisher_linear_(fisher, time_first[..., 5:15], g[..., :15], None, None)
    torch.testing.assert_close(fisher, expected)
    fisher, one = torch.zeros(15, 10), torch.zeros(15, 10)
    backend.fisher_linear_(fisher, a[:1, :, 5:15].expand(6, 4, 10), g[..., :15], None, None)
    backend.fisher_linear_(one, a[:1, :, 5:15].repeat(6, 1, 1), g[..., :15].contiguous(), None, None)
    torch.testing.assert_close(fisher, one)


def per_sample_weight_grads(x, g, kernel, stride, padding, dilation, groups):
    """Return [N, C_out, C_in / groups, *K] by autograd through torch's convolution."""
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(kernel) - 1]
    weight = x.new_zeros(g.shape[-1], x.shape[-1] // groups, *kernel)

    def inner_product(weight, images, grad_images):  # [M, C, *S]
        output = conv(images, weight, None, stride, padding, dilation, groups)
        return (output[(..., *(slice(size) for size in g.shape[2:-1]))] * grad_images).sum()

    of_one = torch.func.grad(inner_product)
    return torch.func.vmap(of_one, (None, 0, 0))(weight, x.movedim(-1, 2), g.movedim(-1, 2))


#: (N, M, S, C_in, L or None for all positions, C_out, K, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "plain": (3, 1, (9, 7), 5, None, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "three channels": (2, 1, (32, 32), 3, None, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "whole tiles": (2, 1, (8, 8), 64, None, 128, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride": (3, 1, (11, 8), 4, None, 7, (3, 2), (2, 3), (1, 0), (1, 1), 1),
    "dilation": (2, 1, (12, 13), 6, None, 5, (3, 3), (1, 2), (3, 2), (2, 3), 1),
    "pixels": (3, 1, (5, 6), 10, None, 12, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "every other pixel": (3, 1, (5, 6), 10, None, 12, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "fewer positions": (2, 1, (9, 9), 6, (3, 4), 4, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "kernel beyond the image": (4, 1, (2, 3), 5, None, 3, (5, 5), (1, 1), (3, 3), (1, 1), 1),
    "one position": (200, 1, (4, 4), 6, None, 17, (4, 4), (1, 1), (0, 0), (1, 1), 1),
    "many images": (3, 4, (5, 5), 3, None, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "two groups": (2, 2, (7, 7), 24, None, 40, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "small groups": (2, 1, (7, 9), 24, None, 36, (3, 3), (2, 1), (1, 2), (1, 1), 12),
    "depthwise": (3, 1, (10, 9), 37, None, 37, (3, 3), (1, 1), (1, 1), (1, 1), 37),
    "depthwise, large stride": (2, 2, (13, 12), 70, None, 70, (5, 2), (3, 2), (2, 1), (1, 2), 70),
    "channel multiplier": (2, 1, (6, 7), 10, None, 30, (3, 3), (1, 1), (1, 1), (1, 1), 10),
    "1-D": (3, 1, (50,), 8, None, 9, (5,), (2,), (2,), (1,), 1),
    "1-D, long": (2, 1, (700,), 2, None, 3, (4,), (1,), (0,), (3,), 1),
    "1-D, depthwise": (2, 1, (40,), 20, None, 20, (4,), (1,), (3,), (1,), 20),
    "3-D": (2, 1, (5, 6, 4), 3, None, 4, (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1),
    "3-D, groups": (2, 2, (4, 5, 6), 8, (2, 2, 3), 4, (2, 2, 2), (2, 1, 1), (0, 1, 0), (1, 2, 2), 4),
    "no samples": (0, 1, (5, 5), 3, (5, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no positions": (2, 1, (5, 5), 3, (0, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "many samples": (300, 1, (3, 3), 4, None, 5, (2, 2), (1, 1), (0, 0), (1, 1), 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_fisher_conv_against_float64(backend, case, dtype):
    n, m, size, c_in, positions, c_out, kernel, stride, padding, dilation, groups = case
    if positions is None:
        spans = zip(size, kernel, stride, padding, dilation, strict=True)
        positions = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in spans]
    x, g = torch.randn(n, m, *size, c_in).to(dtype), torch.randn(n, m, *positions, c_out).to(dtype)
    geometry = (stride, padding, dilation, groups)
    exact = torch.zeros(n, c_out, c_in // groups, *kernel, dtype=torch.float64)
    if g.numel() > 0:
        exact = per_sample_weight_grads(x.double(), g.double(), kernel, *geometry)
    tolerance = 3 * TOLERANCE[dtype]  # float32 sums over hundreds of positions
    for w in (None, torch.rand(n)):
        fisher = check_fisher(backend.fisher_conv_, (x, g), w, exact, tolerance, *geometry)
        again = torch.full_like(fisher, 0.5)
        backend.fisher_conv_(again, x, g, w, None, *geometry)
        assert relative(again, fisher) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, (1, 1)), (3, 2, (5, 7)), (20, 33, (6, 18)), (64, 16, (16, 16))], ids=str)
def test_fisher_conv_takes_images_of_any_strides(backend, dtype, sizes):
    c_in, c_out, spatial = sizes
    torch.manual_seed(0)
    x, g = torch.randn(2, 2, *spatial, c_in).to(dtype), torch.randn(2, 2, *spatial, c_out).to(dtype)
    options = (None, None, (1, 1), (0, 0), (1, 1), 1)
    expected, strided = (torch.zeros(c_out, c_in, 1, 1, dtype=layout.flat_dtype(dtype)) for _ in range(2))
    backend.fisher_conv_(expected, x, g, *options)
    channels_first = (t.movedim(-1, 2).contiguous().movedim(2, -1) for t in (x, g))
    sliced = (torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (x, g))
    for a, b in (channels_first, sliced):
        assert a.numel() == 4 or not a.is_contiguous()
        assert a.shape == x.shape
        strided.zero_()
        backend.fisher_conv_(strided, a, b, *options)
        torch.testing.assert_close(strided, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher_conv_serves_transposed_convolutions(backend, dtype):
    x, weight = torch.randn(3, 6, 5, 4), torch.randn(6, 2, 3, 3, dtype=torch.float64)  # [C_in, C_out / groups, *K]
    g = torch.randn(3, 4, 10, 7)
    options = {"stride": (2, 2), "padding": (1, 1), "groups": 2}
    x, g = x.to(dtype), g.to(dtype)
    exact = torch.zeros_like(weight)
    for image, grad_image in zip(x.double(), g.double(), strict=True):
        w = weight.clone().requires_grad_()
        out = torch.nn.functional.conv_transpose2d(image[None], w, output_padding=(1, 0), **options)
        exact += torch.autograd.grad(out, w, grad_image[None])[0].square()
    fisher = torch.zeros(6, 2, 3, 3, dtype=layout.flat_dtype(dtype))
    last = (t.permute(0, 2, 3, 1).contiguous()[:, None] for t in (g, x))
    backend.fisher_conv_(fisher, *last, None, None, dilation=(1, 1), **options)
    assert relative(fisher, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "size",
    [(5, 7, 3, 10), (4, 33, 65, 6), (300, 2, 16, 3), (1, 1, 1, 1), (3, 50, 130, 5000), (0, 3, 4, 5), (3, 0, 4, 5)],
    ids=str,
)
def test_fisher_embedding_against_float64(backend, size, weighted, dtype):
    n, t, d, v = size
    indices, g = torch.randint(-1, v, (n, t)), torch.randn(n, t, d).to(dtype)
    w = torch.rand(n) if weighted else None
    one_hot = torch.nn.functional.one_hot(indices + 1, v + 1)[..., 1:].double()
    per_sample = torch.einsum("ntv,ntd->nvd", one_hot, g.double())
    check_fisher(backend.fisher_embedding_, (indices, g), w, per_sample, TOLERANCE[dtype])


SCALE_LAYOUTS = {
    "contiguous": lambda n, t, d: torch.randn(n, t, d),
    "channels first": lambda n, t, d: torch.randn(n, d, t).transpose(1, 2),
    "time first": lambda n, t, d: torch.randn(t, n, d).transpose(0, 1),
    "gaps": lambda n, t, d: torch.randn(n, t, 2 * d)[..., ::2],
    "one for all steps": lambda n, t, d: torch.randn(n, 1, d).expand(n, t, d),
    "one for all": lambda n, t, d: torch.randn(n, 1, 1).expand(n, t, d),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", [(a, b) for a in SCALE_LAYOUTS for b in ("contiguous", "channels first")], ids=str)
def test_scale_grads_against_float64(backend, layouts, dtype):
    for size in ((3, 5, 7), (2, 300, 70), (1, 1, 1), (4, 1, 130), (2, 33, 1), (0, 3, 4), (3, 0, 4), (3, 4, 0)):
        a, g = (SCALE_LAYOUTS[name](*size).to(dtype) for name in layouts)
        got = backend.scale_grads(a, g)
        assert got.dtype == layout.flat_dtype(dtype)
        assert got.shape == size[::2]
        assert got.is_contiguous()
        assert relative(got, (a.double() * g.double()).sum(1)) <= TOLERANCE[dtype]


def test_scale_grads_of_long_sums(backend):
    a, g = torch.rand(2, 200_000, 5), torch.rand(2, 200_000, 5)
    exact = (a.double() * g.double()).sum(1)
    assert relative(backend.scale_grads(a, g), exact) <= 3e-7
    first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, g))
    assert relative(backend.scale_grads(*first), exact) <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1000, 33), (4, 5000), (0, 3), (7, 0)], ids=str)
def test_squares_against_float64(backend, size, dtype):
    grads, weights = torch.randn(size).to(dtype), torch.rand(size[0], dtype=torch.float64)
    for w in (None, weights):
        fisher = torch.full(size[1:], 2.0, dtype=layout.flat_dtype(dtype))
        backend.accumulate_squares_(fisher, grads, w)
        exact = 2 + ((1 if w is None else w[:, None]) * grads.double().square()).sum(0)
        assert relative(fisher, exact) <= TOLERANCE[dtype]


def test_misaligned_memory(backend):
    buffer = torch.randn(4, 1001)
    views = [row[1:1000] for row in buffer]
    args = ([views[0]], [views[1]], [], [views[2].abs()], scalar(1.5), scalar(0.0))
    grad = [views[3].clone()]
    backend.penalty_add_grad_(grad, *args, scalar(1.0))
    torch.testing.assert_close(grad[0], views[3] + 1.5 * views[2].abs() * (views[0] - views[1]))


def test_nan_propagates(backend):
    theta, theta_hat, _, fisher = anchors([(100,)], torch.float32, False)
    theta[0][57] = float("nan")
    value, packed = backend.penalty_with_grad(theta, theta_hat, [], fisher, scalar(1.0), scalar(0.0))
    assert value.isnan()
    assert packed[:100].isnan().nonzero().squeeze(1).tolist() == [57]


def test_same_bits_for_any_thread_count(backend):
    args = (*anchors([(100_003,), (7, 1001), (250_000,)], torch.float32, True), scalar(2.0), scalar(0.1))
    a, g = torch.randn(16, 12, 130), torch.randn(16, 12, 70)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            value, packed = backend.penalty_with_grad(*args)
            fisher = torch.zeros(70, 130)
            backend.fisher_linear_(fisher, a, g, None, None)
            results.append((value, torch.cat([v.flatten() for v in layout.packed_views(packed, args[0])]), fisher))
    finally:
        torch.set_num_threads(threads)
    own = backend is not backends.available()["reference"]  # plain PyTorch uses BLAS, which promises nothing
    for other in results[1:] if own else results[2:]:
        for x, y in zip(results[0] if own else results[1], other, strict=True):
            assert torch.equal(x, y)


# ---- the dispatcher ----------------------------------------------------------------------------------------


OPCHECKS = {  # those of the penalty and of its scaling are in test_penalty_derivatives.py
    "fisher_linear_": lambda: (torch.zeros(5, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 5), None, None),
    "fisher_conv_": lambda: (
        *(torch.zeros(6, 2, 3), torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 6), None, None),
        *([1], [1], [1], 2),
    ),
    "fisher_embedding_": lambda: (torch.zeros(9, 4), torch.randint(9, (2, 3)), torch.randn(2, 3, 4), None, None),
    "scale_grads": lambda: (torch.randn(2, 3, 4), torch.randn(2, 3, 4)),
    "accumulate_squares_": lambda: (torch.zeros(4), torch.randn(3, 4), None),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.wplfast, name).default, OPCHECKS[name]())


def linear(fisher, a, g, *weights, dtype=torch.float32):
    return ops.fisher_linear_(*(torch.zeros(s, dtype=dtype) for s in (fisher, a, g)), *weights)


def penalty(theta, theta_hat, fisher, alpha=None):
    return ops.penalty(theta, theta_hat, [], fisher, scalar(1.0) if alpha is None else alpha, scalar(0.0))


BAD = {
    "fisher_linear_: T differs": lambda zeros: linear((5, 4), (2, 3, 4), (2, 2, 5)),
    "fisher_linear_: 2-D": lambda zeros: linear((5, 4), (2, 4), (2, 5)),
    "fisher_linear_: fisher shape": lambda zeros: linear((4, 5), (2, 3, 4), (2, 3, 5)),
    "fisher_linear_: half accumulator": lambda zeros: linear((5, 4), (2, 3, 4), (2, 3, 5), dtype=torch.float16),
    "fisher_linear_: weights": lambda zeros: linear((5, 4), (2, 3, 4), (2, 3, 5), torch.ones(3)),
    "squares: integers": lambda zeros: ops.accumulate_squares_(torch.zeros(4), torch.ones(2, 4, dtype=torch.int64)),
    "penalty: lengths": lambda zeros: penalty([zeros], [], [zeros]),
    "penalty: none": lambda zeros: penalty([], [], []),
    "penalty: fisher shape": lambda zeros: penalty([torch.zeros(2, 3)], [torch.zeros(2, 3)], [torch.zeros(6)]),
    "penalty: alpha float32": lambda zeros: penalty([zeros], [zeros], [zeros], torch.tensor(1.0)),
    "penalty: mixed dtypes": lambda zeros: penalty([zeros, zeros.double()], [zeros] * 2, [zeros] * 2),
    "penalty: strides": lambda zeros: penalty([torch.zeros(2, 3)], [torch.zeros(3, 2).t()], [torch.zeros(2, 3)]),
    "penalty: gaps": lambda zeros: penalty([torch.zeros(4)[::2]], [zeros], [zeros]),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_bad_arguments_name_expected_and_given(call):
    with pytest.raises(ValueError, match=r"must .*got"):
        call(torch.zeros(2))
