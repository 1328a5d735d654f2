"""Every fast rule in its variants against the one-sample loop in float64; each case asserts that the rule served."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from rule_cases import BILINEARS, CONVOLUTIONS, FUNCTIONS, LOOKUPS, NORMS
from torch import nn
from zoo import C, Lambda

import wplfast
from wplfast.capture.rules import RULES

EXACT = {"rtol": 1e-11, "model_rtol": 1e-12}
SIZES = [[(5, 4), (3, 4)], [(4, 4), (2, 4)], [(1, 4), (3, 6)]]


TABLES = {"conv": CONVOLUTIONS, "norm": NORMS, "lookup": LOOKUPS, "function": FUNCTIONS, "bilinear": BILINEARS}
ALL = {f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()}
#: Cases that mean to show that what a rule leaves alone is exact too.
SLOW = {name for name, case in ALL.items() if case.rules == "generic"}
#: Cases whose operands have samples along their own dimensions: the whole gradient is masked to each sample.
MASKED = {
    "bilinear: a repeated parameter on one side",
    "function: bias of a convolution, samples in columns",
    "function: cat of a repeated token",
    "function: cat of shuffled rows",
    "function: x + p repeated over samples",
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_against_the_loop(name, sizes):
    torch.manual_seed(sum(map(ord, name)))
    case = ALL[name]
    model = case.build()
    model(case.inputs(2, 4))
    model = model.double().eval()
    data = [(case.inputs(n, t), case.targets(n, t)) for n, t in sizes]
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in data]
    fisher = wplfast.fisher_diagonal(model, data, case.loss, with_grad=True)
    tolerance = {"rtol": 1e-5} if "cast" in name else EXACT
    assert_close(fisher, fisher_loop(model, data, case.loss), **tolerance)
    assert any(case.rules in rules for rules in fisher.report.rules.values()), fisher.report.rules
    assert any("masked" in rules for rules in fisher.report.rules.values()) == (name in MASKED), fisher.report.rules
    assert bool(fisher.report.slow) == (name in SLOW | MASKED), fisher.report.rules
    losses = torch.cat([case.loss(model(x), y) for x, y in data])
    watched = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name_, gradient in zip(watched, torch.autograd.grad(losses.mean(), watched.values()), strict=True):
        torch.testing.assert_close(fisher.mean_grad[name_], gradient, rtol=tolerance["rtol"], atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["conv: 2d", "conv: depthwise", "norm: layer", "lookup: padding", "function: x @ w"])
def test_sample_weights_in_float32(name, weighted):
    torch.manual_seed(0)
    case = ALL[name]
    model = case.build()
    model(case.inputs(2, 4))
    model.eval()
    x, y = case.inputs(6, 4), case.targets(6, 4)
    weights = torch.rand(6, dtype=torch.float64) if weighted else torch.ones(6, dtype=torch.float64)
    fisher = wplfast.fisher_diagonal(model, [(x, y, weights)], case.loss)
    parts = [fisher_loop(model, [(x[n : n + 1], y[n : n + 1])], case.loss) for n in range(6)]
    expected = {k: sum(w * p[k] for w, p in zip(weights, parts, strict=True)) / weights.sum() for k in parts[0]}
    assert_close(fisher, expected)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("bilinear")])
def test_bilinear_a_few_samples_at_a_time(name, monkeypatch):
    monkeypatch.setattr("wplfast.capture.rules.grad_sample.MAX_ELEMENTS", 100)
    test_against_the_loop(name, SIZES[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bilinear_in_other_types(dtype, weighted):
    """Factors of bfloat16 are widened before they are multiplied with each other."""
    torch.manual_seed(0)
    model = nn.Bilinear(8, 6, 4).to(dtype)
    x, weights = torch.randn(5, 3, 14).to(dtype), torch.rand(5, dtype=torch.float64)

    def loss(y, _):
        return y.float().square().sum((1, 2))

    model_of_one = Lambda(lambda m, x: m.layer(x[..., :8], x[..., 8:]), layer=model)
    batch = (x, torch.zeros(5), weights) if weighted else (x, torch.zeros(5))
    fisher = wplfast.fisher_diagonal(model_of_one, [batch], loss)
    assert not fisher.report.slow
    weights = weights if weighted else torch.ones_like(weights)
    x, g = x.double(), 2 * model_of_one(x).detach().double()
    grads = torch.einsum("ntk,nti,ntj->nkij", g, x[..., :8], x[..., 8:])
    expected = torch.einsum("n,nkij->kij", weights / weights.sum(), grads**2)
    torch.testing.assert_close(fisher["layer.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_bilinear_under_autocast(autocast_kind):
    torch.manual_seed(0)
    case = ALL["bilinear: module"]
    model, x, y = case.build(), case.inputs(6, 4), case.targets(6, 4)

    def loss(outputs, targets):
        return case.loss(outputs.float(), targets)

    with torch.autocast(autocast_kind, dtype=torch.bfloat16):
        fisher = wplfast.fisher_diagonal(model, [(x, y)], loss)
        expected = fisher_loop(model, [(x, y)], loss, double=False)
    assert not fisher.report.slow
    for name in ("layer.weight", "layer.bias"):
        torch.testing.assert_close(fisher[name].double(), expected[name], rtol=2e-2, atol=1e-4)


def test_every_rule_has_cases():
    assert {rule.name for rule in RULES} - {case.rules for case in ALL.values()} == set()


def test_attention_out_of_its_steps():
    from wplfast.capture.trace.attention import scaled_dot_product_attention

    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    hidden = torch.rand(5, 7) < 0.5
    hidden[2] = False  # a row that sees nothing
    for options in (
        {"enable_gqa": True},
        {"enable_gqa": True, "attn_mask": hidden},
        {"enable_gqa": True, "attn_mask": torch.randn(2, 1, 5, 7), "scale": 0.3},
    ):
        native = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), native)
    k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    native = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), native)


def large(use, inputs=(5, 4, 160), **parameters):
    """A float32 model with matrices large enough to be multiplied by oneDNN where PyTorch's products are slow."""
    return use, inputs, parameters


LARGE = {
    "linear, then in place": large(lambda m, x: F.linear(x, m.w, m.b).relu_(), w=(160, 160), b=(160,)),
    "no bias": large(lambda m, x: F.linear(x, m.w), w=(160, 160)),
    "rows [N, D]": large(lambda m, x: F.linear(x[:, 0], m.w, m.b).unsqueeze(1), w=(130, 160), b=(130,)),
    "time first": large(lambda m, x: F.linear(x.transpose(0, 1), m.w, m.b).transpose(0, 1), w=(160, 160), b=(160,)),
    "twice, the second on the first": large(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w), w=(160, 160)),
    "x @ w": large(lambda m, x: x @ m.w, w=(160, 130)),
    "addmm": large(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, 160), m.w).unflatten(0, (-1, 4)), w=(160, 130), b=(130,)
    ),
    "a slice of a packed projection": large(lambda m, x: F.linear(x, m.w.chunk(2)[1]), w=(320, 160)),
    "a recurrence": large(
        lambda m, x: torch.tanh(torch.tanh(x[:, :1] @ m.w + m.b) @ m.w + x[:, 1:2] @ m.w + m.b), w=(160, 160), b=(160,)
    ),
    "checkpointed": large(
        lambda m, x: torch.utils.checkpoint.checkpoint(lambda h: F.linear(h, m.w).tanh(), x @ m.w, use_reentrant=False),
        w=(160, 160),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_products_in_float32(name):
    torch.manual_seed(0)
    use, shape, parameters = LARGE[name]
    made = {key: nn.Parameter(torch.randn(size) * size[-1] ** -0.5) for key, size in parameters.items()}
    model = Lambda(lambda m, x: m.head(torch.tanh(use(m, x)).mean(1)), **made, head=nn.LazyLinear(C))
    data = [(torch.randn(n, *shape[1:]), torch.randint(0, C, (n,))) for n in (5, 5, 5, 3)]
    model(data[0][0])
    fisher = wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
    assert_close(fisher, fisher_loop(model, data, wplfast.losses.cross_entropy))
    assert not fisher.report.slow
