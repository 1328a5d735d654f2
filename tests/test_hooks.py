"""Hooks on activations that are not linear, and float16: gradients that do not scale with the losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nested_cases import Checkpoint, Product, accumulated, diagonal, rows
from oracle import assert_close, fisher_loop
from pairwise import pairwise
from torch import nn
from zoo import C, D, Lambda, classify, head, par

import wplfast
from wplfast.capture.probe.weights import ProbeWeights, Projection, candidates, decode, matches
from wplfast.capture.sample_layout import AxisTemplate
from wplfast.errors import CoupledSamplesError, WplfastError

SIZES = [[3, 3, 2], [1, 4, 4], [17, 2], [1, 1]]


def by_row(gradient):
    return gradient.norm(dim=-1, keepdim=True)


#: Each row's result depends on that row alone.
BY_ROW = {
    "linear": lambda g: 2 * g,
    "clamped": lambda g: g.clamp(-0.05, 0.05),
    "clamped, where large": lambda g: g.clamp(-3, 3),
    "normalised": lambda g: g / by_row(g),
    "clipped by norm": lambda g: g * (0.1 / (by_row(g) + 1e-6)).clamp(max=1),
    "sign": torch.sign,
    "no NaN": torch.nan_to_num,
    "positive part": lambda g: g.clamp(min=0),
    "nothing small": lambda g: g * (g.abs() > 0.01),
    "squared": lambda g: g * g.abs(),
    "tanh": torch.tanh,
    "shifted": lambda g: g + 0.01,
    "largest element": lambda g: g * (g.abs() == g.abs().amax(-1, keepdim=True)),
}

MIXING = {
    "whole norm": lambda g: g / g.norm(),
    "whole maximum": lambda g: g / g.abs().max(),
    "whole norm, clipped": lambda g: g * (0.1 / (g.norm() + 1e-6)).clamp(max=1),
    "deviation": lambda g: g / g.std(0, unbiased=False),
    "centred": lambda g: g - g.mean(0),
    "above the mean": lambda g: g * (g.abs() > g.abs().mean()),
}


class Clamp(torch.autograd.Function):
    """Clips gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.05, 0.05)


def hooked(tensor, hook):
    if tensor.requires_grad:
        tensor.register_hook(hook)
    return tensor


def on_a_layer(hook):
    return lambda m, x: m.head(torch.tanh(m.b(hooked(torch.tanh(m.b(torch.tanh(m.a(x)))), hook))))


def on_an_embedding(hook):
    return lambda m, x: m.head(torch.tanh(m.b(hooked(m.emb((x[:, :3] * 3).long().abs() % 7), hook))).mean(1))


def on_the_logits(hook):
    return lambda m, x: hooked(m.head(torch.tanh(m.a(x))), hook)


def on_steps_first(hook):
    def forward(m, x):
        steps = m.a(torch.stack([x, 2 * x, x - 1]))  # [T, N, D]
        return m.head(torch.tanh(m.b(hooked(torch.tanh(steps), hook))).mean(0))

    return forward


def on_routed_rows(hook):
    def forward(m, x):
        order = x[:, 0].argsort()
        return m.head(torch.tanh(m.b(hooked(torch.tanh(m.a(x[order])), hook)))[order.argsort()])

    return forward


PLACES = {
    "a layer": on_a_layer,
    "an embedding": on_an_embedding,
    "the logits": on_the_logits,
    "[T, N, D]": on_steps_first,
    "routed rows": on_routed_rows,
}


def module_hook(m, x):
    handle = m.b.register_full_backward_hook(lambda module, to, of: (to[0].clamp(-0.05, 0.05),))
    outputs = m.head(torch.tanh(m.b(torch.tanh(m.a(x)))))
    handle.remove()
    return outputs


def module_pre_hook(m, x):
    handle = m.b.register_full_backward_pre_hook(lambda module, of: (of[0].sign(),))
    outputs = m.head(torch.tanh(m.b(torch.tanh(m.a(x)))))
    handle.remove()
    return outputs


OTHERS = {
    "Function": lambda m, x: m.head(torch.tanh(m.b(Clamp.apply(torch.tanh(m.a(x)))))),
    "module": module_hook,
    "module, before": module_pre_hook,
    "in a checkpoint": lambda m, x: m.head(Checkpoint.apply(lambda h: torch.tanh(m.b(Clamp.apply(m.b(h)))), m.a(x))),
    "behind a checkpoint": lambda m, x: m.head(hooked(Checkpoint.apply(m.b, m.a(x)), torch.sign)),
}


def on_weights(hook):
    return lambda m, x: m.head(torch.tanh(x @ hooked(m.b.weight * m.pos, hook) + x @ hooked(m.b.weight.t(), hook)))


def build(forward):
    children = {name: nn.Linear(D, D) for name in ("a", "b")}
    return Lambda(forward, **children, emb=nn.Embedding(7, D), pos=par(D), head=head()).double().eval()


def compare(model, data, verify):
    expected = fisher_loop(model, data, classify)
    for run in (diagonal, accumulated):
        assert_close(run(model, data, verify), expected, 1e-10, 1e-11)


@pytest.mark.parametrize(("name", "place", "verify"), pairwise(BY_ROW, PLACES, [True, False, "always"]))
def test_hooks_by_row(name, place, verify):
    for sizes in SIZES if place == "a layer" else SIZES[:1]:
        compare(build(PLACES[place](BY_ROW[name])), rows(sizes), verify)


@pytest.mark.parametrize(("name", "sizes", "verify"), pairwise(OTHERS, SIZES, [True, False]), ids=str)
def test_other_kinds_of_hooks(name, sizes, verify):
    compare(build(OTHERS[name]), rows(sizes), verify)


@pytest.mark.parametrize("name", ["linear", "sign", "clamped", "positive part"])
def test_hooks_on_what_is_computed_from_parameters(name):
    """They see the gradient of one sample after the other. A sample alone is run twice, which they need not forgive."""
    for sizes in SIZES:
        model, data = build(on_weights(BY_ROW[name])), rows(sizes)
        expected = fisher_loop(model, data, classify)
        for run, verify in ((diagonal, False), (accumulated, False), (accumulated, True)):
            assert_close(run(model, data, verify), expected, 1e-10, 1e-11)
        if name == "linear":
            assert_close(diagonal(model, data, True), expected, 1e-10, 1e-11)


@pytest.mark.parametrize("verify", [True, False])
def test_a_norm_over_each_sample(verify):
    def forward(m, x):
        h = torch.tanh(m.a(torch.stack([x, 2 * x, x - 1], 1)))
        return m.head(torch.tanh(m.b(hooked(h, lambda g: g / g.norm(dim=(1, 2), keepdim=True)))).mean(1))

    for sizes in SIZES:
        compare(build(forward), rows(sizes), verify)


@pytest.mark.parametrize(
    ("name", "place", "n_samples", "verify"),
    pairwise(MIXING, ["a layer", "an embedding"], [4, 5, 17], [True, False]),
)
def test_hooks_that_mix_samples_are_an_error_that_names_them(name, place, n_samples, verify):
    with pytest.raises(
        CoupledSamplesError, match=r"samples are coupled at .* Hooks and Functions .*test_hooks\.py:\d+"
    ):
        accumulated(build(PLACES[place](MIXING[name])), rows([n_samples]), verify)
    with pytest.raises(WplfastError):
        diagonal(build(PLACES[place](MIXING[name])), rows([n_samples]), verify)


def test_a_clamp_that_first_bites_later():
    """In batches that are measured again, and where gradients of other sizes come."""
    model, data = build(on_a_layer(lambda g: g.clamp(-300, 300))), rows([4] * 10)
    data[8] = (data[8][0], data[8][1])

    def loss(outputs, targets):
        return classify(outputs, targets) * loss.scale

    for verify in (True, False):
        expected, count = 0.0, 0
        with wplfast.FisherAccumulator(model, verify=verify) as acc:
            for index, (x, y) in enumerate(data):
                loss.scale = 0.001 if index == 0 else 50.0
                acc.backward(loss(model(x), y))
        for index, (x, y) in enumerate(data):
            loss.scale = 0.001 if index == 0 else 50.0
            found = fisher_loop(model, [(x, y)], loss)
            expected = found if not count else {n: f + found[n] for n, f in expected.items()}
            count += 1
        model.zero_grad()
        assert_close(acc.result(), {n: f / count for n, f in expected.items()}, 1e-10, 1e-11)


def rounded_to(dtype):
    return lambda g: g.to(dtype).to(g.dtype)


ROUNDING = {
    "float16": rounded_to(torch.float16),
    "bfloat16": rounded_to(torch.bfloat16),
    "float8_e5m2": rounded_to(torch.float8_e5m2),
    "float8_e4m3fn": rounded_to(torch.float8_e4m3fn),
    "steps": lambda g: (g * 256).round() / 256,
    "steps of each row": lambda g: (g / by_row(g) * 127).round() * by_row(g) / 127,
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_straight_through(name, verify):
    """Of the first layers too, whose data have no gradients, for batches as large as they have features, or half."""

    def forward(m, x):
        hook = ROUNDING[name]
        h = hooked(m.a(x) + (hook(m.a(x)) - m.a(x)).detach(), hook)
        return m.head(hooked(torch.tanh(m.b(torch.tanh(h))), hook))

    for sizes in ([2, 2, 2], [D], [16, 16]):
        data = [(0.02 ** (k % 2) * x, y) for k, (x, y) in enumerate(rows(sizes))]
        compare(build(forward), data, verify)


def test_one_sample_after_another_adds_up():
    """Where a use is left to that, a hook that adds to rows of other samples would enter."""

    def forward(hook):
        return lambda m, x: m.head(hooked(torch.tanh(Product.apply(x, m.b.weight)), hook))

    for name in ("clamped", "clipped by norm", "sign"):
        compare(build(forward(BY_ROW[name])), rows([4, 3]), True)
    for hook in (BY_ROW["shifted"], MIXING["whole norm"]):
        with pytest.raises(CoupledSamplesError, match="do not add up"):
            accumulated(build(forward(hook)), rows([4]), False)


# ---- float16 ---------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Tokens, positions, attention."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(9, 16), par(4, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)
        self.head = nn.Linear(16, C)

    def forward(self, x):
        return self.head(self.layer(self.emb(x) + self.pos).mean(1))


HALF = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, C)),
        lambda n: torch.randn(n, 16),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Flatten(), nn.Linear(64, C)),
        lambda n: torch.randn(n, 4, 16),
    ),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, C)),
        lambda n: torch.randn(n, 1, 4, 4),
    ),
    "transformer": (Classifier, lambda n: torch.randint(0, 9, (n, 4))),
    "tied": (
        lambda: Lambda(
            lambda m, x: F.linear(torch.tanh(m.fc(m.emb(x))), m.emb.weight).mean(1),
            emb=nn.Embedding(9, 16),
            fc=nn.Linear(16, 16),
        ),
        lambda n: torch.randint(0, 9, (n, 4)),
    ),
    "recurrent": (
        lambda: Lambda(lambda m, x: m.head(m.g(x)[0][:, -1]), g=nn.GRU(16, 8, batch_first=True), head=nn.Linear(8, C)),
        lambda n: torch.randn(n, 4, 16),
    ),
}


@pytest.mark.parametrize(
    ("name", "autocast", "scale", "verify"), pairwise(HALF, [False, True], [1e-5, 1.0, 30.0], [True, False])
)
def test_float16(name, autocast, scale, verify, autocast_kind):
    """Within what float16 itself does to a loop: of 2^-11 for each number, and much more where they are subnormal."""
    make, inputs = HALF[name]
    model = make().eval()

    def loss(outputs, targets):
        return scale * F.cross_entropy(outputs.float(), targets, reduction="none")

    for sizes in ([4, 4, 3], [1, 5], [20]):
        data = [(inputs(n), torch.randint(0, C, (n,))) for n in sizes]
        if not autocast:
            model = model.half()
            data = [(x.half() if x.is_floating_point() else x, y) for x, y in data]
        with torch.autocast(autocast_kind, dtype=torch.float16, enabled=autocast):
            fisher = wplfast.fisher_diagonal(model, data, loss, verify=verify)
            expected = fisher_loop(model, data, loss, double=False)
        model.zero_grad()
        difference = torch.cat([(fisher[n].double() - e).flatten() for n, e in expected.items()]).norm()
        assert difference <= (0.2 if scale < 1 else 0.02) * torch.cat([e.flatten() for e in expected.values()]).norm()


def test_a_misread_float16_model_is_seen(monkeypatch):
    """The tolerance is no blindfold."""
    from wplfast.capture.rules.linear import LinearRule

    model, data = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, C)).half(), rows([4])
    data = [(torch.randn(4, 16).half(), torch.randint(0, C, (4,)))]
    serve = LinearRule.serve
    monkeypatch.setattr(LinearRule, "serve", lambda s, c, i, g, layout: serve(s, c, [1.3 * t for t in i], g, layout))
    with pytest.raises(wplfast.errors.VerificationError):
        wplfast.fisher_diagonal(model, data, lambda o, y: F.cross_entropy(o.float(), y, reduction="none"))


# ---- pairs of passes -------------------------------------------------------------------------------------------------

N, T = 6, 4


@pytest.mark.parametrize("hook", [lambda g: g, torch.sign, lambda g: g / by_row(g), lambda g: g.clamp(-0.5, 0.5) + 0.1])
@pytest.mark.parametrize("n_samples", [2, 3, 16, 17])
def test_rows_are_told_by_what_changes(hook, n_samples):
    codes = ProbeWeights(n_samples, torch.Generator().manual_seed(1), in_pairs=True)
    owner = torch.randint(0, n_samples, (101,))
    gradient = torch.randn(101, D)
    plain = Projection.of(hook(gradient), n_samples)
    passes = [
        Projection.of(hook(gradient * codes.weights(d).to(gradient)[owner][:, None]), n_samples)
        for d in range(codes.rounds)
    ]
    assert torch.equal(decode(passes, plain, codes), owner)
    both = [
        Projection.of(one.rows[:, None] + one.rows.roll(1)[:, None], n_samples)
        for one in (plain, *passes)
    ]  # fmt: skip
    assert decode(both[1:], both[0], codes) is None
    assert decode([plain] * codes.rounds, plain, codes) is None


@pytest.mark.parametrize("axis", [AxisTemplate(0), AxisTemplate(0, T, 1), AxisTemplate(0, 1, T)], ids=str)
def test_the_axis_is_found_by_what_changes(axis):
    codes = ProbeWeights(N, torch.Generator().manual_seed(1), in_pairs=True)
    shape = torch.Size((axis.outer * N * axis.inner, D))
    owner = torch.arange(N).repeat_interleave(axis.inner).repeat(axis.outer)
    gradient = torch.randn(shape)
    plain = Projection.of(gradient.sign(), N)
    passes = [
        Projection.of((gradient * codes.weights(d).to(gradient)[owner][:, None]).sign(), N) for d in range(codes.rounds)
    ]
    found = [
        c
        for c in candidates(shape, N)
        if all(matches(c.fit(shape, N), shape, one, plain, codes, d) for d, one in enumerate(passes))
    ]
    assert found == [axis]


def test_no_weight_is_one():
    """Or a gradient that does not come from the losses would be taken for some sample's."""
    for n_samples in (1, 2, 16, 17, 300):
        codes = ProbeWeights(n_samples, torch.Generator().manual_seed(1))
        for digit in range(codes.rounds):
            assert (codes.weights(digit).abs() != 1).all()
            assert len(codes.weights(digit).abs().unique()) == min(n_samples, 16) or digit


def reordered(m, x):
    rows = m.fc(x).flatten(0, 1)
    rows.register_hook(m.bend)
    order = rows.detach().sum(1).argsort()
    back = torch.zeros_like(rows).index_copy(0, order, torch.tanh(rows[order] @ m.w))
    return m.head(back.view(*x.shape).sum(1))


#: What bends gradients that are scaled far, and those alone.
FAR = {
    "clamped where huge": lambda g: g.clamp(-1e4, 1e4),
    "zero where tiny": lambda g: g * (g.abs() > 1e-9),
    "rounded to half precision": lambda g: g.half().to(g.dtype),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FAR)
def test_rows_in_any_order_of_many_samples_behind_a_hook_that_far_weights_would_meet(name, verify):
    """Batches that are measured in one pass have weights up to 2^32, which the hook does not meet otherwise."""
    torch.manual_seed(0)
    model = Lambda(reordered, fc=nn.Linear(D, D), w=par(D, D), head=head()).double()
    model.bend = lambda g: g
    data = [(torch.randn(n, 3, D).double(), torch.randint(0, C, (n,))) for n in (20, 20, 33, 2)]
    expected = fisher_loop(model, data, classify)
    model.bend = FAR[name]
    found = wplfast.fisher_diagonal(model, data, classify, verify=verify)
    tolerance = 1e-2 if "half" in name else 1e-10
    assert_close(found, expected, tolerance, tolerance)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("place", ["loss", "outputs", "inside"])
def test_half_precision_between_the_losses_and_the_parameters(place, verify):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
    data = [(torch.randn(n, D), torch.randint(0, C, (n,))) for n in (12, 12, 30, 30)]
    expected = fisher_loop(model, data, classify)
    if place == "inside":
        model[1].register_forward_hook(lambda module, args, output: output.half().float())
    if place == "outputs":
        model.register_forward_hook(lambda module, args, output: output.half().float())

    def loss_fn(outputs, targets):
        losses = classify(outputs, targets)
        return losses.half() if place == "loss" else losses

    assert_close(wplfast.fisher_diagonal(model, data, loss_fn, verify=verify), expected, 2e-2, 2e-2)
