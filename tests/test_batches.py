"""What a batch may be: weights, containers, objects, streams; no samples, no gradients, empty tensors."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fisher_cases import Decoder, ce, mlp, tokens
from oracle import assert_close, fisher_loop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import wplfast
from wplfast.fisher.batches import Batch, moved

X, Y = torch.randn(4, 6), torch.tensor([0, 3, 1, 2])
NX, NY = X.cpu().numpy(), Y.cpu().numpy()


def here(tensor):
    """Move what a loader yields to where the models are."""
    return tensor.to(torch.empty(0).device)


# ---- a third element ---------------------------------------------------------------------------------------

READINGS = r"weights, which must .*(task id|second view)"


@pytest.mark.parametrize(
    ("third", "error"),
    [
        (torch.arange(4), TypeError),
        (torch.ones(4, dtype=torch.bool), TypeError),
        (torch.arange(4, dtype=torch.uint8), TypeError),
        (torch.ones(4, dtype=torch.complex64), TypeError),
        (torch.tensor(3), TypeError),
        (np.arange(4), TypeError),
        (np.array(["a"] * 4), TypeError),
        ([0, 1, 2, 3], TypeError),
        ((1, 1, 1, 1), TypeError),
        (["a.png", "b.png", "c.png", "d.png"], TypeError),
        ("task", TypeError),
        (7, TypeError),
        ({"id": torch.arange(4)}, TypeError),
        ([torch.ones(4), torch.ones(4)], TypeError),
        (torch.randn(4, 3, 8, 8), ValueError),
        (torch.rand(4, 1), ValueError),
        (torch.tensor(0.5), ValueError),
        (np.ones((4, 6), dtype=np.float32), ValueError),
    ],
)
@pytest.mark.parametrize("unpack", [None, tuple])
def test_a_third_element_that_is_no_weights(third, error, unpack):
    with pytest.raises(error, match=READINGS) as caught:
        wplfast.fisher_diagonal(mlp(), [(X, Y, third)], ce, unpack=unpack)
    assert ("unpack=lambda b: b[:2]" if unpack is None else "let unpack return (inputs, targets) alone") in str(caught)
    fisher = wplfast.fisher_diagonal(mlp(), [(X, Y, third)], ce, unpack=lambda b: b[:2])
    assert fisher.total_weight == 4


@pytest.mark.parametrize(
    "give",
    [
        lambda w: w,
        lambda w: w.float(),
        lambda w: w.cpu().numpy(),
        lambda w: w.tolist(),
        lambda w: tuple(w.tolist()),
        lambda w: list(w.cpu().numpy()),
        lambda w: w.cpu().numpy()[::-1].copy()[::-1],
    ],
)
def test_weights_of_any_kind(give):
    model, w = mlp().double(), torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    fisher = wplfast.fisher_diagonal(model, [(X.double(), Y, give(w))], ce)
    kept = [(X[i : i + 1].double(), Y[i : i + 1]) for i in range(4)]
    singles = [wplfast.fisher_diagonal(model, [one], ce).flat for one in kept]
    expected = sum(weight * single for weight, single in zip(w, singles, strict=True)) / w.sum()
    torch.testing.assert_close(fisher.flat, expected)
    assert wplfast.fisher_diagonal(model, [(*kept[0], None)], ce).total_weight == 1


def test_weights_of_another_number():
    with pytest.raises(ValueError, match=r"weights must have shape \[4\] as losses, got \[3\].*drop it with unpack="):
        wplfast.fisher_diagonal(mlp(), [(X, Y, torch.ones(3))], ce)


def test_an_accumulator_takes_weights_as_they_are_given():
    model, losses = mlp(), []
    for weights in (torch.tensor([1, 0, 2, 1]), [1, 0, 2, 1], np.array([1.0, 0.0, 2.0, 1.0])):
        with wplfast.FisherAccumulator(model) as acc:
            acc.backward(ce(model(here(X)), here(Y)), weights)
        losses.append(acc.result().flat)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


# ---- containers and objects --------------------------------------------------------------------------------


class Encoding(collections.UserDict):
    """A tokenizer's output: a mapping that is no dict, and moves itself in place."""

    def to(self, device):
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


class Graph:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Graph(self.x.to(device), self.y.to(device))


@dataclasses.dataclass(frozen=True)
class Labels:
    y: torch.Tensor
    name: str = "task"


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class OfDict(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.x if isinstance(x, Graph) else x)


def expected(model):
    return fisher_loop(model, [(here(X), here(Y))], ce)


@pytest.mark.parametrize(
    ("item", "options"),
    [
        ((NX, NY), {}),
        ([NX[::-1], NY[::-1]], {}),
        ((NX.astype(">f4"), NY.astype(">i8")), {}),
        ((np.broadcast_to(NX, (4, 6)), NY), {}),
        ((X, Y.tolist()), {}),
        ((X, tuple(Y.tolist())), {}),
        ((X, list(NY)), {}),
        ((X, list(NY.astype(np.int32))), {}),
        (Pair(X, Y), {}),
        (([X], Y), {}),
        (({"x": X}, Y), {}),
        ((collections.OrderedDict(x=X), Y), {}),
        ({"x": X, "labels": Y}, {}),
        ({"x": NX, "labels": Y.tolist()}, {}),
        (Encoding(x=X, labels=Y), {}),
        ((Encoding(x=X), Y), {}),
        ((X, Encoding(y=Y)), {"loss": lambda o, t: ce(o, t["y"])}),
        ((X, collections.OrderedDict(y=Y)), {"loss": lambda o, t: ce(o, t["y"])}),
        ((X, Labels(Y)), {"loss": lambda o, t: ce(o, t.y)}),
        ((X, Pair(X, Y)), {"loss": lambda o, t: ce(o, t.y)}),
        (Graph(X, Y), {"unpack": lambda g: (g, g.y)}),
        ((Graph(X, Y), Y), {}),
        ({"x": X, "y": Y}, {"unpack": lambda b: ({"x": b["x"]}, b["y"])}),
    ],
)
def test_batches_of_any_form(item, options):
    model = OfDict(mlp())
    options = dict(options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = wplfast.fisher_diagonal(model, [item], options.pop("loss", ce), **options)
    assert fisher.n_samples == 4
    assert_close(fisher, expected(model))


def test_all_tensors_of_a_batch_are_moved():
    """On a device without memory, so that what stays behind shows."""
    meta = torch.device("meta")
    encoding, graph, labels = Encoding(y=Y), Graph(X, Y), Labels(Y)
    tree = {
        "list": [X, {"c": Y}, (X, [Y])],
        "named": Pair(X, Y),
        "ordered": collections.OrderedDict(y=Y),
        "array": NX,
        "scalar": np.float32(2),
        "paths": np.array(["a", "b"]),
        "encoding": encoding,
        "graph": graph,
        "labels": labels,
        "rest": ("a", None, 3, Labels, torch.Size([2])),
        "default": collections.defaultdict(list, y=Y),
    }
    got = moved(tree, meta)
    found = [got["list"][0], got["list"][1]["c"], got["list"][2][1][0], got["named"].x, got["ordered"]["y"]]
    found += [got["array"], got["scalar"], got["encoding"]["y"], got["graph"].x, got["labels"].y, got["default"]["y"]]
    assert all(t.device == meta for t in found)
    assert got["rest"] == tree["rest"]
    assert got["paths"] is tree["paths"]
    assert [type(got[name]) for name in tree if name not in ("array", "scalar")] == [
        type(tree[name]) for name in tree if name not in ("array", "scalar")
    ]
    assert isinstance(got["rest"][-1], torch.Size)
    # The caller's are left as they were.
    assert {t.device.type for t in (encoding["y"], graph.x, labels.y, tree["ordered"]["y"])} == {Y.device.type}
    assert got["labels"].name == "task"


def test_packed_sequences_are_one_argument():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.rnn(x)[1][0])

    model, x = Last().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    sequence = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3] * 4, device="cpu"), batch_first=True)
    assert moved(sequence, torch.device("cpu")).batch_sizes.device.type == "cpu"
    fisher = wplfast.fisher_diagonal(model, [(sequence, Y)], ce)
    assert_close(fisher, fisher_loop(model, [(x, here(Y))], ce), rtol=1e-9, model_rtol=1e-9)


def test_lists_that_zip():
    """Detection: a list of dicts as targets."""
    model = mlp().double()
    data = [(X.double(), [{"c": c, "path": "a"} for c in Y])]

    def loss(outputs, targets):
        return torch.stack([F.cross_entropy(p, t["c"]) for p, t in zip(outputs, targets, strict=False)])

    fisher = wplfast.fisher_diagonal(model, data, loss, verify=False)
    assert_close(fisher, fisher_loop(model, [(here(X).double(), here(Y))], ce), rtol=1e-9, model_rtol=1e-9)


def test_lists_of_images_are_positional():
    with pytest.raises(
        TypeError, match=r"a list of 4: .*passed as 4 positional arguments.*unpack=lambda b: \(\(b\[0\],"
    ):
        wplfast.fisher_diagonal(mlp(), [(list(X), Y)], ce)

    def own(_):
        raise TypeError("the model's own")

    model = mlp()
    model[0].register_forward_pre_hook(lambda *_: own(None))
    with pytest.raises(TypeError, match="the model's own"):
        wplfast.fisher_diagonal(model, [((X,), Y)], ce)


@pytest.mark.parametrize("item", [{"x": X, "label": Y}, Encoding(x=X, label=Y), Graph(X, Y), X, (X,), "a path", None])
def test_forms_that_need_unpack(item):
    with pytest.raises(TypeError, match=r"a dict with 'labels', got .*; pass unpack= for any other form, for example"):
        wplfast.fisher_diagonal(mlp(), [item], ce)


# ---- streams -----------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """A stream of samples that knows its length, does not, or errs."""

    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        return iter([(x, int(y)) for x, y in zip(X.cpu(), Y.cpu(), strict=True)] * 3)

    def __len__(self):
        if self.length is None:
            raise TypeError("a stream has no length")
        return self.length


class Unsized:
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter([(X, Y)] * 3)

    def __len__(self):
        if isinstance(self.length, Exception):
            raise self.length
        return self.length


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(Stream(), 5),
        lambda: DataLoader(Stream(2), 5),
        lambda: DataLoader(Stream(100), 5),
        lambda: ((X, Y) for _ in range(3)),
        lambda: iter([(X, Y)] * 3),
        lambda: map(tuple, [[X, Y]] * 3),
        lambda: Unsized(NotImplementedError()),
        lambda: Unsized(RuntimeError("no")),
        lambda: Unsized(1),
        lambda: Unsized(10**9),
        lambda: Unsized(-1),
        lambda: Unsized(2.5),
    ],
)
def test_streams_of_any_length(data, progress):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = wplfast.fisher_diagonal(model, data(), ce, progress=progress)
    assert fisher.n_samples == 12
    assert_close(fisher, expected(model))


# ---- no samples, no gradients ------------------------------------------------------------------------------

NONE = (X[:0], Y[:0])


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"fisher_type": "exact"}, {"fisher_type": "mc"}, {"samples": "losses"}])
def test_batches_without_samples_count_nothing(where, options):
    model = nn.Sequential(mlp(), nn.Unflatten(1, (2, 2)), Folds())
    data = [(X, Y), (X[:3], Y[:3])]
    with_empty = [*data[:where], NONE, *data[where:]]
    fisher = wplfast.fisher_diagonal(model, with_empty, ce, with_grad=True, **options)
    same = wplfast.fisher_diagonal(model, data, ce, with_grad=True, **options)
    assert fisher.n_samples == same.n_samples == 7
    torch.testing.assert_close(fisher.flat, same.flat)
    with pytest.raises(ValueError, match="data is empty"):
        wplfast.fisher_diagonal(model, [NONE], ce, **options)


class Folds(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)  # which PyTorch refuses for no samples


@pytest.mark.parametrize(
    ("inputs", "targets", "empty"),
    [
        (X[:0], Y[:0], True),
        (X[:0], None, True),
        ({"x": X[:0]}, [], True),
        ((), [], True),
        ((torch.zeros(5, 0, 3),), Y[:0], True),  # time first
        (Graph(X[:0], Y[:0]), Y[:0], True),
        (X, Y, False),
        (torch.zeros(4, 0), Y, False),
        (torch.zeros(4, 0), torch.zeros(4, 0), False),
        (X, None, False),
        ((), None, False),
        (X, [], False),
        (Graph(X, Y), None, False),
        ({"state": torch.zeros(0, 3), "x": X}, Y, False),
        ({"state": torch.zeros(0, 3), "x": X}, {"y": Y}, False),
        (X, [{"boxes": torch.zeros(0, 4)}] * 4, False),
        (Graph(X, Y), [{"boxes": torch.zeros(0, 4)}] * 4, False),
        (X[:0], {"y": Y[:0]}, True),
        (torch.zeros(4, 0), {"y": torch.zeros(4, 0)}, False),
        (X[:0], {"y": Y[:0], "scale": torch.tensor(2.0)}, True),
    ],
)
def test_which_batches_hold_no_sample(inputs, targets, empty):
    assert Batch(inputs, targets, None).is_empty is empty


class Routed(nn.Module):
    """Samples go to an expert; that of negative ones is frozen, or no parameter at all."""

    def __init__(self):
        super().__init__()
        self.frozen, self.expert = nn.Linear(6, 4), mlp()
        self.frozen.requires_grad_(False)

    def forward(self, x):
        expert = self.expert if bool(x[0, 0] > 0) else self.frozen
        return expert(x)


@pytest.mark.parametrize("order", [(1, -1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize(
    "options", [{}, {"with_grad": True}, {"fisher_type": "mc", "mc_samples": 2}, {"verify": "always"}]
)
def test_batches_that_reach_no_parameter(order, options):
    model, data = Routed().double(), []
    for sign in order:
        x = torch.randn(4, 6, dtype=torch.float64)
        x[:, 0] = sign
        data.append((x, here(Y)))
    fisher = wplfast.fisher_diagonal(model, data, ce, **options)
    reached = [batch for batch, sign in zip(data, order, strict=True) if sign > 0]
    assert fisher.n_samples == 12
    if "fisher_type" not in options:
        share = len(reached) / 3
        want = {name: share * f for name, f in fisher_loop(model, reached, ce).items()}
        assert_close(fisher, want, rtol=1e-9, model_rtol=1e-9)
        weighted = [
            (*batch, torch.full((4,), 2.0 if sign > 0 else 6.0)) for batch, sign in zip(data, order, strict=True)
        ]
        total = sum(2.0 if sign > 0 else 6.0 for sign in order)
        want = {name: f * 2 / total * 3 / share * share for name, f in want.items()}
        assert_close(wplfast.fisher_diagonal(model, weighted, ce, **options), want, rtol=1e-9, model_rtol=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_batches_whose_losses_are_constant(first):
    """A loss that returns zeros where no target counts."""
    model = mlp().double()
    x, y = here(X).double(), here(Y)
    data = [(x, y), (x + 1, torch.full_like(y, -100)), (x - 1, y)]
    data = [data[1], data[0], data[2]] if first else data

    def loss(outputs, targets):
        return ce(outputs, targets) if bool((targets >= 0).any()) else torch.zeros(len(targets), dtype=outputs.dtype)

    fisher = wplfast.fisher_diagonal(model, data, loss)
    assert fisher.n_samples == 12
    assert_close(fisher, fisher_loop(model, data, ce), rtol=1e-9, model_rtol=1e-9)
    with wplfast.FisherAccumulator(model) as acc:
        for x, y in data:
            acc.backward(loss(model(x), y))
        assert torch.equal(acc.result().flat, fisher.flat)


def test_losses_without_a_graph_in_all_batches(caplog):
    model = mlp()

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        @torch.no_grad()
        def forward(self, x):
            return self.model(x)

    with pytest.raises(ValueError, match="those of no batch do: was the model run under no_grad"):
        wplfast.fisher_diagonal(Blind(), [(X, Y)] * 3, ce)
    assert [r.message for r in caplog.records if "gradients of zero" in r.message] == [caplog.records[0].message]
    with wplfast.FisherAccumulator(model) as acc:
        acc.backward(ce(model(here(X)), here(Y)).detach())
        with pytest.raises(ValueError, match="those of no batch do"):
            acc.result()
        acc.backward(ce(model(here(X)), here(Y)))
        assert acc.result().n_samples == 8


def test_losses_that_reach_parameters_of_the_loss_alone():
    model, scale = mlp().double(), torch.ones((), dtype=torch.float64, requires_grad=True)
    x, y = here(X).double(), here(Y)

    def loss(outputs, targets):
        reached = targets.dtype == torch.int64
        return ce(outputs, targets) if reached else scale * outputs.detach().square().sum(1)

    fisher = wplfast.fisher_diagonal(model, [(x, y.int()), (x, y)], loss)
    assert fisher.n_samples == 8
    want = {name: f / 2 for name, f in fisher_loop(model, [(x, y)], ce).items()}
    assert_close(fisher, want, rtol=1e-9, model_rtol=1e-9)
    assert scale.grad is None


# ---- empty tensors -----------------------------------------------------------------------------------------


class Of(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x):
        return self.function(self, x)


def beside(function, **parts):
    """An empty or short part beside a layer that gets a gradient."""
    return Of(
        lambda m, x: torch.cat([m.layer(x).flatten(1), function(m, x).flatten(1)], 1),
        layer=nn.Linear(3, 2),
        **parts,
    )


EMPTY = {
    "no features": lambda: nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)),
    "no inputs": lambda: Of(lambda m, x: m.linear(x[..., :0]).flatten(1), linear=nn.Linear(0, 2)),
    "no outputs": lambda: beside(lambda m, x: m.linear(x), linear=nn.Linear(3, 0)),
    "no rows": lambda: beside(lambda m, x: m.linear(x[:, :0]), linear=nn.Linear(3, 2)),
    "no rows of experts": lambda: Of(
        lambda m, x: m.a(x).sum(1).index_add(0, torch.zeros(0, dtype=torch.long), m.b(x[:, 0][x[:, 0, 0] > 99])),
        a=nn.Linear(3, 2),
        b=nn.Linear(3, 2),
    ),
    "matmul": lambda: Of(
        lambda m, x: (x @ m.u @ m.v + m.b).flatten(1), u=torch.randn(3, 0), v=torch.randn(0, 2), b=torch.randn(2)
    ),
    "low rank": lambda: Of(
        lambda m, x: F.linear(x, m.w + m.u @ m.v).flatten(1),
        w=torch.randn(2, 3),
        u=torch.randn(2, 0),
        v=torch.randn(0, 3),
    ),
    "einsum": lambda: Of(
        lambda m, x: (torch.einsum("ntk,kd->ntd", torch.einsum("ntd,dk->ntk", x, m.u), m.v) + m.b).flatten(1),
        u=torch.randn(3, 0),
        v=torch.randn(0, 2),
        b=torch.randn(2),
    ),
    "bmm": lambda: beside(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=torch.randn(4, 3, 0)),
    "scale and shift": lambda: beside(lambda m, x: x[..., :0] * m.w + m.b, w=torch.randn(0), b=torch.randn(0)),
    "layer norm": lambda: beside(lambda m, x: m.norm(x[..., :0]), norm=nn.LayerNorm(0)),
    "layer norm of no rows": lambda: beside(lambda m, x: m.norm(x[:, :0]), norm=nn.LayerNorm(3)),
    "embedding": lambda: beside(lambda m, x: m.table((x[..., 0] > 0).long()), table=nn.Embedding(2, 0)),
    "embedding of nothing": lambda: beside(lambda m, x: m.table((x[:, :0, 0] > 0).long()), table=nn.Embedding(2, 3)),
    "embedding without rows": lambda: beside(lambda m, x: m.table((x[:, :0, 0] > 0).long()), table=nn.Embedding(0, 3)),
    "positions": lambda: beside(lambda m, x: x[:, :0] + m.table(torch.arange(0)), table=nn.Embedding(2, 3)),
    "conv": lambda: beside(lambda m, x: m.conv(x.transpose(1, 2)[:, :0]), conv=nn.Conv1d(0, 2, 1)),
    "attention": lambda: beside(
        lambda m, x: m.block(x[:, :0]), block=nn.TransformerEncoderLayer(3, 1, 4, batch_first=True)
    ),
    "no tokens": lambda: Of(
        lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), m.layer(x)], 1).flatten(1),
        t=torch.randn(1, 0, 2),
        layer=nn.Linear(3, 2),
    ),
    "tied": lambda: Of(
        lambda m, x: F.linear(F.linear(x, m.w), m.w.t()).flatten(1) + F.linear(x, m.v).flatten(1),
        w=torch.randn(0, 3),
        v=torch.randn(3, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("n_samples", [3, 1])
def test_empty_tensors(name, n_samples):
    model = EMPTY[name]().double().eval()
    x = torch.randn(n_samples, 4, 3, dtype=torch.float64)
    y = torch.zeros(n_samples, dtype=torch.long)
    loss = lambda o, _: (o - 1).square().flatten(1).sum(1)  # noqa: E731
    for options in ({}, {"with_grad": True}, {"verify": "always"}):
        fisher = wplfast.fisher_diagonal(model, [(x, y)] * 3, loss, **options)
        assert_close(fisher, fisher_loop(model, [(x, y)], loss), rtol=1e-9, model_rtol=1e-9)


@pytest.mark.parametrize("lengths", [(3, 0, 3, 0, 5), (0, 3, 3, 0)])
def test_sequences_of_no_tokens(lengths):
    model = Decoder(width=16).double()
    data = [tokens(4, t) for t in lengths]
    fisher = wplfast.fisher_diagonal(model, data, ce)
    assert fisher.n_samples == 4 * len(lengths)
    assert_close(fisher, fisher_loop(model, data, ce), rtol=1e-9, model_rtol=1e-9)
