"""The parts of the capture: measured ownership, the identity that verifies, what is seen and what is not."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nested_cases import Product
from torch import nn

import wplfast
from wplfast.capture.call import Operand
from wplfast.capture.probe.weights import ProbeWeights, Projection, candidates, decode, matches
from wplfast.capture.rules.base import summed
from wplfast.capture.rules.grad_sample import FactoredGradSample
from wplfast.capture.sample_layout import AxisLayout, AxisTemplate, OneSample, SegmentIds, sum_to
from wplfast.capture.watched import WatchedParameter
from wplfast.errors import VerificationError

ce = wplfast.losses.cross_entropy
N, T, D = 6, 4, 5

LAYOUTS = {
    "[N, T, D]": ((N, T, D), AxisTemplate(0)),
    "[T, N, D]": ((T, N, D), AxisTemplate(1)),
    "[N*T, D]": ((N * T, D), AxisTemplate(0, 1, T)),
    "[T*N, D]": ((T * N, D), AxisTemplate(0, T, 1)),
    "[2*N*T, D]": ((2 * N * T, D), AxisTemplate(0, 2, T)),
    "[D, N]": ((D, N), AxisTemplate(1)),
    "[N]": ((N,), AxisTemplate(0)),
}


def owner_of(shape, axis):
    """The owner of every element, written out."""
    owner = torch.arange(N).repeat_interleave(axis.inner).repeat(axis.outer)
    view = [1] * len(shape)
    view[axis.dim] = -1
    return owner.view(view).expand(shape)


def coded(gradient, owner, codes, digit=0):
    """The gradient of a probing pass."""
    return gradient * codes.weights(digit).to(gradient)[owner]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_axis_is_found_and_no_other(shape, axis, dtype):
    codes = ProbeWeights(N, torch.Generator().manual_seed(1))
    gradient, owner = torch.randn(shape).to(dtype), owner_of(shape, axis)
    plain, after = Projection.of(gradient, N), Projection.of(coded(gradient, owner, codes), N)
    found = [
        c
        for c in candidates(gradient.shape, N)
        if matches(c.fit(gradient.shape, N), gradient.shape, after, plain, codes, 0)
    ]
    assert found == [axis]
    layout = axis.fit(gradient.shape, N)
    for n in range(N):
        assert torch.equal(layout.only(gradient, n), gradient * (owner == n))
    factors = torch.rand(N, dtype=torch.float64)
    torch.testing.assert_close(layout.scale(gradient, factors), gradient * factors.to(dtype)[owner])
    if layout.has_rows(len(shape)):
        rows = layout.rows(gradient)
        assert rows.shape == (N, gradient.numel() // N // shape[-1], shape[-1])
        for n in range(N):
            assert rows[n].double().sum().item() == pytest.approx(gradient[owner == n].double().sum().item(), abs=1e-2)


def test_a_template_fits_batches_of_other_sizes_but_not_of_another_kind():
    assert AxisTemplate(0, 1, 7).fit(torch.Size([3 * 7, D]), 3) == AxisLayout(0, 1, 3, 7)
    assert AxisTemplate(0, 7, 1).fit(torch.Size([3 * 7, D]), 3) == AxisLayout(0, 7, 3, 1)
    assert AxisTemplate(0).fit(torch.Size([3, D]), 3) == AxisLayout(0, 1, 3, 1)
    assert AxisTemplate(0).fit(torch.Size([21, D]), 3) is None  # T grew: is it N * T or T * N?
    assert AxisTemplate(0, 1, 7).fit(torch.Size([3 * 14, D]), 3) is None  # N * 14, or 2 * N * 7?
    assert AxisTemplate(0, 1, 7).fit(torch.Size([20, D]), 3) is None
    assert AxisTemplate(2).fit(torch.Size([3, D]), 3) is None


@pytest.mark.parametrize("n_samples", [3, 16, 17, 300])
def test_routed_rows_are_decoded(n_samples):
    codes = ProbeWeights(n_samples, torch.Generator().manual_seed(1))
    assert codes.rounds == {3: 1, 16: 1, 17: 2, 300: 3}[n_samples]
    owner = torch.randint(0, n_samples, (501,))
    gradient = torch.randn(501, D)
    gradient[::7] = 0
    digits = [
        Projection.of(coded(gradient, owner[:, None].expand(-1, D), codes, d), n_samples) for d in range(codes.rounds)
    ]
    found = decode(digits, Projection.of(gradient, n_samples), codes)
    zero = torch.arange(501) % 7 == 0
    assert torch.equal(found[~zero], owner[~zero])
    assert (found[zero] == -1).all()
    routed = SegmentIds(found, n_samples)
    rows = routed.rows(gradient)
    for n in range(n_samples):
        torch.testing.assert_close(rows[n].sum(0), gradient[owner == n].sum(0))


def test_rows_that_mix_samples_belong_to_nobody():
    codes = ProbeWeights(N, torch.Generator().manual_seed(1))
    parts, owner = torch.randn(2, 10, D), torch.stack([torch.arange(10) % N, torch.arange(1, 11) % N])
    mixed = coded(parts, owner[..., None].expand(-1, -1, D), codes).sum(0)
    assert decode([Projection.of(mixed, N)], Projection.of(parts.sum(0), N), codes) is None


@pytest.mark.parametrize("shape", [(D,), (1, D), (T, D), (1, T, 1), (), (N, 1, 1)], ids=str)
def test_broadcasting_is_undone_per_sample(shape):
    gradient = torch.randn(N, T, D)
    layouts = [AxisLayout(0, 1, N, 1), SegmentIds(torch.arange(N).repeat_interleave(T), N)]
    expected = torch.stack([(gradient * (torch.arange(N) == n).view(N, 1, 1)).sum_to_size(shape) for n in range(N)])
    source = Operand(torch.zeros(shape), torch.zeros(shape), (0,))
    for owner in layouts:
        use = summed(source, "test", owner, gradient)
        torch.testing.assert_close(use.per_sample(range(N)), expected)
        weights = torch.rand(N, dtype=torch.float64)
        torch.testing.assert_close(use.weighted_sum(weights), torch.tensordot(weights.float(), expected, 1))
    torch.testing.assert_close(sum_to(OneSample(), gradient, torch.Size(shape))[0], gradient.sum_to_size(shape))


# ---- verification ----------------------------------------------------------------------------------------------------


def batch():
    return [(torch.randn(N, 8), torch.randint(0, 3, (N,)))]


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def test_verification_sees_exchanged_samples(monkeypatch):
    right = FactoredGradSample.__init__

    def wrong(self, source, rule, activations, grad_outputs):
        right(self, source, rule, activations.roll(1, 0), grad_outputs)

    monkeypatch.setattr(FactoredGradSample, "__init__", wrong)
    with pytest.raises(VerificationError, match=r"'[02]\.weight' disagree with autograd"):
        wplfast.fisher_diagonal(model(), batch(), ce)
    wplfast.fisher_diagonal(model(), batch(), ce, verify=False)


def test_verification_sees_wrong_owners_that_keep_the_sum(monkeypatch):
    """Time taken for samples: the sum over rows is right, and F is not."""
    right = AxisLayout.rows
    monkeypatch.setattr(AxisLayout, "rows", lambda self, t: right(self, t).transpose(0, 1))
    data = [(torch.randn(N, N, 8), torch.randint(0, 3, (N, N)))]
    with pytest.raises(VerificationError):
        wplfast.fisher_diagonal(model(), data, ce)


def test_verification_sees_a_missed_use(monkeypatch):
    from wplfast.capture.collect.round import Round

    taken = []
    right = Round.take
    monkeypatch.setattr(Round, "take", lambda self, *args: taken.append(1) or (len(taken) > 1 and right(self, *args)))
    with pytest.raises(VerificationError):
        wplfast.fisher_diagonal(model(), batch(), ce)


# ---- what is watched ------------------------------------------------------------------------------------------


def test_parameters_are_swapped_inside_and_restored_after():
    m = model()
    optimizer = torch.optim.SGD(m.parameters(), momentum=0.9)
    identities = [id(p) for p in m.parameters()]
    with wplfast.FisherAccumulator(m):
        assert all(type(p) is WatchedParameter for p in m.parameters())
        assert all(isinstance(p, nn.Parameter) for p in m.parameters())
        assert m.state_dict().keys() == model().state_dict().keys()
        assert m[0].weight.shape == (8, 8)
        assert m[0].weight.T.shape == (8, 8)
        assert "Parameter" in repr(m[0].weight)
        with torch.no_grad():
            assert type(m(torch.randn(2, 8))) is torch.Tensor
    assert all(type(p) is nn.Parameter for p in m.parameters())
    assert [id(p) for p in m.parameters()] == identities
    m(torch.randn(2, 8)).sum().backward()
    optimizer.step()


def test_another_thread_is_refused():
    """It cannot be told from one that trains the model; tests/test_interrupts.py has more of them."""
    m, (x, y) = model(), batch()[0]
    errors = []

    def forward():
        try:
            ce(m(x), y)
        except wplfast.errors.WplfastError as error:
            errors.append(str(error))

    with wplfast.FisherAccumulator(m) as acc:
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        acc.backward(ce(m(x), y))
    assert "another thread uses parameters" in errors[0]
    assert torch.equal(acc.result().flat, wplfast.fisher_diagonal(m, [(x, y)], ce).flat)


def test_a_disjoint_pass_of_the_same_model_may_be_open():
    m, (x, y) = model(), batch()[0]
    with wplfast.FisherAccumulator(m, {"a": m[0].weight}) as first:
        first.backward(ce(m(x), y))
    with wplfast.FisherAccumulator(m, {"b": m[2].weight}) as second:
        second.backward(ce(m(x), y))
    whole = wplfast.fisher_diagonal(m, [(x, y)], ce)
    torch.testing.assert_close(first.result()["a"], whole["0.weight"])
    torch.testing.assert_close(second.result()["b"], whole["2.weight"])


def test_no_gradient_is_seen_unless_it_is_squared():
    """A use that comes and goes: what cannot be captured is an error, never a silent omission."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.w, self.active = nn.Linear(8, 3), nn.Parameter(torch.randn(8, 3)), False

        def forward(self, x):
            return self.fc(x) + (Product.apply(x, self.w) if self.active else 0)

    m, (x, y) = Sometimes(), batch()[0]
    with wplfast.FisherAccumulator(m) as acc:
        acc.backward(ce(m(x), y))
        m.active = True
        with pytest.raises(wplfast.errors.WplfastError, match="'w' through an operation that cannot be seen"):
            acc.backward(ce(m(x), y))


def test_lora_that_starts_at_zero_wakes_up():
    """B = 0 makes the gradient of A zero in the first batches: nothing can be measured until it is not."""

    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(8, 3)
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    m = Lora()
    x, y = torch.randn(N, T, 8), torch.randint(0, 3, (N, T))
    with wplfast.FisherAccumulator(m, {"a": m.a.weight, "b": m.b.weight}) as acc:
        acc.backward(ce(m(x), y))
        acc.backward(ce(m(x), y))
        assert acc.result()["a"].abs().max() == 0
        with torch.no_grad():
            m.b.weight.normal_()
        acc.backward(ce(m(x), y))
    expected = wplfast.fisher_diagonal(m, [(x, y)], ce, params={"a": m.a.weight})["a"]
    torch.testing.assert_close(acc.result()["a"], expected / 3)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_call_that_wakes_up_in_a_steady_batch(weighted):
    """Without the gradient of A for batches on end, it is looked at in each of them all the same."""
    from oracle import assert_close

    torch.manual_seed(1)
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8), (3, 2)))
    x, y = torch.randn(N, T, 8).double(), torch.randint(0, 3, (N, T))
    weights = torch.rand(N, dtype=torch.float64) if weighted else None
    expected = {"a": torch.zeros_like(a), "b": torch.zeros_like(b)}
    with wplfast.FisherAccumulator(nn.Module(), {"a": a, "b": b}, with_grad=True) as acc:
        for step in range(6):
            with torch.no_grad():
                b.copy_(torch.randn(3, 2) if step in (3, 4) else torch.zeros(3, 2))
            losses = ce(F.linear(F.linear(x, a), b), y)
            acc.backward(losses, weights)
            for n in range(N):
                plain = [p.detach().clone().requires_grad_() for p in (a, b)]
                loss = ce(x[n : n + 1] @ plain[0].t() @ plain[1].t(), y[n : n + 1]).sum()
                grads = torch.autograd.grad(loss, plain)
                factor = 1.0 if weights is None else float(weights[n])
                for total, gradient in zip(expected.values(), grads, strict=True):
                    total += factor * gradient.square()
    whole = 6.0 * (N if weights is None else float(weights.sum()))
    assert_close(acc.result(), {name: total / whole for name, total in expected.items()}, 1e-11, 1e-12)


def test_very_deep_stacks_are_steady_though_gradients_vanish():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(300)])
    data = [(torch.randn(N, 4), torch.randint(0, 4, (N,))) for _ in range(4)]
    fisher = wplfast.fisher_diagonal(model, data, ce)
    assert fisher.report.passes_per_batch <= 2, "batches after the first, and the one that is checked, take one pass"
    assert float(fisher["0.weight"].abs().max()) == 0


def test_many_parameters_below_one_tensor_are_squared_together():
    from oracle import assert_close, fisher_loop

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.ParameterList([nn.Parameter(torch.randn(1, 8)) for _ in range(60)])
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x):
            table = torch.cat(list(self.rows))
            return torch.tanh(x @ table.t()) @ (table * self.scale)

    m = Joined().double()
    data = [(torch.randn(N, T, 8).double(), torch.randint(0, 8, (N, T))) for _ in range(3)]
    assert_close(wplfast.fisher_diagonal(m, data, ce), fisher_loop(m, data, ce), 1e-10, 1e-11)


@pytest.mark.cpu_only("counts the files of the C++ path")
@pytest.mark.needs_cpp
def test_a_steady_backward_pass_is_short():
    """From the accumulator to the kernel in eight files: what a reader has to know."""
    root, m = str(Path(wplfast.__file__).parent), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    x, y = torch.randn(N, 8), torch.randint(0, 3, (N,))
    entered = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            entered.add(frame.f_code.co_filename.removeprefix(root))

    with wplfast.FisherAccumulator(m) as acc:
        for _ in range(3):
            acc.backward(ce(m(x), y))
        losses = ce(m(x), y)
        sys.setprofile(note)
        try:
            acc.backward(losses)
        finally:
            sys.setprofile(None)
    assert len(entered) <= 8, sorted(entered)


def test_a_state_of_the_model_is_put_back_before_a_batch_runs_again():
    """A later batch needs its forward pass twice, since its position table is measured; the state counts it once."""

    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.positions, self.calls = nn.Linear(8, 3), nn.Parameter(torch.randn(T, 8)), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x, with_positions):
            self.calls += 1
            self.seen += 1
            shift = F.embedding(torch.arange(T), self.positions) if with_positions else 0
            return self.fc(torch.tanh(x + shift) * (self.calls + self.seen))

    m = Stateful().double()
    data = [((torch.randn(N, T, 8).double(), flag), torch.randint(0, 3, (N, T))) for flag in (False, False, True, True)]
    found = wplfast.fisher_diagonal(m, data, ce, verify=False)
    assert (m.calls, float(m.seen)) == (4, 4.0)
    expected = {name: torch.zeros_like(p) for name, p in m.named_parameters()}
    for index, ((x, flag), y) in enumerate(data):
        for n in range(N):
            m.calls, m.seen = index, m.seen.new_full((), index)
            loss = ce(m(x[n : n + 1], flag), y[n : n + 1]).sum()
            grads = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
            for total, gradient in zip(expected.values(), grads, strict=True):
                total += 0 if gradient is None else gradient.square() / (4 * N)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_layout_changes_are_measured_again():
    """[N, D] in the first batch, [T*N, D] in the next: T = 1 cannot tell T-major from N-major."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):  # [N, T, D]
            n, t, d = x.shape
            h = torch.tanh(self.fc(x.transpose(0, 1).reshape(t * n, d)))
            return self.head(h.view(t, n, -1).mean(0))

    m = Flat().double()
    data = [(torch.randn(N, t, 8).double(), torch.randint(0, 3, (N,))) for t in (1, 1, 4, 2)]
    from oracle import assert_close, fisher_loop

    assert_close(wplfast.fisher_diagonal(m, data, ce), fisher_loop(m, data, ce), 1e-11, 1e-12)


def test_embedding_rows_that_repeat_are_summed_before_squaring():
    embedding = nn.Embedding(3, 2)
    tokens = torch.tensor([[0, 0, 1], [2, 0, 2]])
    scale = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    with wplfast.FisherAccumulator(embedding) as acc:
        acc.backward((embedding(tokens) * scale).sum((1, 2)))
    # sample 0: token 0 gets 1 + 2, token 1 gets 3; sample 1: token 2 gets 1 + 3, token 0 gets 2
    assert acc.result()["weight"].tolist() == [[6.5, 6.5], [4.5, 4.5], [8.0, 8.0]]


def test_functional_linear_bound_early_is_seen():
    from torch.nn.functional import linear

    w = torch.randn(3, 8, requires_grad=True)

    class Holder(nn.Module):
        def forward(self, x):
            return linear(x, w)

    (x, y) = batch()[0]
    fisher = wplfast.fisher_diagonal(Holder(), [(x, y)], ce, params={"w": w})
    layer = nn.Linear(8, 3, bias=False)
    layer.weight.data = w.detach().clone()
    torch.testing.assert_close(fisher["w"], wplfast.fisher_diagonal(layer, [(x, y)], ce)["weight"])
    assert type(w) is torch.Tensor
    assert F.linear(x, w).requires_grad


def test_calls_that_draw_random_numbers_draw_the_same_ones_again():
    """Dropout inside the RNN kernel, against one-hot backward passes through one native forward pass."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    m, x, y = Model().double().train(), torch.randn(N, T, 8).double(), torch.randint(0, 3, (N,))
    torch.manual_seed(5)
    losses = ce(m(x), y)
    expected = {name: torch.zeros_like(p) for name, p in m.named_parameters()}
    for loss in losses:
        grads = torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)
        for total, g in zip(expected.values(), grads, strict=True):
            total += g.square() / N
    torch.manual_seed(5)
    with wplfast.FisherAccumulator(m) as acc:
        acc.backward(ce(m(x), y))
    for name, e in expected.items():
        torch.testing.assert_close(acc.result()[name], e)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("size", [N, N + 1])
def test_cutting_a_call_into_samples_is_checked(size, zero):
    """A table of the batch's size stands beside the data: cutting it too would be wrong, even if w = 0 hides it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(8, size) * (not zero)), nn.Linear(8, 3)

        def forward(self, x):
            table = torch.arange(size * 8, dtype=x.dtype).view(size, 8).cos()
            return self.head(torch.tanh(torch.einsum("nd,ke,dk->ne", x, table, self.w)))

    from oracle import assert_close, fisher_loop

    m, data = Model().double(), [(torch.randn(N, 8).double(), torch.randint(0, 3, (N,)))]
    assert_close(wplfast.fisher_diagonal(m, data, ce), fisher_loop(m, data, ce), 1e-11, 1e-12)
