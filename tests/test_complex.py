"""Complex parameters and data: against the one-sample loop, by a fast rule where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slow_kinds import K, check, complex_of, complex_par, rows_of
from torch import nn
from zoo import C, D, Lambda, par

import wplfast


def fourier(m, x, product):
    return torch.fft.irfft(product(torch.fft.rfft(x, dim=1)), n=x.shape[1], dim=1)


COMPLEX = {
    "filter": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w)), {"w": (3, D, 2)}),
    "filter, one for all": (lambda m, x: fourier(m, x, lambda z: complex_of(m.w) * z), {"w": (3, 1, 2)}),
    "filter of a real parameter": (lambda m, x: fourier(m, x, lambda z: z * m.w), {"w": (3, D)}),
    "divided": (lambda m, x: fourier(m, x, lambda z: z / complex_of(m.w)), {"w": (3, D, 2)}),
    "shifted": (lambda m, x: fourier(m, x, lambda z: (z + complex_of(m.w)) * z), {"w": (3, D, 2)}),
    "shifted by a real parameter": (lambda m, x: fourier(m, x, lambda z: (z - m.w) * z), {"w": (3, D)}),
    "conjugated": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w).conj()), {"w": (3, D, 2)}),
    "convolution": (lambda m, x: fourier(m, x, lambda z: z * torch.fft.rfft(m.w, dim=0)), {"w": (4, D)}),
    "mixed channels": (lambda m, x: fourier(m, x, lambda z: z @ complex_of(m.w)), {"w": (D, K, 2)}),
    "mixed channels, each frequency": (
        lambda m, x: fourier(m, x, lambda z: torch.einsum("nfd,fdk->nfk", z, complex_of(m.w))),
        {"w": (3, D, K, 2)},
    ),
    "mixed channels, frequencies last": (
        lambda m, x: fourier(m, x, lambda z: torch.einsum("nif,iof->nof", z.mT, complex_of(m.w)).mT),
        {"w": (D, K, 3, 2)},
    ),
    "mixed channels, real matrix": (
        lambda m, x: fourier(m, x, lambda z: torch.einsum("nfd,dk->nfk", z, m.w.to(z.dtype))),
        {"w": (D, K)},
    ),
    "matmul": (
        lambda m, x: fourier(m, x, lambda z: (z.unsqueeze(2) @ complex_of(m.w)).squeeze(2)),
        {"w": (3, D, K, 2)},
    ),
    "vector": (lambda m, x: (torch.fft.fft(x) @ complex_of(m.w)).abs(), {"w": (D, 2)}),
    "rotation": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * torch.exp(1j * m.w)),
        {"w": (3,)},
    ),
    "made complex": (lambda m, x: torch.complex(x, m.w.expand_as(x)).abs(), {"w": (D,)}),
    "real data": (lambda m, x: torch.view_as_real(x * complex_of(m.w)), {"w": (D, 2)}),
    "a kernel of exponentials": (
        lambda m, x: torch.einsum("ntd,dk->ntk", x.to(torch.complex128), torch.exp(complex_of(m.w))).real,
        {"w": (D, K, 2)},
    ),
    "used twice": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w) * complex_of(m.w)), {"w": (3, D, 2)}),
    "used as both": (lambda m, x: fourier(m, x, lambda z: z * complex_of(m.w)) * m.w[0, :, 0], {"w": (3, D, 2)}),
    "in other orders": (
        lambda m, x: (complex_of(m.w) @ torch.fft.fft(x).mT).abs().mT,
        {"w": (K, D, 2)},
    ),
}


def shuffled_rows(m, x):
    rows = torch.fft.fft(x).flatten(0, 1)
    order = rows.real.sum(1).argsort()
    w = complex_of(m.w)
    mixed = rows[order] * w + torch.einsum("rd,dk->rk", rows[order], w[0].unsqueeze(1).expand(-1, D) * 1j)
    return torch.zeros_like(rows).index_copy(0, order, mixed).abs().view(*x.shape)


COMPLEX["rows of samples in any order"] = (shuffled_rows, {"w": (1, D, 2)})


@pytest.mark.not_rehearsed("Fourier transforms")
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name):
    torch.manual_seed(sum(map(ord, name)))
    use, parameters = COMPLEX[name]
    model = Lambda(lambda m, x: use(m, x).sin(), **{key: par(*shape) for key, shape in parameters.items()})
    data = [((torch.randn(n, 4, D),), n) for n in (4, 4, 5, 2, 1)]
    check(model, data, rows_of, slow=name == "made complex", masked=None, rtol=1e-10, model_rtol=1e-11)


def spectral(m, x):
    """A layer of a Fourier neural operator: the lowest frequencies, mixed; all others are left out."""
    spectrum = torch.fft.rfft(x, dim=1)
    kept = torch.zeros(len(x), spectrum.shape[1], K, dtype=spectrum.dtype)
    kept[:, :2] = torch.einsum("nfi,iof->nfo", spectrum[:, :2], m.w)
    return torch.fft.irfft(kept, n=x.shape[1], dim=1)


COMPLEX_PARAMETERS = {
    "spectral": (spectral, (D, K, 2), False),
    "filter": (lambda m, x: fourier(m, x, lambda z: z * m.w), (3, D), False),
    "part of a filter": (lambda m, x: fourier(m, x, lambda z: z[:, :2] * m.w[1:]), (3, D), False),
    "two parts": (lambda m, x: fourier(m, x, lambda z: z[:, :1] * m.w[:1] + z[:, 1:2] / m.w[1:]), (2, D), False),
    "conjugated": (lambda m, x: fourier(m, x, lambda z: z * m.w.conj() + m.w), (3, D), False),
    "linear": (lambda m, x: F.linear(torch.fft.fft(x), m.w).abs(), (K, D), False),
    "linear, no rows": (
        lambda m, x: F.linear(torch.fft.fft(x).sum(1), m.w, m.w[:, 0]).abs().unsqueeze(1),
        (K, D),
        False,
    ),
    "linear, time first": (
        lambda m, x: F.linear(torch.fft.fft(x).transpose(0, 1), m.w).abs().transpose(0, 1),
        (K, D),
        False,
    ),
    "linear, its bias alone": (
        lambda m, x: F.linear(torch.fft.fft(x), torch.ones(K, D, dtype=m.w.dtype), m.w[:, 0]).abs(),
        (K, D),
        False,
    ),
    "linear, derived": (lambda m, x: F.linear(torch.fft.fft(x), m.w.conj() * 2).abs(), (K, D), False),
    "matmul": (lambda m, x: (torch.fft.fft(x) @ m.w).abs(), (D, K), False),
    "its real view": (lambda m, x: x @ torch.view_as_real(m.w)[..., 0] + x @ m.w.imag, (D, K), False),
    "exponentials": (lambda m, x: fourier(m, x, lambda z: z * m.w.exp()), (3, D), False),
    "opaque": (lambda m, x: Squared.apply(m.w) * x, (1, D), True),
}


class Squared(torch.autograd.Function):
    """|w|^2, which no interception sees."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.abs().square()

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return 2 * gradient * w


@pytest.mark.not_rehearsed("Fourier transforms")
@pytest.mark.parametrize("name", COMPLEX_PARAMETERS)
def test_complex_parameters(name):
    """F is |g|^2: the squares of the derivatives by the real and by the imaginary part, added up."""
    torch.manual_seed(sum(map(ord, name)))
    use, shape, slow = COMPLEX_PARAMETERS[name]
    model = Lambda(lambda m, x: use(m, x).sin(), w=complex_par(*shape), b=par(1))
    model = Lambda(lambda m, x: m.inner(x) * m.b, inner=model, b=par(1))
    model.inner.b = None
    data = [((torch.randn(n, 4, D),), n) for n in (4, 4, 5, 1)]
    fisher = check(model, data, rows_of, slow=slow, masked=None, rtol=1e-10, model_rtol=1e-11)
    assert fisher["inner.w"].dtype == torch.float64
    assert fisher["inner.w"].shape == shape


@pytest.mark.not_rehearsed("Fourier transforms")
def test_complex_parameters_in_a_call(tmp_path):
    torch.manual_seed(12)
    model = Lambda(
        lambda m, x: m.head(spectral(m, x).mean(1)),
        w=nn.Parameter(complex_par(D, K, 2).to(torch.complex64)),
        head=nn.Linear(K, C),
    )
    data = [(torch.randn(n, 4, D), torch.randint(0, C, (n,))) for n in (4, 3)]
    fisher = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy, with_grad=True, verify="always")
    assert fisher["w"].dtype == torch.float32
    assert fisher.mean_grad["w"].dtype == torch.complex64
    assert not fisher.report.slow
    wplfast.verify_fisher(model, data[0], wplfast.losses.cross_entropy)
    fisher.save(tmp_path / "f.safetensors")
    torch.testing.assert_close(wplfast.Fisher.load(tmp_path / "f.safetensors")["w"], fisher["w"])
    with pytest.raises(ValueError, match=r"'w'\] must be of a floating point type, got torch.complex64"):
        wplfast.WeightPlasticityLoss(model)
