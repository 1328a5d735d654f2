"""Who multiplies: what is known of processors, and the same Fisher whoever does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import wplfast
from wplfast.backends import processor
from wplfast.capture.trace import product

GENOA = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
TURIN = GENOA.replace("25", "26") + GENOA  # the first processor counts
XEON = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "known", "least"),
    [
        (GENOA, ("AuthenticAMD", 25), 1 << 24),
        (TURIN, ("AuthenticAMD", 26), 1 << 20),
        (GENOA.replace("25", "21"), ("AuthenticAMD", 21), None),
        (XEON, ("GenuineIntel", 6), None),
        (ARM, ("", 0), None),
        ("", ("", 0), None),
    ],
)
def test_the_library_follows_from_the_processor(cpuinfo, known, least):
    assert processor.processor_of(cpuinfo) == known
    assert processor._onednn_from(*known) == least


def test_small_products_stay_with_pytorch(monkeypatch):
    weight = torch.randn(256, 256)
    monkeypatch.setattr(product, "onednn_from", lambda: 1 << 20)
    assert not product.is_faster(weight, 15)
    assert product.is_faster(weight, 16) == torch.backends.mkldnn.is_available()
    assert not product.is_faster(weight.double(), 1000)
    monkeypatch.setattr(product, "onednn_from", lambda: None)
    assert not product.is_faster(weight, 1 << 20)


class Steps(nn.Module):
    """A loop, layers over two and three dimensions, and a recurrent layer of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) * 0.3)
        self.inner, self.cell, self.out = nn.Linear(5, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.inner(x)
        h = seen[:, 0]
        for step in range(x.shape[1]):
            h = torch.tanh(seen[:, step] + torch.addmm(self.inner.bias, h, self.w))
        return self.out(h + self.cell(seen)[0][:, -1])


@pytest.mark.parametrize("least", [None, 0], ids=["PyTorch", "oneDNN"])
def test_the_fisher_is_the_same_whoever_multiplies(monkeypatch, least):
    torch.manual_seed(0)
    model, x, y = Steps(), torch.randn(8, 4, 5), torch.randint(3, (8,))
    exact = wplfast.fisher_diagonal(copy.deepcopy(model).double(), [(x.double(), y)], wplfast.losses.cross_entropy)
    monkeypatch.setattr(product, "onednn_from", lambda: least)
    found = wplfast.fisher_diagonal(model, [(x, y)] * 3, wplfast.losses.cross_entropy)
    for name, expected in exact.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6)
