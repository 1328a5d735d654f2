"""What reviews and fuzzing found: each of these was once silently wrong, or refused, or crashed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from rehearsal import rehearsable
from torch import nn
from zoo import C, D, Lambda, classify, head, par

import wplfast
from wplfast.errors import WplfastError


def compare(model, data, params=None):
    """Compare with the loop in float64."""
    torch.manual_seed(0)
    model = model.double()
    data = [(x.double(), y) for x, y in data]
    fisher = wplfast.fisher_diagonal(model, data, classify)
    assert_close(fisher, fisher_loop(model, data, classify), rtol=1e-10, model_rtol=1e-11)
    return fisher


def rows(*sizes):
    return [(torch.randn(n, D), torch.randint(0, C, (n,))) for n in sizes]


def sequences(*sizes):
    return [(torch.randn(n, t, D), torch.randint(0, C, (n,))) for n, t in sizes]


VIEWS = {
    "tied autoencoder": lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t()),
    "both sides": lambda m, x: x @ m.w + x @ m.w.t(),
    "first row, expanded": lambda m, x: F.linear(x, m.w[:1].expand(D, D)),
    "sliding rows": lambda m, x: F.linear(x, m.w.reshape(-1)[: 2 * D - 1].unfold(0, D, 1)),
    "self-overlap that fills its extent": lambda m, x: F.linear(
        x[:, :3], m.w.view(-1).as_strided((3, 3), (2, 2))
    ).repeat(1, 2),
    "transposed scale": lambda m, x: (x.unsqueeze(-1) * m.w.t() + torch.tanh(x).unsqueeze(-1) * m.w).sum(-1),
    "a copy beside itself": lambda m, x: F.linear(x, m.w.t().contiguous().clone()) + F.linear(x, m.w),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_square_matrices(name):
    torch.manual_seed(1)
    compare(Lambda(lambda m, x: m.head(torch.tanh(VIEWS[name](m, x))), w=par(D, D), head=head()), rows(5, 5, 3))


@pytest.mark.parametrize("sizes", [[(4, 4), (4, 4), (5, 5), (6, 6)], [(4, 4), (5, 5)], [(20, 20), (24, 24)]], ids=str)
def test_a_loop_over_samples_with_as_many_steps(sizes):
    torch.manual_seed(2)

    def forward(m, x):
        return m.head(torch.stack([torch.tanh(m.fc(row)) for row in x])[:, -1] + m.fc(x[:, 0]))

    compare(Lambda(forward, fc=nn.Linear(D, D), head=head()), sequences(*sizes))


@pytest.mark.parametrize(
    "lengths", [[(3, 3, 3, 3), (3, 3, 3, 3), (2, 4, 3, 3)], [(4, 4), (4, 4), (4, 4), (3, 5)]], ids=str
)
def test_samples_of_varying_length_one_after_another(lengths):
    torch.manual_seed(3)

    def forward(m, x):
        lens = x[:, 0, 0].long().tolist()
        flat = torch.cat([row[:length] for row, length in zip(x, lens, strict=True)])
        return m.head(torch.stack([part.mean(0) for part in torch.tanh(m.fc(flat)).split(lens)]))

    data = sequences(*((len(lens), 6) for lens in lengths))
    for (x, _), lens in zip(data, lengths, strict=True):
        x[:, 0, 0] = torch.tensor(lens).float()
    compare(Lambda(forward, fc=nn.Linear(D, D), head=head()), data)


def test_padding_that_is_taken_out_only_where_there_is_some():
    torch.manual_seed(4)

    def forward(m, x):
        mask = x[..., 0] < 10
        if mask.all():
            return m.head(torch.tanh(m.fc(x.reshape(-1, D))).view_as(x).mean(1))
        kept = torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), torch.tanh(m.fc(x[mask])))
        return m.head(kept.mean(1))

    data = sequences((4, 4), (4, 4), (4, 8))
    for row, length in enumerate((8, 4, 2, 2)):
        data[2][0][row, length:, 0] = 20
    compare(Lambda(forward, fc=nn.Linear(D, D), head=head()), data)


def test_another_split_of_as_many_rows():
    torch.manual_seed(5)

    def forward(m, x):
        n, h, w, d = x.shape
        flat = torch.tanh(m.fc(x.permute(1, 0, 2, 3).reshape(h * n * w, d)))
        return m.head(flat.view(h, n, w, d).mean((0, 2)))

    shapes = [(2, 4), (2, 4), (2, 4), (4, 2)]
    data = [(torch.randn(3, h, w, D), torch.randint(0, C, (3,))) for h, w in shapes]
    compare(Lambda(forward, fc=nn.Linear(D, D), head=head()), data)


def test_two_known_layouts_that_fit():
    torch.manual_seed(6)

    def forward(m, x):
        if x.shape[1] % 2 == 0:
            return m.head(torch.tanh(m.fc(x.transpose(0, 1))).mean(0))
        return m.head(torch.tanh(m.fc(x)).mean(1))

    compare(Lambda(forward, fc=nn.Linear(D, D), head=head()), sequences((3, 5), (3, 4), (4, 4), (4, 4), (5, 5)))


def test_a_table_without_samples_in_some_batches_only():
    torch.manual_seed(7)

    def forward(m, x):
        h = torch.tanh(m.enc(x))
        if x.shape[1] > 4:
            h = h + torch.tanh(m.fc(torch.linspace(0, 1, x.shape[1] * D).to(x).view(-1, D)))
        h = h + torch.tanh(m.fc(h)) + 0.1 * x
        return m.head((h * x).mean(1))

    model = Lambda(forward, enc=nn.Linear(D, D), fc=nn.Linear(D, D), head=head())
    compare(model, sequences((4, 5), (4, 5), (4, 4), (4, 4)))


def test_a_site_that_was_dormant_turns_out_to_be_without_samples():
    torch.manual_seed(12)

    def forward(m, x):
        h = x + m.positions(torch.arange(x.shape[1]))
        return m.head(
            torch.tanh(m.fc(torch.cat([m.token.expand(len(x), -1, -1), h * h], 1)))[:, : 2 if len(h[0]) > 1 else 1].sum(
                1
            )
        )

    model = Lambda(forward, positions=nn.Embedding(9, D), token=par(1, 1, D), fc=nn.Linear(D, D), head=head())
    compare(model, sequences((1, 6), (2, 1), (2, 6), (3, 3), (5, 4)))


def test_a_gru_leaves_its_bias_alone():
    torch.manual_seed(8)
    model = Lambda(
        lambda m, x: m.head(m.g(x, m.h)[0][:, -1]), g=nn.GRU(D, D, batch_first=True), h=par(1, 1, D), head=head()
    )
    before = [p.detach().clone() for p in model.parameters()]
    compare(model, sequences((1, 1), (1, 1)))
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), value.double())


@pytest.mark.parametrize("swap", [False, True])
def test_rsub_with_alpha(swap):
    torch.manual_seed(9)

    def forward(m, x):
        pair = (m.p, m.fc(x)) if swap else (m.fc(x), m.p)
        return m.head(torch.tanh(torch.rsub(*pair, alpha=2)))

    compare(Lambda(forward, fc=nn.Linear(D, D), p=par(D), head=head()), rows(1, 4, 4))


def test_coupling_is_seen_after_a_batch_of_one():
    torch.manual_seed(10)

    def forward(m, x):
        h = m.fc(x)
        return m.head(h + (h - h.detach()) * h.detach().mean(0) * 3)

    model = Lambda(forward, fc=nn.Linear(D, D), head=head())
    with pytest.raises(WplfastError):
        wplfast.fisher_diagonal(model, rows(1, 5), classify)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[0].zero_(),
        lambda c: c.diagonal().exp_(),
        lambda c: c.view(-1)[:2].mul_(3),
    ],
)
def test_writing_into_views_of_derived_tensors_is_an_error(change):
    def forward(m, x):
        c = m.w.clone()
        change(c)
        return m.head(torch.tanh(F.linear(x, c)))

    model = Lambda(forward, w=par(D, D), head=head())
    with wplfast.FisherAccumulator(model) as acc, pytest.raises(WplfastError, match="out-of-place"):
        acc.backward(classify(model(torch.randn(4, D)), torch.randint(0, C, (4,))))


SEEN = {
    "a vector as weight": lambda m, x: x * torch.tanh(F.linear(x, m.w[0])).unsqueeze(-1),
    "sparse data": lambda m, x: x.to_sparse() @ m.w + torch.sparse.mm(x.to_sparse(), m.w),
    "a broadcast letter": lambda m, x: torch.einsum("nd,dk->nk", x[:, :1], m.w),
    "data cast like a parameter": lambda m, x: (x @ m.w).type_as(m.w).mul_(2).view_as(x @ m.w),
    "straight through, twice": lambda m, x: x @ (m.w.detach() + (m.w.detach() + m.w - m.w.detach()) - m.w.detach()),
    "normalised by its own norm": lambda m, x: x @ (m.w / m.w.detach().norm(dim=1, keepdim=True)),
    "fft convolution": lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.w[0]), n=D),
}


@pytest.mark.parametrize(
    "name", rehearsable(SEEN, {"fft convolution": "Fourier transforms", "sparse data": "sparse tensors"})
)
def test_what_was_refused(name):
    torch.manual_seed(11)
    model = Lambda(lambda m, x: m.head(torch.tanh(SEEN[name](m, x))), w=par(D, D), head=head())
    compare(model, rows(1, 4, 4, 2))


def test_an_argument_that_was_none():
    torch.manual_seed(13)
    model = Lambda(
        lambda m, x: m.head(
            torch.tanh(
                F.linear(
                    torch.tanh(m.fc(x)),
                    m.w,
                    x.mean(1, keepdim=True)[:1, 0] * 0 + m.w.detach()[0] if x[0, 0] > 0 else None,
                )
            )
        ),
        fc=nn.Linear(D, D),
        w=par(D, D),
        head=head(),
    )
    data = rows(5, 5, 5, 5)
    for index, (x, _) in enumerate(data):
        x[:, 0] = 1.0 if index == 3 else -1.0
    compare(model, data)


def flip(x):
    return x.transpose(0, 1).contiguous()


def times_constant(m, x, way):
    """The first layer's output times a constant: on its right, or on its left where steps come first."""
    n, t, d = x.shape
    y = torch.tanh(m.fc(flip(x) if way else x))
    return ((m.left @ y.reshape(t, n * d)) if way else (y.reshape(n, t * d) @ m.right)).view(n, -1)


#: name -> what a batch does in way 0 and in way 1, on x [4, 4, D]: the same nodes, between which rows lie otherwise
TWO_WAYS = {
    "a constant on either side": times_constant,
    "broadcasting": lambda m, x, way: (
        ((m.fc(m.table) + x) if way else (m.fc(x[:, 0]) + x[:, 1])).square().sum(-1).view(4, -1).sum(1, keepdim=True)
        * 0.1
    ).expand(4, D),
    "strides": lambda m, x, way: (
        torch.tanh(m.fc(flip(x) if way else x)).as_strided((4, 4, D), (D, 4 * D, 1) if way else (4 * D, D, 1)).sum(1)
    ),
    "rolled": lambda m, x, way: m.fc(torch.tanh(m.fc(flip(x))).roll(way, 1).sum(0)),
}


@pytest.mark.cpu_only("draws in float64")
@pytest.mark.parametrize("name", TWO_WAYS)
def test_the_same_nodes_about_other_rows(name):
    torch.manual_seed(14)
    model = Lambda(lambda m, x, way: m.head(TWO_WAYS[name](m, x, way)), fc=nn.Linear(D, D), head=head()).double()
    model.left, model.right = torch.rand(1, 4).double(), torch.rand(4 * D, D).double()
    model.table = torch.rand(4, D).double()
    data = [((torch.randn(4, 4, D).double(), way), torch.randint(0, C, (4,))) for way in (0, 0, 0, 1, 0)]
    with wplfast.FisherAccumulator(model, independent=True) as acc:
        for (x, way), targets in data:
            acc.backward(classify(model(x, way), targets))
    assert_close(acc.result(), sum_over_graph(model, data), rtol=1e-10, model_rtol=1e-11)


def sum_over_graph(model, data):
    """The mean square of every loss's gradient, from the graph of the whole batch."""
    parameters, count = dict(model.named_parameters()), 0
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets in data:
        for loss in classify(model(*inputs), targets):
            count += 1
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                total += gradient.square()
    return {name: total / count for name, total in found.items()}


class Recomputed(torch.autograd.Function):
    """A checkpoint of one's own."""

    @staticmethod
    def forward(ctx, x, layer, used):
        ctx.save_for_backward(x)
        ctx.layer, ctx.used = layer, used
        with torch.no_grad():
            return torch.tanh(layer(x) if used else x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = torch.tanh(ctx.layer(x) if ctx.used else x)
        y.backward(gradient)
        return x.grad, None, None


def test_a_use_inside_a_backward_pass_that_comes_late_is_an_error():
    torch.manual_seed(15)
    model = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
    with wplfast.FisherAccumulator(model, independent=True) as acc:
        for _ in range(3):
            acc.backward(Recomputed.apply(model[1](torch.randn(4, D)), model[0], False).square().sum(1))
        with pytest.raises(WplfastError, match="inside a backward pass"):
            acc.backward(Recomputed.apply(model[1](torch.randn(4, D)), model[0], True).square().sum(1))


def test_the_graph_is_described_without_running_checkpoints():
    torch.manual_seed(16)
    model, runs = nn.Linear(D, D), []

    def part(h):
        runs.append(1)
        return torch.tanh(model(h)).gather(1, torch.arange(D).flip(0).expand(len(h), D)).exp()

    def run(backward):
        runs.clear()
        for _ in range(3):
            h = model(torch.randn(4, D))
            backward(torch.utils.checkpoint.checkpoint(part, h, use_reentrant=False).square().sum(1))
        return len(runs)

    with wplfast.FisherAccumulator(model, verify=False, independent=True) as acc:
        found, passes = run(acc.backward), acc._accumulators.n_passes
    assert found == 3 + passes


def test_data_do_not_take_the_memory_of_a_buffer_that_was_replaced():
    model = nn.Linear(64, 64)
    model.register_buffer("state", torch.zeros(50, 64))
    with wplfast.FisherAccumulator(model) as acc:
        before, kept = model.state.data_ptr(), []
        model.state = torch.zeros(1)
        for _ in range(1000):
            kept.append(torch.randn(50, 64))
            if kept[-1].data_ptr() == before:
                break
        acc.backward(model(kept[-1]).square().sum(1))
    assert acc.result().report.rules["weight"] == ("linear",)


def test_a_buffer_of_any_strides_is_a_constant():
    torch.manual_seed(17)
    model = nn.Linear(D, D)
    model.register_buffer("table", torch.randn(2, 6, D).transpose(0, 1))
    with wplfast.FisherAccumulator(model) as acc:
        for n in (2, 3, 6):
            acc.backward((model(torch.randn(n, D)) + model(model.table).mean((0, 1))).square().sum(1))
    assert acc.n_samples == 11


def test_what_is_kept_of_steady_batches_is_bounded(monkeypatch):
    monkeypatch.setattr("wplfast.capture.trace.call_cache.MAX_ENTRIES", 100)
    model = nn.Linear(D, D)
    with wplfast.FisherAccumulator(model, independent=True) as acc:
        for t in range(60):
            acc.backward(torch.tanh(model(torch.randn(2, 1 + t, D))).square().sum((1, 2)))
        cache = acc._session.interception.cache
        assert len(cache._start.after) < 30


@pytest.mark.filterwarnings("ignore:left out")
def test_a_batch_that_overflows_verifies_nothing():
    model = nn.Linear(D, D)
    with wplfast.FisherAccumulator(model, on_nonfinite="skip") as acc:
        acc.backward(model(torch.randn(3, D)).sum(1) * 1e30)
        assert acc.n_skipped == 3
        assert not acc._session._is_verified
        acc.backward(model(torch.randn(3, D)).sum(1))
        assert acc._session._is_verified


def test_buffers_that_are_inference_tensors():
    torch.manual_seed(18)
    with torch.inference_mode():
        offset = torch.ones(D)
    model = Lambda(lambda m, x: m.head(torch.tanh(m.fc(x + offset))), fc=nn.Linear(D, D), head=head())
    model.register_buffer("offset", offset)
    data = rows(4, 4, 2)
    fisher = wplfast.fisher_diagonal(model, data, classify)
    assert_close(fisher, fisher_loop(model, data, classify))


class Signs(torch.autograd.Function):
    """Straight through, which nothing sees from outside."""

    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


BESIDE = {
    "a weight out of a Function": lambda m, x: F.linear(x, Signs.apply(m.w), m.b),
    "one for steps": lambda m, x: torch.tanh(F.linear(torch.stack([x, 2 * x], 1), Signs.apply(m.w), m.b)).sum(1),
    "a product that is added to": lambda m, x: torch.addmm(m.b, x, Signs.apply(m.w).t()),
    "a weight straight through": lambda m, x: F.linear(x, m.w + (m.w.sign() - m.w).detach(), m.b),
    "a masked one": lambda m, x: F.linear(x, torch.where(m.pos > 0, m.w, 0), m.b),
    "another use": lambda m, x: F.linear(x, Signs.apply(m.w), m.b) + F.linear(x, m.w, m.b.tanh()),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_plain_bias_is_fast_whatever_the_weight_beside_it_is(name):
    torch.manual_seed(21)
    model = Lambda(lambda m, x: m.head(torch.tanh(BESIDE[name](m, x))), w=par(D, D), b=par(D), head=head())
    model.register_buffer("pos", torch.randn(D, D))
    fisher = compare(model, rows(4, 4, 1, 3))
    assert not {"generic", "masked", "one by one"} & set(fisher.report.rules["b"])
