"""Targets of bernoulli and gaussian likelihoods, of samplers, and draws themselves."""

import functools

import pytest
import torch
import torch.nn.functional as F
from label_cases import IGNORED, Tokens, close, data
from torch import nn

import wplfast
from wplfast import losses
from wplfast.fisher.sampling import draw

ce, fd = losses.cross_entropy, wplfast.fisher_diagonal


# ---- bernoulli and gaussian --------------------------------------------------------------------------------


def linear(d, n=5):
    torch.manual_seed(1)
    return nn.Linear(3, d).double(), torch.randn(n, 3).double()


@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("form", ["[N, 1]", "[N]", "[N, 1] given [N]", "[N, K]", "ignored", "integers"])
def test_bernoulli(form, kind):
    """F of output k's weights is the mean of p (1 - p) x^2 over the labels that count."""
    d = 1 if "1" in form or form == "[N]" else 3
    model, x = linear(d)
    y, counts = torch.randint(0, 2, (5, d)).double(), torch.ones(5, d).double()
    loss = losses.bernoulli
    if form == "[N, 1] given [N]":
        y = y[:, 0]
    if form == "[N]":
        y, loss = y[:, 0], lambda o, y: losses.bernoulli(o.squeeze(1), y)
    if form == "ignored":
        y[1, 0] = y[4] = -1
        counts, loss = (y >= 0).double(), functools.partial(losses.bernoulli, ignore=-1)
    if form == "integers":
        y, loss = y.long(), lambda o, y: losses.bernoulli(o, y.float())
    p = model(x).detach().sigmoid() * counts
    spread = p * (counts - p)
    want = {"weight": spread.T @ x.square() / 5, "bias": spread.mean(0)}
    got = fd(model, [(x, y)], loss, fisher_type=kind, likelihood="bernoulli", mc_samples=400)
    close(got, want, 1e-9 if kind == "exact" else 0.06)


def test_exact_bernoulli_of_losses_that_take_no_probabilities():
    hard = lambda o, y: F.softplus(torch.where(y > 0.5, -o, o)).sum(1)  # noqa: E731
    model, x = linear(1)
    p = model(x).detach().sigmoid()
    got = fd(model, [(x, torch.ones(5, 1))], hard, fisher_type="exact", likelihood="bernoulli")
    close(got, {"weight": (p * (1 - p)).T @ x.square() / 5}, 1e-9)
    model, x = linear(3)
    with pytest.raises(ValueError, match=r"takes labels between 0 and 1.*fisher_type='mc'"):
        fd(model, [(x, torch.ones(5, 3))], hard, fisher_type="exact", likelihood="bernoulli")


@pytest.mark.parametrize("likelihood", ["gaussian", lambda outputs, generator: outputs])
def test_exact_has_no_finite_set_of_targets(likelihood):
    with pytest.raises(ValueError, match="use fisher_type='mc'"):
        fd(
            nn.Linear(3, 1),
            [(torch.randn(4, 3), torch.randn(4, 1))],
            losses.mse,
            fisher_type="exact",
            likelihood=likelihood,
        )


@pytest.mark.parametrize("form", ["[N, D]", "[N, 1] given [N]", "missing", "sentinel", "tokens", "shifted", "constant"])
def test_gaussian(form):
    """F of output d's weights is the mean of x^2 over the targets that count."""
    d = 1 if form == "[N, 1] given [N]" else 2
    model, x = linear(d)
    y, counts, loss = torch.randn(5, d).double(), torch.ones(5, d).double(), losses.mse
    if form == "[N, 1] given [N]":
        y = y[:, 0]
    if form in ("missing", "sentinel"):
        none = float("nan") if form == "missing" else -999.0
        y[1, 0] = y[4] = none
        counts[1, 0] = counts[4] = 0
        known = (lambda y: ~y.isnan()) if form == "missing" else (lambda y: y != -999)
        loss = lambda o, y: 0.5 * torch.where(known(y), o - y, 0).square().sum(1)  # noqa: E731
    if form == "constant":
        loss = lambda o, y: -torch.distributions.Normal(o, 1.0).log_prob(y).sum(1)  # noqa: E731
    if form in ("tokens", "shifted"):
        x, y = torch.randn(5, 4, 3).double(), torch.randn(5, 4, d).double()
        squares_ = lambda o, y: 0.5 * (o - y).square().sum(2).mean(1)  # noqa: E731
        loss = squares_ if form == "tokens" else lambda o, y: squares_(o[:, :-1], y[:, 1:])
        seen = x if form == "tokens" else x[:, :-1]
        want = {"weight": (seen.square().sum((0, 1)) / 5 / seen.shape[1] ** 2).expand(d, 3)}
    else:
        want = {"weight": counts.T @ x.square() / 5}
    close(fd(model, [(x, y)], loss, fisher_type="mc", likelihood="gaussian", mc_samples=400), want, 0.08)


# ---- samplers ----------------------------------------------------------------------------------------------


def sampler(shift=0, temperature=1.0):
    """Draw labels of tokens from their own position, or the one before, as a user would."""

    def drawn(outputs, generator):
        p = (outputs.detach() / temperature).softmax(-1)
        labels = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:-1])
        return labels.roll(shift, 1)

    return drawn


@pytest.mark.parametrize("n", [2, 30])
def test_samplers_that_draw_from_another_position_are_refused(n):
    torch.manual_seed(0)
    model = Tokens()
    x, y = torch.randint(0, 7, (n, 8)), torch.randint(0, 3, (n, 8))
    shift = lambda o, y: ce(o, y, shift=True)  # noqa: E731
    with torch.no_grad():
        model.head.weight.mul_(3)
    with pytest.raises(ValueError, match=r"does not draw from .* label t \+ 1 from there"):
        fd(model, [(x, y)], shift, fisher_type="mc", likelihood=sampler())
    with pytest.raises(ValueError, match="does not draw from the distribution"):
        fd(model, [(x, y)], ce, fisher_type="mc", likelihood=sampler(1))
    fd(model, [(x, y)], shift, fisher_type="mc", likelihood=sampler(1))
    fd(model, [(x, y)], ce, fisher_type="mc", likelihood=sampler())
    with pytest.raises(ValueError, match="does not draw"):
        fd(model, [(x, y)], ce, fisher_type="mc", likelihood=sampler(temperature=3.0))
    tempered = lambda o, y: ce(o / 3, y)  # noqa: E731  # not a likelihood that is known: the sampler is the user's word
    found = fd(model, [(x, y)], tempered, fisher_type="mc", likelihood=sampler(temperature=3.0))
    assert "the sampler: its loss is not -log p" in " ".join(found.report.unchecked)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_right_samplers_pass(scale):
    """Saturated probabilities, whose rare labels a few draws never show, too."""
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = nn.Linear(3, 5), scale * torch.randn(4, 3)
        categorical = lambda o, g: torch.multinomial(o.detach().softmax(1), 1, generator=g)[:, 0]  # noqa: E731
        fd(model, [(x, torch.zeros(4).long())], ce, fisher_type="mc", likelihood=categorical)
        bernoulli = lambda o, g: torch.bernoulli(o.detach().sigmoid(), generator=g)  # noqa: E731
        fd(model, [(x, torch.zeros(4, 5))], losses.bernoulli, fisher_type="mc", likelihood=bernoulli)
        gaussian = lambda o, g: o.detach() + torch.randn(o.shape, generator=g)  # noqa: E731
        fd(model, [(x, torch.zeros(4, 5))], losses.mse, fisher_type="mc", likelihood=gaussian)


def test_a_gaussian_sampler_of_another_variance():
    wide = lambda o, g: o.detach() + 2 * torch.randn(o.shape, generator=g)  # noqa: E731
    with pytest.raises(ValueError, match="does not draw"):
        fd(nn.Linear(3, 5), [(torch.randn(4, 3), torch.zeros(4, 5))], losses.mse, fisher_type="mc", likelihood=wide)
    quarter = lambda o, y: losses.mse(o, y) / 4  # noqa: E731  # -log p of variance 4
    fd(nn.Linear(3, 5), [(torch.randn(4, 3), torch.zeros(4, 5))], quarter, fisher_type="mc", likelihood=wide)


def test_a_sampler_whose_loss_is_no_known_likelihood_everywhere():
    """It may draw from what the loss describes all the same, so it is not refused, but said."""
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 5), [(s * torch.randn(9, 3), torch.zeros(9).long()) for s in (1.0, 30.0)]

    def clamped(o, g):
        return torch.multinomial(o.detach().clamp(-5, 5).softmax(1), 1, generator=g)[:, 0]

    loss = lambda o, y: ce(o.clamp(-5, 5), y)  # noqa: E731
    got = fd(model, batches[:1], loss, fisher_type="mc", likelihood=clamped)
    assert got.report.unchecked == ()
    got = fd(model, batches, loss, fisher_type="mc", likelihood=clamped)
    assert len(got.report.unchecked) == 1
    assert "sampler: its loss is -log p of a known likelihood on numbers of this library's" in got.report.unchecked[0]
    ignoring = lambda o, y: ce(o, y, ignore_index=4)  # noqa: E731
    got = fd(model, batches[:1], ignoring, fisher_type="mc", likelihood=clamped)
    assert got.report.unchecked == ("the sampler: its loss ignores the class 4",)


# ---- draws -------------------------------------------------------------------------------------------------


def test_draws_have_the_distribution_and_rows_are_independent():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]] * 3000).double()
    p = logits[0].softmax(0)
    for count in (1, 5):
        drawn = draw(logits, "categorical", generator, count=count)
        assert drawn.shape == (count, 3000)
        for one in drawn:
            shares = torch.bincount(one, minlength=4) / 3000
            assert (shares - p).abs().max() < 0.04
            assert shares[2] == 0
        pairs = torch.bincount(drawn[0, ::2] * 4 + drawn[0, 1::2], minlength=16).view(4, 4) / 1500
        assert (pairs - p[:, None] * p).abs().max() < 0.05
    many = draw(logits[:2], "categorical", generator, count=1000)
    assert (torch.bincount(many[:, 0], minlength=4) / 1000 - p).abs().max() < 2e-3  # stratified
    normal = draw(torch.zeros(2, 500), "gaussian", generator, count=4)
    assert abs(float(normal.std()) - 1) < 0.05
    assert torch.isfinite(normal).all()
    assert abs(float((normal[:, 0] * normal[:, 1]).mean())) < 0.1


def test_generator_and_reports_are_left_alone():
    """The check draws nothing from the caller's generator, and the loss's own parameters get no gradient."""
    model, (x, y) = Tokens(), data()
    scale = torch.zeros(1, requires_grad=True)
    loss = lambda o, y: ce(o, y, IGNORED) + 0 * scale  # noqa: E731
    first, second = (torch.Generator(torch.get_default_device()).manual_seed(1) for _ in range(2))
    fd(model, [(x, y)], loss, fisher_type="mc", generator=first)
    draw(torch.zeros(3, 3, 3), "categorical", second)
    assert torch.equal(first.get_state(), second.get_state())
    assert scale.grad is None


@pytest.mark.parametrize("verify", [True, False])
def test_draws_of_a_sampler_are_data(verify):
    """A sampler may compute draws from the outputs with a graph."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(5, 3).double(), torch.randn(6, 5, dtype=torch.float64)
    loss = lambda o, t: (o - t).square().sum(1) / 2  # noqa: E731

    def run(sampler):
        generator = torch.Generator().manual_seed(1)
        options = {"fisher_type": "mc", "verify": verify, "generator": generator, "likelihood": sampler}
        return wplfast.fisher_diagonal(model, [(x, x[:, :3])], loss, **options)

    noise = lambda o, g: torch.randn(o.shape, generator=g, dtype=o.dtype)  # noqa: E731
    found, expected = run(lambda o, g: o + noise(o, g)), run(lambda o, g: o.detach() + noise(o, g))
    for name, f in expected.items():
        torch.testing.assert_close(found[name], f)
        assert f.sum() > 0


class Placed(nn.Module):
    """Rows of a table that all samples share: the first batch runs again to learn whose gradients they hold."""

    def __init__(self):
        super().__init__()
        self.places, self.head = nn.Embedding(4, 3), nn.Linear(3, 5)

    def forward(self, x):
        return self.head((x + self.places(torch.arange(4))).tanh().sum(1))


@pytest.mark.parametrize("as_dict", [False, True])
def test_all_targets_of_a_batch_that_runs_again(as_dict):
    """Losses of later draws are compared with -log p in the graph of the last run, which is theirs."""
    torch.manual_seed(0)
    model, batches = Placed().double(), [(torch.randn(n, 4, 3).double(), torch.randint(5, (n,))) for n in (3, 2)]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in torch.cat([x for x, _ in batches]).split(1):
        logits = model(x)[0]
        for log_p, p in zip(logits.log_softmax(0), logits.detach().softmax(0), strict=True):
            gradients = torch.autograd.grad(-log_p, list(model.parameters()), retain_graph=True)
            for total, gradient in zip(expected.values(), gradients, strict=True):
                total += p * gradient.square() / 5
    plain, loss = model.forward, ce
    if as_dict:
        model.forward, loss = lambda x: {"hidden": x, "logits": plain(x)}, lambda o, y: ce(o["logits"], y)
    close(fd(model, batches, loss, fisher_type="exact"), expected)
    drawn = fd(model, batches, loss, fisher_type="mc", mc_samples=3)
    assert all(bool(f.isfinite().all()) for f in drawn.values())
