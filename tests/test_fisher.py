"""fisher_diagonal and FisherAccumulator: numbers, modes, options, state of the model afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import MODELS, Rnn, assert_same_state, batches, ce, mlp, state_of, tokens, whole
from gpu_cases import GPU, poison
from oracle import assert_close, fisher_loop, without_cudnn
from torch import nn

import wplfast
from wplfast.errors import WplfastError

# ---- numbers -----------------------------------------------------------------------------------------------


def test_by_hand():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    data = [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0], [0.0]]))]
    # loss = y^2/2, gradient y x: 3 (1, 2) and 3 (3, 0); the batch gradient squared would be 9 (4, 2)^2 / 4
    fisher = wplfast.fisher_diagonal(model, data, lambda out, y: 0.5 * (out - y).square().sum(1))
    assert fisher["weight"].tolist() == [[45.0, 18.0]]
    assert fisher.n_samples == 2


@pytest.mark.parametrize("name", MODELS)
def test_float32_models_are_within_the_bound(name, one_thread):
    """Float32 against float64: at most 1e-5 per tensor, or 4x the error of a plain float32 loop; 2e-6 in all."""
    build, make = MODELS[name]
    model, data = build().eval(), [make(n) for n in (8, 8, 3)]
    poison()
    fisher = wplfast.fisher_diagonal(model, data, ce)
    exact, plain = fisher_loop(model, data, ce), fisher_loop(model, data, ce, double=False)
    size = whole(exact.values()).norm()
    for key, e in exact.items():
        error, of_loop = (fisher[key].double() - e).norm(), (plain[key] - e).norm()
        assert error <= max(1e-5 * e.norm(), 4 * of_loop) + 1e-12 * size, key
    error, of_loop = (whole(found[k] for k in exact) - whole(exact.values()) for found in (fisher, plain))
    assert error.norm() <= max(2e-6 * size, 4 * of_loop.norm() if GPU else 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_verify_fisher(name, one_thread):
    build, make = MODELS[name]
    errors = wplfast.verify_fisher(build(), make(6), ce)
    assert max(errors.values()) < 1e-3
    assert set(errors) == {n for n, _ in build().named_parameters()}


def test_batches_of_one_sample_are_verified_once(monkeypatch):
    """One sample shows no mixing: the first batch of several is verified too, batches of one in between are not."""
    from wplfast.capture.collect import session

    sizes, verify = [], session.verify_batch
    monkeypatch.setattr(session, "verify_batch", lambda batch, *a: (sizes.append(len(batch.losses)), verify(batch, *a)))
    wplfast.fisher_diagonal(mlp(), batches((1, 1, 1, 3, 1, 2)), ce)
    assert sizes == [1, 3]


def test_verify_fisher_raises_beyond_its_tolerance():
    with pytest.raises(wplfast.errors.VerificationError, match="differs from the one-sample loop"):
        wplfast.verify_fisher(MODELS["encoder layers"][0](), tokens(4), ce, rtol=1e-12)


def test_the_scale_does_not_depend_on_the_batch_size():
    model, (x, y) = mlp(torch.float64), (torch.randn(24, 6).double(), torch.randint(0, 4, (24,)))
    whole = wplfast.fisher_diagonal(model, [(x, y)], ce)
    for size in (1, 5, 8):
        split = [(x[i : i + size], y[i : i + size]) for i in range(0, 24, size)]
        assert_close(wplfast.fisher_diagonal(model, split, ce), dict(whole), 1e-12, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn", "decoder", "encoder layers"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_is_as_good_as_plain_pytorch_in_it(name, autocast, autocast_kind, one_thread):
    build, make = MODELS[name]
    model, data = build().eval(), [make(6) for _ in range(2)]
    if not autocast:
        model, data = model.bfloat16(), [(x.bfloat16() if x.is_floating_point() else x, y) for x, y in data]

    def loss(outputs, targets):
        return ce(outputs.float() if outputs.dtype == torch.bfloat16 else outputs, targets)

    exact = fisher_loop(model, data, loss)
    with torch.autocast(autocast_kind, dtype=torch.bfloat16, enabled=autocast):
        fisher = wplfast.fisher_diagonal(model, data, loss)
        plain = fisher_loop(model, data, loss, double=False)
    error, of_plain = (whole(found[k] for k in exact) - whole(exact.values()) for found in (fisher, plain))
    assert error.norm() <= 2 * of_plain.norm() + (1e-3 * whole(exact.values()).norm() if GPU else 0.0)
    for n, e in exact.items():
        assert autocast or (fisher[n].double() - e).norm() <= max(0.05 * e.norm(), 2 * (plain[n] - e).norm()), n
    assert all(f.dtype == torch.float32 for f in fisher.values())


# ---- modes -------------------------------------------------------------------------------------------------


def test_exact_is_the_expectation_over_classes():
    model, data = mlp(torch.float64), batches(dtype=torch.float64)
    fisher = wplfast.fisher_diagonal(model, data, ce, fisher_type="exact")
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, _ in data:
        for n in range(len(x)):
            logits = model(x[n : n + 1])
            for c, p in enumerate(logits.softmax(1)[0]):
                grads = torch.autograd.grad(ce(logits, torch.tensor([c])).sum(), model.parameters(), retain_graph=True)
                for total, g in zip(expected.values(), grads, strict=True):
                    total += p.detach() * g.square() / 12
    assert_close(fisher, expected, 1e-11, 1e-12)
    assert fisher.n_samples == 12


def test_monte_carlo_approaches_the_exact_fisher():
    model, data = mlp(), batches((40,))
    exact = wplfast.fisher_diagonal(model, data, ce, fisher_type="exact").flat
    few, many = (wplfast.fisher_diagonal(model, data, ce, fisher_type="mc", mc_samples=k).flat for k in (1, 100))
    assert (many - exact).norm() < 0.15 * exact.norm()
    assert (many - exact).norm() < (few - exact).norm()


def test_monte_carlo_is_reproducible_and_leaves_the_global_generator_alone(device):
    model, data = mlp(), batches()
    state = torch.get_rng_state()
    first = wplfast.fisher_diagonal(model, data, ce, fisher_type="mc")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.flat, wplfast.fisher_diagonal(model, data, ce, fisher_type="mc").flat)
    other = wplfast.fisher_diagonal(model, data, ce, fisher_type="mc", generator=torch.Generator(device).manual_seed(9))
    assert not torch.equal(first.flat, other.flat)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "sampler"])
def test_likelihoods(likelihood):
    """For a linear model with Gaussian outputs F_ii is E[x_i^2] exactly in expectation; Bernoulli: E[p(1-p) x_i^2]."""
    model, x = nn.Linear(6, 1), torch.randn(30, 6)
    if likelihood == "bernoulli":
        loss = lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none").sum(1)  # noqa: E731
        p = model(x).sigmoid().detach()
        expected = (p * (1 - p) * x.square()).mean(0)
        drawn = "bernoulli"
    else:
        loss = lambda o, y: 0.5 * (o - y).square().sum(1)  # noqa: E731
        expected = x.square().mean(0)
        drawn = "gaussian"
    if likelihood == "sampler":
        drawn = lambda outputs, g: outputs.detach() + torch.randn(outputs.shape, generator=g)  # noqa: E731
    fisher = wplfast.fisher_diagonal(
        model, [(x, torch.zeros(30, 1))], loss, fisher_type="mc", likelihood=drawn, mc_samples=400
    )
    assert (fisher["weight"][0] - expected).norm() < 0.1 * expected.norm()


def test_monte_carlo_keeps_ignored_tokens():
    seen = []

    def loss(outputs, targets):
        seen.append(targets)
        return ce(outputs, targets)

    x, y = tokens(3, 5)
    y[:, 3:] = -100
    wplfast.fisher_diagonal(Rnn(), [(x, y)], loss, fisher_type="mc")
    assert all((t[:, 3:] == -100).all() and (t[:, :3] >= 0).all() for t in seen)


def test_sample_weights_enter_outside_the_square():
    model, (x, y) = mlp(torch.float64), batches((6,), torch.float64)[0]
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 0.0])
    fisher = wplfast.fisher_diagonal(model, [(x, y, w)], ce, with_grad=True)
    singles = [fisher_loop(model, [(x[n : n + 1], y[n : n + 1])], ce) for n in range(6)]
    expected = {k: sum(w[n] * s[k] for n, s in enumerate(singles)) / w.sum() for k in singles[0]}
    assert_close(fisher, expected, 1e-6, 1e-6)
    assert fisher.n_samples == 6
    assert fisher.total_weight == pytest.approx(6.5)
    losses = ce(model(x), y)
    grads = torch.autograd.grad((w * losses).sum() / w.sum(), model.parameters())
    for (name, _), g in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(fisher.mean_grad[name], g)


@pytest.mark.parametrize("name", ["digits", "encoder layers", "lstm"])
def test_mean_gradient_from_the_same_pass(name):
    build, make = MODELS[name]
    model, data = build().eval(), [make(n) for n in (5, 3)]
    fisher = wplfast.fisher_diagonal(model, data, ce, with_grad=True)
    with without_cudnn():
        losses = torch.cat([ce(model(x), y) for x, y in data])
        grads = torch.autograd.grad(losses.mean(), model.parameters())
    assert wplfast.fisher_diagonal(model, data, ce).mean_grad is None
    for (key, _), g in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(fisher.mean_grad[key], g, rtol=1e-4, atol=1e-6, msg=key)


def test_max_samples_cuts_the_last_batch():
    model, data = mlp(torch.float64), batches((5, 5, 5), torch.float64)
    fisher = wplfast.fisher_diagonal(model, data, ce, max_samples=7)
    cut = [data[0], (data[1][0][:2], data[1][1][:2])]
    assert fisher.n_samples == 7
    assert_close(fisher, fisher_loop(model, cut, ce), 1e-11, 1e-12)


def test_dropout_in_train_mode_only():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4))
    data = batches((20,))
    evaluated = wplfast.fisher_diagonal(model, data, ce)
    assert torch.equal(evaluated.flat, wplfast.fisher_diagonal(model, data, ce).flat)
    assert model.training
    with torch.random.fork_rng():
        trained = wplfast.fisher_diagonal(model, data, ce, train=True)
    assert not torch.equal(trained.flat, evaluated.flat)


# ---- forms of data and parameters --------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, a, b):
        return self.first(a) + self.second(b)


def test_forms_of_batches():
    model = Two()
    a, b, y = torch.randn(5, 6), torch.randn(5, 3), torch.randint(0, 4, (5,))
    reference = wplfast.fisher_diagonal(model, [((a, b), y)], ce).flat
    forms = [
        ([({"a": a, "b": b}, y)], {}),
        ([{"a": a, "b": b, "labels": y}], {}),
        ([[(a, b), y]], {}),
        ([{"x": (a, b), "t": y}], {"unpack": lambda d: (d["x"], d["t"])}),
    ]
    for data, options in forms:
        assert torch.equal(wplfast.fisher_diagonal(model, data, ce, **options).flat, reference)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(10, 6), torch.randint(0, 4, (10,))), 4
    )
    assert wplfast.fisher_diagonal(mlp(), loader, ce, progress=True).n_samples == 10


def test_subset_of_parameters_under_names_of_their_own():
    model, data = mlp(torch.float64), batches(dtype=torch.float64)
    loop = fisher_loop(model, data, ce)
    fisher = wplfast.fisher_diagonal(model, data, ce, params={"w": model[2].weight, "b": model[0].bias})
    assert_close(fisher, {"w": loop["2.weight"], "b": loop["0.bias"]}, 1e-11, 1e-12)
    fisher = wplfast.fisher_diagonal(model, data, ce, params=model[0])
    assert_close(fisher, {"weight": loop["0.weight"], "bias": loop["0.bias"]}, 1e-11, 1e-12)


def test_frozen_and_unreached_parameters():
    model, data = mlp(torch.float64), batches(dtype=torch.float64)
    model[0].weight.requires_grad_(False)
    model.extra = nn.Linear(2, 2).double()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    fisher = wplfast.fisher_diagonal(model, data, ce)
    assert set(fisher) == {"0.bias", "2.weight", "2.bias", "extra.weight", "extra.bias"}
    assert fisher["extra.weight"].abs().max() == 0
    assert fisher.report.unreached == ("extra.weight", "extra.bias")
    assert not model[0].weight.requires_grad
    explicit = wplfast.fisher_diagonal(model, data, ce, params={"frozen": model[0].weight})
    assert explicit["frozen"].abs().max() > 0


class Distances(nn.Linear):
    """Distances to prototypes, for which there is no rule."""

    def forward(self, x):
        return torch.cdist(x, self.weight)


def test_report_says_what_served_whom():
    model = nn.Sequential(nn.Linear(6, 9), Distances(9, 9, bias=False), nn.Linear(9, 4))
    report = wplfast.fisher_diagonal(model, batches(), ce).report
    assert report.rules["0.weight"] == ("linear",)
    assert report.rules["1.weight"] == ("generic",)
    assert "1.weight" in report.slow
    assert 0 < report.fast_share < 1
    assert 0 <= report.fast_time_share < 1
    assert wplfast.fisher_diagonal(mlp(), batches(), ce).report.fast_share == 1.0


# ---- what is left behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, caplog):
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.Linear(9, 9), nn.Linear(9, 4))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(4, 9)
    steps = []
    model[2].weight.register_hook(lambda g: steps.append("hook"))
    model[2].weight.register_post_accumulate_grad_hook(lambda p: steps.append("accumulated"))
    modes, data = [m.training for m in model.modules()], batches()
    before, rng = state_of(model), torch.get_rng_state()

    def loss(outputs, targets):
        if fails and len(targets) == 2:
            raise KeyError("in the loss")
        torch.rand(3)
        return ce(outputs, targets)

    if fails:
        with pytest.raises(KeyError):
            wplfast.fisher_diagonal(model, data, loss)
    else:
        wplfast.fisher_diagonal(model, data, loss)
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert steps == []
    said = [record.getMessage() for record in caplog.records if "register_hook" in record.getMessage()]
    assert len(said) == 1
    assert "hooks on ['2.weight'] (register_hook) are not called" in said[0]
    assert model(torch.randn(2, 6)).sum().backward() is None
    assert steps == ["hook", "accumulated"]


def test_parameters_of_the_loss_are_left_alone():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return ce(outputs * self.temperature, targets)

    loss = Loss()
    wplfast.fisher_diagonal(mlp(), batches(), loss)
    assert loss.temperature.grad is None
    assert loss.temperature.requires_grad


def test_compiled_models_run_eagerly_for_the_pass():
    model, data = mlp(), batches((5, 5))
    compiled = torch.compile(model, backend="eager")
    compiled(data[0][0])
    fisher = wplfast.fisher_diagonal(compiled, data, ce)
    assert torch.equal(fisher.flat, wplfast.fisher_diagonal(model, data, ce).flat)
    assert fisher.report.fast_share == 1.0


@pytest.mark.parametrize("verify", [False, True])
def test_passes_leave_no_tensors_behind(verify):
    """A session and the graph that its taps are in refer to each other, in C++, where no collector looks."""

    def alive():
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    model, data = mlp(), batches()
    counts = []
    for _ in range(3):
        wplfast.fisher_diagonal(model, data, ce, verify=verify)
        with wplfast.FisherAccumulator(model) as acc:
            acc.backward(ce(model(data[0][0]), data[0][1]))
            ce(model(data[0][0]), data[0][1])  # whose backward pass never comes
        counts.append(alive())
    assert counts[2] == counts[1]


# ---- the accumulator ---------------------------------------------------------------------------------------


def test_accumulator_equals_the_call_and_can_be_read_midway():
    model, data = mlp().eval(), batches()
    with wplfast.FisherAccumulator(model) as acc:
        for i, (x, y) in enumerate(data):
            acc.backward(ce(model(x), y))
            if i == 1:
                midway = acc.result()
    assert acc.n_samples == 12
    assert torch.equal(acc.result().flat, wplfast.fisher_diagonal(model, data, ce).flat)
    assert torch.equal(midway.flat, wplfast.fisher_diagonal(model, data[:2], ce).flat)


def test_accumulator_measures_positions_without_another_forward_pass():
    model, data = MODELS["encoder layers"][0]().double().eval(), [tokens(5, 7) for _ in range(3)]
    with wplfast.FisherAccumulator(model) as acc:
        for x, y in data:
            acc.backward(ce(model(x), y))
    assert_close(acc.result(), fisher_loop(model, data, ce), 1e-11, 1e-12)


def test_several_forward_passes_before_one_backward():
    model = nn.Linear(6, 4).double()
    x1, x2 = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    with wplfast.FisherAccumulator(model) as acc:
        acc.backward((model(x1) - model(x2)).square().sum(1))
    expected = torch.zeros_like(model.weight)
    for n in range(5):
        (g,) = torch.autograd.grad((model(x1[n]) - model(x2[n])).square().sum(), model.weight)
        expected += g.square() / 5
    torch.testing.assert_close(acc.result()["weight"], expected)


def test_one_pass_at_a_time():
    model = mlp()
    with wplfast.FisherAccumulator(model), pytest.raises(WplfastError, match="another Fisher pass"):
        wplfast.fisher_diagonal(model, batches(), ce)
    acc = wplfast.FisherAccumulator(model)
    with pytest.raises(WplfastError, match="as a context manager"):
        acc.backward(torch.zeros(3))
    with acc, pytest.raises(WplfastError, match="nothing was accumulated"):
        acc.result()
