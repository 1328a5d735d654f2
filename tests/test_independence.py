"""Whether samples depend on each other through their inputs alone: proven, or said to be unchecked; never a guess."""

import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wplfast
from wplfast.errors import CoupledSamplesError

ce, fd = wplfast.losses.cross_entropy, wplfast.fisher_diagonal
N = 5


class Net(nn.Module):
    """A linear layer, and a function that says what is done with it."""

    def __init__(self, function, width=3):
        super().__init__()
        self.function, self.linear = function, nn.Linear(width, 2)
        self.step, self.hidden = 0, None
        self.register_buffer("scale", torch.ones(width))
        self.double()

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def some(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


X, Y = some(N, 3), torch.tensor([0, 1, 1, 0, 1])
LENGTHS = torch.tensor([1, 2, 4, 2, 3])
MASK = torch.arange(4)[None] < LENGTHS[:, None]


def loop(model, batches, loss_fn):
    """The Fisher over batches of one sample: a list of (arguments, targets)."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, targets in batches:
        losses = loss_fn(model(*inputs), targets)
        for f, g in zip(total.values(), torch.autograd.grad(losses.sum(), list(model.parameters())), strict=True):
            f += g**2 / len(batches)
    return total


def check(fisher, expected):
    for name, f in expected.items():
        torch.testing.assert_close(fisher[name], f, rtol=1e-9, atol=1e-12)


def with_maximum(sample):
    x = some(N, 3).clamp(-2, 2)
    x[sample, 1] = 9.0
    return x


def by_longest(net, x, mask):
    lengths = mask.sum(1)
    h = net.linear(x + (torch.arange(x.shape[1]) / lengths.max())[None, :, None].to(x))
    return (h * mask[..., None]).sum(1) / lengths[:, None]


COUPLED = {
    "centred": (lambda net, x: net.linear(x - x.mean(0)), X),
    "scaled by a deviation": (lambda net, x: net.linear(x / x.std(0)), X),
    "softmax over the batch": (lambda net, x: net.linear(x.softmax(0)), X),
    "ranks": (lambda net, x: net.linear(x.argsort(0).double()), X),
    "cumulated": (lambda net, x: net.linear(x.cumsum(0)), X),
    "neighbours": (lambda net, x: net.linear(x + x.roll(1, 0)), X),
    "two inputs": (lambda net, x, z: net.linear(x - x.mean(0)) + z, (X, some(N, 2))),
    "beside a table": (lambda net, x, t: net.linear(x - x.mean(0)) + t, (X, some(2))),
    "time first": (lambda net, x: net.linear(x - x.mean(1, keepdim=True)).mean(0), some(4, N, 3)),
    "list of samples": (lambda net, x: net.linear(torch.stack(x) - torch.stack(x).mean(0)), (list(X),)),
    "longest": (by_longest, (some(N, 4, 3), MASK)),
    "longest by name": (by_longest, {"x": some(N, 4, 3), "mask": MASK}),
    **{f"maximum in {k}": (lambda net, x: net.linear(x / x.abs().max()), with_maximum(k)) for k in range(N)},
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupling_through_inputs_is_an_error(name):
    function, inputs = COUPLED[name]
    with pytest.raises(CoupledSamplesError, match="another one in a batch of its own"):
        fd(Net(function), [(inputs, Y)], ce)


@pytest.mark.parametrize("sample", range(N))
def test_coupling_in_a_later_batch_is_an_error_where_all_are_verified(sample):
    net = Net(lambda net, x: net.linear(x / x.abs().max() if len(x) == N else x))
    data = [(some(4, 3), Y[:4]), (some(6, 3), Y[[0, 1, 2, 3, 4, 4]]), (with_maximum(sample), Y)]
    fd(net, data, ce)  # beyond notice
    with pytest.raises(CoupledSamplesError):
        fd(net, data, ce, verify="always")


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, y: ce(o, y) / len(y),
        lambda o, y: ce(o, y) - ce(o, y).detach().mean(),
        lambda o, y: ce(o, y) * F.one_hot(y, 2).double().mean(0)[y],  # weights of classes from their share of the batch
        lambda o, y: F.cross_entropy(o, y, reduction="none") / y.sum(),
    ],
)
def test_losses_that_the_batch_enters_are_an_error(loss_fn):
    with pytest.raises(CoupledSamplesError):
        fd(Net(lambda net, x: net.linear(x)), [(X, Y)], loss_fn)


@pytest.mark.parametrize(
    "together",
    [lambda x: x - x.mean(0), lambda x: x / x.abs().max(), lambda x: x.softmax(0)],
    ids=["centred", "scaled", "softmax"],
)
def test_the_users_word_counts(together):
    net = Net(lambda net, x: net.linear(together(x)))
    fisher = fd(net, [(X, Y)], ce, independent=True)
    given = together(X)
    ones = [((row[None],), y) for row, y in zip(given, Y.split(1), strict=True)]
    expected = loop(net.linear, ones, ce)
    check(fisher, {f"linear.{name}": f for name, f in expected.items()})
    assert fisher.report.unchecked == ()


# ---- a cut that is no cut -------------------------------------------------------------------------------------------

TABLE, IDS = some(N, 3), torch.tensor([0, 2, 2, 4, 1])
SUPPORT, LABELS = some(N, 3) + 1, torch.tensor([0, 1, 0, 0, 1])


def prototypes(net, support, labels, query):
    z = net.linear(support)
    return -(net.linear(query)[:, None] - torch.stack([z[labels == c].mean(0) for c in (0, 1)])).square().sum(-1)


SHARED = {
    "table": (lambda net, t, i: net.linear(t[i]), (TABLE, IDS), lambda k: (TABLE, IDS[k : k + 1])),
    "two tables": (
        lambda net, t, u, i: net.linear(t[i] + u[i]),
        (TABLE, TABLE.flip(0), IDS),
        lambda k: (TABLE, TABLE.flip(0), IDS[k : k + 1]),
    ),
    "episode": (prototypes, (SUPPORT, LABELS, X), lambda k: (SUPPORT, LABELS, X[k : k + 1])),
    "as many positions as samples": (
        lambda net, x, p: net.linear(x + p).mean(1),
        (some(N, N, 3), X),
        lambda k: (some(N, N, 3)[k : k + 1], X),
    ),
    "mask over positions": (
        lambda net, x, m: (m @ net.linear(x)).mean(1),
        (some(N, N, 3), some(N, N)),
        lambda k: (some(N, N, 3)[k : k + 1], some(N, N)),
    ),
    "as many features as samples": (
        lambda net, x: net.linear(x[:, :3]),
        some(N, N),
        lambda k: (some(N, N)[k : k + 1],),
    ),
    "list of samples": (
        lambda net, x: torch.stack([net.linear(part).mean(0) for part in x]),
        ([some(k, 3) for k in range(1, N + 1)],),
        lambda k: ([some(k + 1, 3)],),
    ),
    "list of as many layers": (
        lambda net, layers: net.linear(sum(layers)),
        ([some(N, 3) * k for k in range(N)],),
        lambda j: ([some(N, 3)[j : j + 1] * k for k in range(N)],),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_all_samples_share_is_no_coupling(name):
    function, inputs, one = SHARED[name]
    net = Net(function)
    check(fd(net, [(inputs, Y)], ce), loop(net, [(one(k), Y[k : k + 1]) for k in range(N)], ce))


TARGETS = {
    "dicts": (
        [{"class": y} for y in Y],
        lambda o, t: torch.stack([F.cross_entropy(p, d["class"]) for p, d in zip(o, t, strict=True)]),
    ),
    "pairs": (
        [(y, "name") for y in Y],
        lambda o, t: torch.stack([F.cross_entropy(p, y) for p, (y, _) in zip(o, t, strict=True)]),
    ),
    "strings": (["ab"[y] for y in Y], lambda o, t: ce(o, torch.tensor(["ab".index(c) for c in t]))),
    "tuple of strings": (tuple("ab"[y] for y in Y), lambda o, t: ce(o, torch.tensor(["ab".index(c) for c in t]))),
    "numbers": (Y.tolist(), lambda o, t: ce(o, torch.tensor(t))),
    "ragged": (
        [y.expand(k + 1) for k, y in enumerate(Y)],
        lambda o, t: torch.stack([F.cross_entropy(p, y[0]) for p, y in zip(o, t, strict=True)]),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_lists_of_targets(name):
    targets, loss_fn = TARGETS[name]
    net = Net(lambda net, x: net.linear(x))
    fisher = fd(net, [(X, targets)], loss_fn)
    assert fisher.report.unchecked == ()
    check(fisher, loop(net, [((X[k : k + 1],), targets[k : k + 1]) for k in range(N)], loss_fn))
    with pytest.raises(CoupledSamplesError):
        fd(Net(lambda net, x: net.linear(x - x.mean(0))), [(X, targets)], loss_fn)


def of_graphs(net, x, edges, owner):
    h = net.linear(x)
    h = torch.tanh(h.index_add(0, edges[1], h[edges[0]]))
    return h.new_zeros(int(owner.max()) + 1, 2).index_add(0, owner, h)


@pytest.mark.parametrize("n_graphs", [2, 3, 4])
def test_batches_of_graphs_cannot_be_cut_and_are_no_coupling(n_graphs, caplog):
    sizes = [2, 3, 2, 4][:n_graphs]
    starts = [sum(sizes[:k]) for k in range(n_graphs)]
    edges = [torch.tensor([[0, 1, 1], [1, 0, 1]])] * n_graphs
    x, owner = some(sum(sizes), 3), torch.repeat_interleave(torch.arange(n_graphs), torch.tensor(sizes))
    batch = x, torch.cat([e + s for e, s in zip(edges, starts, strict=True)], 1), owner
    net = Net(of_graphs)
    with caplog.at_level(logging.WARNING, "wplfast"):
        fisher = fd(net, [(batch, Y[:n_graphs])] * 3, ce)
    ones = [
        ((x[s : s + n], edges[0], owner[:n] * 0), y)
        for s, n, y in zip(starts, sizes, Y[:n_graphs].split(1), strict=True)
    ]
    check(fisher, loop(net, ones, ce))
    assert len(fisher.report.unchecked) == 1
    assert sum("not checked" in r.message for r in caplog.records) == 1


# ---- randomness and carried state in eval mode ----------------------------------------------------------------------

GENERATOR = torch.Generator()


def of_own_generator(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()


RANDOM = {
    "noise": lambda net, x: net.linear(x + torch.randn_like(x)),
    "dropout": lambda net, x: net.linear(F.dropout(x, 0.5, training=True)),
    "own generator": lambda net, x: net.linear(x + torch.randn(x.shape, generator=GENERATOR).double()),
    "generator with a seed": lambda net, x: net.linear(x + of_own_generator(x.shape)),
    "numpy": lambda net, x: net.linear(x + torch.from_numpy(np.random.randn(*x.shape))),
    "numpy with a seed": lambda net, x: net.linear(x + torch.from_numpy(np.random.RandomState(0).randn(*x.shape))),
    "random": lambda net, x: net.linear(x * random.random()),
    "diffusion": lambda net, x: net.linear(x + torch.randint(1, 9, (len(x), 1)) * torch.randn(x.shape).double()),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_in_eval_mode_are_no_coupling(name):
    fisher = fd(Net(RANDOM[name]), [(X, Y)] * 2, ce)
    assert fisher.n_samples == 2 * N
    assert len(fisher.report.unchecked) == 1


def test_random_numbers_are_those_of_a_pass_without_checks():
    net = Net(RANDOM["noise"])
    torch.manual_seed(0)
    expected = fd(net, [(X, Y)] * 3, ce, verify=False)
    torch.manual_seed(0)
    check(fd(net, [(X, Y)] * 3, ce), expected)


def counting(net, x):
    net.step += 1
    return net.linear(x * net.step)


def decaying(net, x):
    net.scale.mul_(0.5)
    return net.linear(x * net.scale)


def carrying(net, x):
    hidden = torch.zeros(len(x), 2).to(x) if net.hidden is None else net.hidden
    net.hidden = torch.tanh(net.linear(x) + hidden)
    return net.hidden if x.requires_grad else _detached(net)


def _detached(net):
    hidden, net.hidden = net.hidden, net.hidden.detach()
    return hidden


def replacing(net, x):
    net.scale = net.scale + 1
    return net.linear(x * net.scale)


@pytest.mark.parametrize("function", [counting, decaying, carrying, replacing])
def test_state_that_batches_leave_is_no_coupling(function):
    net = Net(function)
    fisher = fd(net, [(X, Y)] * 3, ce)
    assert fisher.report.unchecked == ()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for k in range(N):
        one = Net(function)
        one.linear.load_state_dict(net.linear.state_dict())
        for _ in range(3):
            loss = ce(one(X[k : k + 1]), Y[k : k + 1]).sum()
            for f, g in zip(expected.values(), torch.autograd.grad(loss, list(one.parameters())), strict=True):
                f += g**2 / (3 * N)
    check(fisher, expected)


def test_state_outside_of_the_modules_is_no_coupling():
    calls = []

    def counted(net, x):
        calls.append(len(x))
        return net.linear(x * len(calls))

    assert len(fd(Net(counted), [(X, Y)] * 2, ce).report.unchecked) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.linear(x.view(N, 3)),  # refuses batches of another size
        lambda net, x: net.linear(x * torch.arange(1, len(x) + 1)[:, None]),  # a sample's place counts
    ],
)
def test_what_cannot_be_checked_is_said_and_goes_on(function):
    net = Net(function)
    fisher = fd(net, [(X, Y)], ce)
    assert len(fisher.report.unchecked) == 1
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for loss in ce(net(X), Y):  # of the same batch, one after the other
        for f, g in zip(
            expected.values(), torch.autograd.grad(loss, list(net.parameters()), retain_graph=True), strict=True
        ):
            f += g**2 / N
    check(fisher, expected)


def test_modes_and_hooks_are_left_alone():
    net, seen = Net(counting), []
    net.linear.weight.register_hook(lambda g: seen.append("hook"))
    net.linear.weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    fd(net, [(X, Y)], ce)
    assert seen == []
    assert net.linear.weight.grad.eq(1).all()
    assert net.step == 1
    ce(net(X), Y).sum().backward()
    assert seen == ["hook", "after"]


class Padded(nn.Module):
    """Pools over as many tokens as the longest sample has: padding counts where another sample is longer."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 5, padding_idx=0), nn.Linear(5, 4)
        self.double()

    def forward(self, tokens):
        return self.linear(self.table(tokens[:, : (tokens != 0).sum(1).max()]).max(1)[0])


@pytest.mark.parametrize("longest", [0, 3, 10, 15])
@pytest.mark.parametrize("n_samples", [16, 40])
def test_what_one_sample_does_to_all_others_is_found(longest, n_samples):
    torch.manual_seed(n_samples)
    tokens = torch.randint(1, 9, (n_samples, 8))
    tokens[torch.arange(n_samples) != longest, 3:] = 0
    with pytest.raises(CoupledSamplesError):
        fd(Padded(), [(tokens, torch.randint(0, 4, (n_samples,)))], ce)


@pytest.mark.parametrize("labels", [torch.arange(3).repeat(2), torch.arange(2).repeat(3), torch.arange(3).repeat(4)])
def test_episodes_whose_labels_repeat(labels):
    def prototypes(net, support, labels, query):
        z = net.linear(support)
        n_ways = int(labels.max()) + 1
        return (
            -(net.linear(query)[:, None] - torch.stack([z[labels == c].mean(0) for c in range(n_ways)]))
            .square()
            .sum(-1)
        )

    net, n = Net(prototypes), len(labels)
    support, query, targets = some(n, 3) + 1, some(n, 3), torch.arange(n) % 2
    ones = [((support, labels, query[k : k + 1]), targets[k : k + 1]) for k in range(n)]
    check(fd(net, [((support, labels, query), targets)], ce), loop(net, ones, ce))


@pytest.mark.parametrize("layout", ["csr", "jagged"])
def test_tensors_that_cannot_be_cut_are_no_fault(layout):
    if layout == "csr":
        inputs = some(6, 3), torch.block_diag(*[some(1, 2)] * 3).to_sparse_csr()
        net = Net(lambda net, x, a: a @ net.linear(x))
    else:
        inputs = some(3, 3), torch.nested.nested_tensor([some(2, 3), some(1, 3), some(4, 3)], layout=torch.jagged)
        net = Net(lambda net, x, ragged: net.linear(x))
    fd(net, [(inputs, Y[:3])], ce)


def test_a_timeout_is_not_taken_for_a_batch_that_cannot_be_cut():
    def slow(net, x):
        if len(x) == 2:
            raise TimeoutError
        return net.linear(x)

    with pytest.raises(TimeoutError):
        fd(Net(slow), [(X, Y)], ce)


@pytest.mark.parametrize("n_samples", [2, 3, 5, 40])
def test_no_part_of_a_batch_runs_twice(n_samples):
    runs = []
    net = Net(lambda net, x: runs.append(x) or net.linear(x))
    fd(net, [(some(n_samples, 3), torch.zeros(n_samples, dtype=torch.int64))], ce)
    assert len({run.numpy().tobytes() for run in runs}) == len(runs)
    assert any(len(run) != n_samples and torch.equal(run[0], some(n_samples, 3)[-1]) for run in runs)


# ---- what is as long as the batch -----------------------------------------------------------------------------------


def frequencies(targets):
    return torch.bincount(targets, minlength=2).double().add(1).log()


VALUES = some(N, 4)[:, 0]
OF_LABELS = {
    "[N, 1] against [N]": (VALUES, lambda o, t: F.mse_loss(o[:, :1], t, reduction="none").mean(1)),
    "summed": (VALUES, lambda o, t: F.smooth_l1_loss(o[:, :1], t, reduction="none").sum(1)),
    "the mean label": (VALUES, lambda o, t: (o[:, 0] - t.mean()).square()),
    "the spread of labels": (VALUES, lambda o, t: o[:, 0].square() / t.var(correction=0)),
    "how often a label occurs": (Y, lambda o, t: ce(o + frequencies(t), t)),
    "a list of labels": (Y.tolist(), lambda o, t: ce(o + frequencies(torch.as_tensor(t)), torch.as_tensor(t))),
    "labels in a dictionary": ({"y": Y}, lambda o, t: ce(o + frequencies(t["y"]), t["y"])),
}


@pytest.mark.parametrize("verify", [True, "always"])
@pytest.mark.parametrize("name", OF_LABELS)
def test_samples_coupled_through_labels(name, verify):
    targets, loss_fn = OF_LABELS[name]
    with pytest.raises(CoupledSamplesError, match="samples are coupled"):
        fd(Net(lambda net, x: net.linear(x)), [(X, targets)] * 2, loss_fn, verify=verify)


COUPLED_INPUTS = {
    "averaged": lambda net, x, other: net.linear(x + other.mean(0)),
    "attended to": lambda net, x, other: net.linear((x @ other.t()).softmax(1) @ other),
    "centred": lambda net, x, other: net.linear(x * (other - other.mean(0))),
}


@pytest.mark.parametrize("name", COUPLED_INPUTS)
def test_a_second_input_that_couples_samples_shows_in_a_batch_of_another_size(name, caplog):
    """Until then it may be a table that all samples share, as long as the batch by chance: said, and gone on."""
    net, other = Net(COUPLED_INPUTS[name]), some(N, 3) + 1
    try:
        fisher = fd(net, [((X, other), Y)] * 3, ce)
    except CoupledSamplesError:
        assert name == "centred", "whose own rows matter: it is no table"
        return
    assert len(fisher.report.unchecked) == 1
    assert sum("as long as the batch" in record.message for record in caplog.records) == 1
    with pytest.raises(CoupledSamplesError, match="samples are coupled"):
        fd(net, [((X, other), Y), ((X[:3], other[:3]), Y[:3])], ce)


@pytest.mark.parametrize("sizes", [(N, N), (N, 3, N), (N, 1, 4)], ids=str)
def test_a_table_as_long_as_the_batch(sizes):
    table = some(N, 3)
    net = Net(lambda net, x, table: net.linear((x @ table.t()).softmax(1) @ table))
    fisher = fd(net, [((X[:n], table), Y[:n]) for n in sizes], ce)
    check(fisher, loop(net, [((X[k : k + 1], table), Y[k : k + 1]) for n in sizes for k in range(n)], ce))


def test_a_table_beside_the_labels():
    weights = torch.tensor([0.3, 2.0, 1.0, 0.5, 0.7]).double()
    net = Net(lambda net, x: net.linear(x))

    def loss_fn(outputs, targets):
        labels, of_labels = targets
        return ce(outputs, labels) * of_labels[labels] * of_labels.sum()

    check(
        fd(net, [(X, (Y, weights))], loss_fn),
        loop(net, [((X[k : k + 1],), (Y[k : k + 1], weights)) for k in range(N)], loss_fn),
    )
