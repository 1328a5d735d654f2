"""Beyond 2^31 elements: offsets that do not fit into 32 bits. Each needs up to 70 GB of the device, and runs alone."""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_cases import GPU, on_device, relative_error, size
from torch import Tensor

import wplfast
from wplfast import ops
from wplfast.ops.layout import packed_starts

pytestmark = [*on_device, pytest.mark.alone, pytest.mark.slow]
MANY = size(2**31 + 12_345, 12_345)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _room():
    """Start from an empty device, or say how much it lacks."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        assert free > 80e9, f"needs 80 GB of free GPU memory, found {free / 1e9:.0f}: an H200 or a smaller MANY"
    yield
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def parts(n: int) -> list[slice]:
    """Cut indices into spans that float64 copies fit beside, from both sides of 2^31."""
    step = size(2**27, 5000)
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def noise(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize(("dtype", "fisher_dtype"), [(BF16, BF16), (torch.float32, torch.float32)], ids=str)
def test_penalty_of_one_tensor(dtype, fisher_dtype):
    theta, hat = noise(MANY, dtype=dtype), torch.zeros(MANY, dtype=dtype)
    fisher = torch.rand(MANY, dtype=fisher_dtype)
    check_penalty([theta], [hat], [fisher])


def test_penalty_of_many_tensors():
    each = size(2**26 + 3, 301)
    shapes = [each + 7 * k for k in range(33)]
    theta = [noise(n) for n in shapes]
    check_penalty(theta, [torch.zeros_like(t) for t in theta], [torch.rand(n, dtype=torch.float32) for n in shapes])


def check_penalty(theta: list[Tensor], hats: list[Tensor], fishers: list[Tensor]) -> None:
    """Compare value, packed gradient and accumulated gradient with float64, span by span."""
    alpha, l2, scale = (torch.tensor(v, dtype=torch.float64) for v in (2.0, 0.25, 0.5))
    exact = torch.zeros((), dtype=torch.float64)
    for t, f in zip(theta, fishers, strict=True):
        for part in parts(len(t)):
            squares = t[part].double().square()
            exact += (f[part].double() * squares).sum() + 0.125 * squares.sum()
    value, packed = ops.penalty_with_grad(theta, hats, [], fishers, alpha, l2)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    starts, _ = packed_starts([t.numel() for t in theta])
    check_gradients(theta, fishers, [packed[start : start + len(t)] for start, t in zip(starts, theta, strict=True)])
    del packed
    grads = [torch.zeros_like(t) for t in theta]
    value = ops.penalty_add_grad_(grads, theta, hats, [], fishers, alpha, l2, 2 * scale)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    check_gradients(theta, fishers, grads)


def check_gradients(theta: list[Tensor], fishers: list[Tensor], grads: list[Tensor]) -> None:
    for t, f, g in zip(theta, fishers, grads, strict=True):
        eps = torch.finfo(t.dtype).eps
        for part in parts(len(t)):
            wide = t[part].double()
            wanted = (2 * f[part].double() + 0.25) * wide
            assert bool(((g[part].double() - wanted).abs() <= 2 * eps * wanted.abs() + 1e-9).all()), part


def test_the_module_over_a_large_parameter():
    theta = torch.zeros(MANY, dtype=BF16, requires_grad=True)
    wpl = wplfast.WeightPlasticityLoss({"theta": theta}, alpha=2.0, fisher_dtype=BF16)
    fisher = torch.zeros(MANY, dtype=BF16)
    fisher[-3:] = 4.0
    wpl.consolidate({"theta": fisher})
    with torch.no_grad():
        theta[-3:] = 0.5
    value = wpl.add_grad_()
    assert value.item() == 3.0
    assert theta.grad[-3:].tolist() == [4.0] * 3
    assert not theta.grad[:-3].any()


@pytest.mark.parametrize("steps", ["many", "one"])
def test_linear(steps):
    n, t, d_in = (size(8, 3), size(65_537, 37), size(4104, 72)) if steps == "many" else (size(530_001, 301), 1, 4096)
    d_in = d_in if GPU else 72
    d_out = 40
    a, g = noise(n, t, d_in), noise(n, t, d_out)
    assert not GPU or a.numel() > 2**31
    fisher, gradient = torch.zeros(d_out, d_in), torch.zeros(d_out, d_in)
    ops.fisher_linear_(fisher, a, g, None, gradient)
    for columns in (slice(0, 8), slice(d_in - 8, d_in)):
        squares, sums = (torch.zeros(d_out, 8, dtype=torch.float64) for _ in range(2))
        for one_a, one_g in zip(a[..., columns].split(4096), g.split(4096), strict=True):
            if t == 1:
                wide_a, wide_g = one_a[:, 0].double(), one_g[:, 0].double()
                squares += wide_g.square().t() @ wide_a.square()
                sums += wide_g.t() @ wide_a
            else:
                each = torch.einsum("nto,nti->noi", one_g.double(), one_a.double())
                squares += each.square().sum(0)
                sums += each.sum(0)
        assert relative_error(fisher[:, columns], squares) < 1e-4
        assert relative_error(gradient[:, columns], sums) < 1e-3


def test_embedding():
    rows, width = size(300_007, 301), size(8192, 24)
    assert not GPU or rows * width > 2**31
    n, t = 4, 50
    indices = torch.cat([torch.randint(0, rows, (n, t - 10)), torch.randint(rows - 5, rows, (n, 10))], 1)
    g = noise(n, t, width)
    fisher = torch.zeros(rows, width)
    ops.fisher_embedding_(fisher, indices, g)
    exact = torch.zeros(rows, 16, dtype=torch.float64)
    for sample in range(n):
        each = torch.zeros(rows, 16, dtype=torch.float64).index_add_(0, indices[sample], g[sample, :, -16:].double())
        exact += each.square()
    assert relative_error(fisher[:, -16:], exact) < 1e-6
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[indices.flatten()] = False
    for part in parts(rows):
        assert not fisher[part][untouched[part]].any()


def test_squares():
    n, numel = size(40, 40), size(60_000_001, 301)
    grads = noise(n, numel)
    fisher = torch.zeros(numel)
    ops.accumulate_squares_(fisher, grads)
    for columns in (slice(0, 100), slice(numel - 100, numel)):
        assert relative_error(fisher[columns], grads[:, columns].double().square().sum(0)) < 1e-6
    assert fisher.double().sum().item() == pytest.approx(n * numel, rel=0.1)


def test_scale_gradients():
    n, t, d = 3, size(700_001, 301), size(1032, 24)
    a, g = noise(n, t, d), noise(n, t, d)
    assert not GPU or a.numel() > 2**31
    found = ops.scale_grads(a, g)
    for columns in (slice(0, 8), slice(d - 8, d)):
        exact = (a[..., columns].double() * g[..., columns].double()).sum(1)
        assert relative_error(found[:, columns], exact) < 1e-4


def test_scale_unless_one():
    tensor = torch.ones(MANY, dtype=BF16)
    ops.scale_unless_one_(tensor, torch.tensor(0.5))
    assert all(bool((tensor[part] == 0.5).all()) for part in parts(MANY))


@pytest.mark.parametrize("kind", ["whole", "depthwise"])
def test_convolution(kind):
    n, side, channels = 2, size(4104, 24), 64
    outputs, groups, columns = (8, 1, side) if kind == "whole" else (channels, channels, size(513, 24))
    x, g = noise(n, 1, side, side, channels), noise(n, 1, side, columns, outputs)  # the first columns alone: G is small
    assert not GPU or x.numel() > 2**31
    fisher = torch.zeros(outputs, channels // groups, 3, 3)
    ops.fisher_conv_(fisher, x, g, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=groups)
    for c in (0, channels - 1):
        padded = torch.nn.functional.pad(x[:, 0, :, :, c].double(), (1, 1, 1, 1))
        of_channel = slice(None) if kind == "whole" else slice(c, c + 1)
        for i, j in ((0, 0), (2, 1)):
            seen = padded[:, i : i + side, j : j + columns]
            pairs = zip(seen, g[:, 0, ..., of_channel], strict=True)
            each = torch.stack([torch.einsum("hw,hwo->o", one, o.double()) for one, o in pairs])
            found = fisher[of_channel, c if kind == "whole" else 0, i, j]
            assert relative_error(found, each.square().sum(0)) < 1e-3
