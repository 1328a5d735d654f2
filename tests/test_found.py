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
