"""Models around RNNs: what else may happen to the weights, the states and the outputs of one that is seen through."""

from __future__ import annotations

import pytest
import torch
from test_recurrent import C, D, H, batches, build, check, classify
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import Lambda, par

import wplfast

RNN = {"batch_first": True}


def head(width=H):
    return nn.Linear(width, C)


def in_place(m, x):
    out, _ = m.rnn(x)
    out.mul_(2)
    return m.head(out.tanh_().sum(1))


def learnt_states(m, x):
    n = len(x)
    hx = tuple(p.unsqueeze(1).expand(-1, n, -1).contiguous() for p in (m.h, m.c))
    return m.head(m.rnn(x, hx)[0].mean(1))


def carried_states(m, x):
    _, states = m.encoder(x[:, :2])
    return m.head(m.rnn(x[:, 2:], states)[0][:, -1])


def stacked_twice(m, x):
    return m.head(m.rnn(m.rnn(x)[0])[0].mean(1))


def checkpointed(reentrant):
    def forward(m, x):
        h = torch.tanh(m.inner(x))
        return m.head(checkpoint(lambda h: m.rnn(h)[0], h, use_reentrant=reentrant).mean(1))

    return forward


def decoder(m, x):
    states, outputs = (x.new_zeros(len(x), H), x.new_zeros(len(x), H)), []
    for t in range(x.shape[1]):
        states = m.rnn(x[:, t], states)
        outputs.append(states[0])
    return m.head(torch.stack(outputs, 1).mean(1))


def gru_decoder(m, x):
    h = m.start.expand(len(x), H)
    for t in range(x.shape[1]):
        h = m.rnn(x[:, t], h)
    return m.head(h)


def attended(m, x):
    """A sequence RNN over each sample's own rows as one long batch: [N K, T, D]."""
    out, _ = m.rnn(x.unsqueeze(2).expand(-1, -1, 2, -1).reshape(-1, 2, D))
    return m.head(out[:, -1].view(len(x), -1, H).mean(1))


def square(kind="lstm"):
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](D, D, batch_first=True)


MODELS = {
    "outputs changed in place": lambda: Lambda(in_place, rnn=build("lstm", **RNN), head=head()),
    "outputs of an rnn changed in place": lambda: Lambda(in_place, rnn=build("rnn_tanh", **RNN), head=head()),
    "learnt states": lambda: Lambda(learnt_states, rnn=build("lstm", **RNN), h=par(1, H), c=par(1, H), head=head()),
    "states of an encoder": lambda: Lambda(
        carried_states, encoder=build("lstm", **RNN), rnn=build("lstm", **RNN), head=head()
    ),
    "used twice": lambda: Lambda(stacked_twice, rnn=square(), head=head(D)),
    "checkpoint, reentrant": lambda: Lambda(
        checkpointed(True), inner=nn.Linear(D, D), rnn=build("gru", **RNN), head=head()
    ),
    "checkpoint, non-reentrant": lambda: Lambda(
        checkpointed(False), inner=nn.Linear(D, D), rnn=build("lstm", **RNN), head=head()
    ),
    "lstm cell": lambda: Lambda(decoder, rnn=nn.LSTMCell(D, H), head=head()),
    "gru cell, learnt start": lambda: Lambda(gru_decoder, rnn=nn.GRUCell(D, H), start=par(1, H), head=head()),
    "batch of parts of samples": lambda: Lambda(attended, rnn=build("gru", **RNN), head=head()),
}


@pytest.mark.parametrize("sizes", [[(5, 4), (2, 4)], [(4, 4), (4, 6), (3, 4)]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fisher_is_that_of_the_loop(name, sizes):
    rules = None if "learnt start" in name else "linear"
    check(MODELS[name]().double(), batches(sizes), rules=rules)


@pytest.mark.parametrize("weight", ["weight_hh_l0", "weight_ih_l0"])
def test_weight_norm(weight):
    rnn = torch.nn.utils.parametrizations.weight_norm(build("lstm", **RNN), weight)
    model = Lambda(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=rnn, head=head()).double()
    check(model, batches([(4, 4), (3, 5)]))


def test_a_table_of_positions_goes_through_an_rnn():
    """Its projections depend on parameters alone."""

    def forward(m, x):
        return m.head(torch.tanh(x + m.rnn(m.table(torch.arange(x.shape[1])).unsqueeze(0))[0]).mean(1))

    model = Lambda(forward, table=nn.Embedding(9, D), rnn=square(), head=head(D)).double()
    check(model, batches([(5, 4), (2, 4)]), rules=None)


def test_positions_that_are_data_go_through_an_rnn():
    def forward(m, x):
        position = torch.linspace(-1, 1, x.shape[1] * D, dtype=x.dtype).view(1, x.shape[1], D)
        return m.head(torch.tanh(x + m.rnn(position)[0]).mean(1))

    model = Lambda(forward, rnn=square("gru"), head=head(D)).double()
    check(model, batches([(5, 4), (2, 4)]), rules=None)


def test_dropout_between_layers():
    """Verified against ordinary autograd on the same graph: a loop would draw other masks."""
    rnn = build("lstm", num_layers=3, dropout=0.5, **RNN)
    model = Lambda(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=rnn, head=head()).double().train()
    fisher = wplfast.fisher_diagonal(model, batches([(5, 4), (3, 4)]), classify, train=True, verify="always")
    assert set().union(*fisher.report.rules.values()) == {"linear"}


def test_unbatched_sequences_one_at_a_time():
    """A model that runs samples one after another, as 2-D inputs."""
    model = Lambda(
        lambda m, x: m.head(torch.stack([m.rnn(one)[0].mean(0) for one in x])), rnn=build("gru"), head=head()
    ).double()
    check(model, batches([(3, 4), (3, 5)]), rules=None)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_float32(kind):
    """Large enough for oneDNN."""
    rnn = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}[kind](130, 130, 2, batch_first=True)
    model = Lambda(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=rnn, head=nn.Linear(130, C))
    data = [(torch.randn(n, 5, 130), torch.randint(0, C, (n,))) for n in (4, 3)]
    found = wplfast.fisher_diagonal(model, data, classify)
    wide = [(x.double(), y) for x, y in data]
    expected = wplfast.fisher_diagonal(model.double(), wide, classify)
    for name, value in expected.items():
        assert (found[name].double() - value).norm() <= 2e-5 * value.norm()


@pytest.mark.not_rehearsed("autocast")
def test_autocast_is_seen_through_in_float32(autocast_kind):
    rnn = nn.LSTM(D, H, batch_first=True)

    def forward(m, x):
        with torch.autocast(autocast_kind, torch.bfloat16):
            return m.head(m.rnn(x)[0].float().mean(1))

    model = Lambda(forward, rnn=rnn, head=head())
    data = [(x.float(), y) for x, y in batches([(4, 4), (3, 4)])]
    fisher = wplfast.fisher_diagonal(model, data, classify)
    assert fisher.report.rules["rnn.weight_hh_l0"] == ("linear",)
    model.forward = lambda x: model.head(model.rnn(x)[0].mean(1))
    for name, value in wplfast.fisher_diagonal(model, data, classify).items():
        assert (fisher[name] - value).norm() <= 2e-2 * value.norm()


def test_accumulated_in_a_loop_of_ones_own():
    model = Lambda(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=build("lstm", **RNN), head=head()).double()
    data = batches([(4, 4), (4, 6), (2, 3)])
    with wplfast.FisherAccumulator(model) as accumulator:
        for x, y in data:
            accumulator.backward(classify(model(x), y))
    whole = wplfast.fisher_diagonal(model, data, classify)
    for name, value in accumulator.result().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=0)
