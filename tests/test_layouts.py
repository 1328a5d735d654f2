"""Data that are not dense: sparse, nested and quantised tensors, as inputs and as a model's buffers.

Blocked ones (BSR, BSC) have no gradients on CPUs in PyTorch itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn
from zoo import Lambda, classify

import wplfast
from wplfast.capture.rules import base

pytestmark = [
    pytest.mark.cpu_only("few kernels elsewhere take such tensors"),
    pytest.mark.filterwarnings("ignore:.*(beta state|prototype|TypedStorage|is deprecated):UserWarning"),
]

D, K = 4, 2

#: Products with the operand, and what each is for dense data.
PRODUCTS = {
    "@": (lambda m, x: x @ m.w + m.b, "matmul"),
    "mm": (lambda m, x: torch.mm(x, m.w) + m.b, "matmul"),
    "sparse.mm": (lambda m, x: torch.sparse.mm(x, m.w) + m.b, "matmul"),
    "spmm": (lambda m, x: torch.spmm(x, m.w) + m.b, "matmul"),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), "matmul"),
    "sparse.addmm": (lambda m, x: torch.sparse.addmm(m.b.expand(len(x), K), x, m.w), "matmul"),
    "linear": (lambda m, x: F.linear(x, m.w.t(), m.b), "linear"),
    "of a derived matrix": (lambda m, x: x @ (m.w * 2).tanh() + m.b, "matmul"),
    "two uses": (lambda m, x: torch.sparse.mm(x, m.w) + (x @ m.v).tanh() @ m.w[:K] + m.b, "matmul"),
}


def dense(layout, size):
    x = torch.randn(size, D, dtype=torch.float64)
    return x if layout == "dense" else x * (torch.rand(size, D) > 0.5)


def packed(x, layout):
    return x.to_sparse_coo() if layout == "coo" else getattr(x, f"to_sparse_{layout}")()


def par(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def model_of(function):
    return Lambda(function, w=par(D, K), v=par(D, K), b=par(K))


def compare(model, data, as_dense, **options):
    """Compare a model on some data with the loop over its twin on dense data."""
    fisher = wplfast.fisher_diagonal(model, data, classify, **options)
    assert_close(fisher, fisher_loop(model, as_dense, classify), rtol=1e-10, model_rtol=1e-11)
    return fisher


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("verify", [True, False])
def test_sparse_data_times_a_parameter(name, layout, verify):
    torch.manual_seed(0)
    function, rule = PRODUCTS[name]
    model = model_of(lambda m, x: function(m, x))
    rows = [dense("", n) for n in (6, 6, 1, 3, 6)]  # the third time the same call comes, but for where its entries are
    targets = [torch.randint(0, K, (len(x),)) for x in rows]
    if name == "sparse.addmm":  # PyTorch takes no dense data there
        expected = model_of(lambda m, x: x @ m.w + m.b)
        expected.load_state_dict(model.state_dict())
    elif name in ("sparse.mm", "two uses", "spmm"):
        expected = model_of(lambda m, x: x @ m.w + ((x @ m.v).tanh() @ m.w[:K] if name == "two uses" else 0) + m.b)
        expected.load_state_dict(model.state_dict())
    else:
        expected = model
    want = fisher_loop(expected, list(zip(rows, targets, strict=True)), classify)
    data = [(packed(x, layout), y) for x, y in zip(rows, targets, strict=True)]
    fisher = wplfast.fisher_diagonal(model, data, classify, verify=verify)
    assert_close(fisher, want, rtol=1e-10, model_rtol=1e-11)
    assert rule in fisher.report.rules["w"]
    assert not fisher.report.slow


def test_sparse_data_follow_dense_ones_at_the_same_place():
    torch.manual_seed(1)
    model = model_of(lambda m, x: x @ m.w + m.b)
    rows, kinds = [dense("", 5) for _ in range(6)], ["", "", "csr", "", "coo", ""]
    data = [(packed(x, k) if k else x, torch.randint(0, K, (5,))) for x, k in zip(rows, kinds, strict=True)]
    compare(model, data, [(x, y) for x, (_, y) in zip(rows, data, strict=True)], verify=False)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_data_that_are_too_large_to_be_made_dense(layout, monkeypatch):
    monkeypatch.setattr(base, "LARGE", 0)
    torch.manual_seed(2)
    model = model_of(lambda m, x: x @ m.w + m.b)
    x, y = dense("", 9), torch.randint(0, K, (9,))
    fisher = compare(model, [(packed(x, layout), y)], [(x, y)])
    assert fisher.report.rules["w"] == ("generic",)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x @ (m.a @ m.w),
        lambda m, x: (x @ m.a.to_dense()) @ m.w,
        lambda m, x: x @ (m.a.to_dense()[:, :K] * m.w),
        lambda m, x: torch.sparse.mm(m.a, torch.sparse.mm(m.a, m.w).tanh()).t().matmul(x.t()).t(),
        lambda m, x: x @ (m.a.t() @ m.w),
    ],
)
def test_sparse_buffers(forward, layout):
    torch.manual_seed(3)
    model = Lambda(forward, w=par(D, K))
    model.register_buffer("a", packed(dense("", D), layout))
    data = [(dense("dense", n), torch.randint(0, K, (n,))) for n in (5, 5, D, 3)]
    compare(model, data, data)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "dense"])
@pytest.mark.parametrize("samples", ["batch", "losses"])
def test_graphs_by_a_sparse_adjacency(layout, samples):
    torch.manual_seed(4)
    sizes = [3, 2, 4]
    graphs = [torch.rand(n, n, dtype=torch.float64) for n in sizes]
    x, a, y = torch.randn(9, D, dtype=torch.float64), torch.block_diag(*graphs), torch.randint(0, K, (3,))
    of = torch.arange(3).repeat_interleave(torch.tensor(sizes))

    def forward(m, x, a, of):
        h = a @ m.head((a @ m.fc(x)).tanh())
        return h.new_zeros(int(of.max()) + 1, K).index_add(0, of, h)

    model = Lambda(forward, fc=nn.Linear(D, 5).double(), head=nn.Linear(5, K).double())
    given = a if layout == "dense" else packed(a, layout)
    fisher = wplfast.fisher_diagonal(model, [((x, given, of), y)], classify, samples=samples)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k, rows in enumerate(x.split(sizes)):
        one = classify(model(rows, graphs[k], torch.zeros(len(rows), dtype=torch.long)), y[k : k + 1])
        for f, g in zip(total.values(), torch.autograd.grad(one.sum(), list(model.parameters())), strict=True):
            f += g**2 / 3
    assert_close(fisher, total, 1e-10, 1e-11)
    assert not fisher.report.slow


def by_sample(nested):
    return torch.stack([part.sum(0) for part in nested.unbind()])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("reduce", [by_sample, lambda h: torch.nested.to_padded_tensor(h, 0.0).sum(1)])
def test_nested_tensors_take_one_pass_a_sample(layout, reduce):
    torch.manual_seed(5)
    model = Lambda(
        lambda m, x: reduce(m.head(m.norm(m.fc(x).relu()))),
        fc=nn.Linear(D, 5).double(),
        norm=nn.LayerNorm(5).double(),
        head=nn.Linear(5, K).double(),
    )
    lengths = ((3, 1, 4), (2, 2), (3, 1, 4), (5, 1, 2))
    parts = [[torch.randn(n, D, dtype=torch.float64) for n in some] for some in lengths]
    data = [(torch.nested.nested_tensor(some, layout=layout), torch.randint(0, K, (len(some),))) for some in parts]
    fisher = wplfast.fisher_diagonal(model, data, classify)
    ones = [(x[None], y[k : k + 1]) for some, (_, y) in zip(parts, data, strict=True) for k, x in enumerate(some)]
    plain = Lambda(lambda m, x: m.head(m.norm(m.fc(x).relu())).sum(1), **dict(model.named_children()))
    assert_close(fisher, fisher_loop(plain, ones, classify), 1e-10, 1e-11)


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (lambda x: x.to_mkldnn(), lambda x: x.to_dense()),
        (lambda x: torch.quantize_per_tensor(x, 0.25, 0, torch.qint8), lambda x: x.dequantize()),
    ],
)
def test_data_that_the_model_unpacks(give, take):
    torch.manual_seed(6)
    model = Lambda(lambda m, x: m.fc(take(x)) if x.layout != torch.strided or x.is_quantized else m.fc(x))
    model.fc = nn.Linear(D, K)
    x = (torch.randn(5, D) * 4).round().float() / 4
    y = torch.randint(0, K, (5,))
    fisher = wplfast.fisher_diagonal(model, [(give(x), y)], classify)
    assert_close(fisher, fisher_loop(model, [(x, y)], classify))
