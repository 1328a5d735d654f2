"""What a batch may be: weights, containers, objects, streams."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batch_cases import Graph, X, Y, here
from fisher_cases import ce, mlp
from oracle import assert_close, fisher_loop
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import wplfast
from wplfast.fisher.batches import moved

NX, NY = X.cpu().numpy(), Y.cpu().numpy()

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


class Numbered(Dataset):
    """A dataset whose targets are numbers of Python."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        if index >= len(X):
            raise IndexError(index)
        return X[index], int(Y[index])


@pytest.mark.parametrize(
    "data", [TensorDataset(X, Y), Numbered(), Subset(TensorDataset(X, Y), range(3))], ids=lambda d: type(d).__name__
)
def test_a_dataset_in_the_place_of_a_loader(data):
    with pytest.raises(TypeError, match=r"is a \w+, which yields one sample after the other.*DataLoader\(dataset"):
        wplfast.fisher_diagonal(mlp(), data, ce)
    found = wplfast.fisher_diagonal(mlp(), DataLoader(data, batch_size=2), ce)
    assert found.n_samples == len(data)


class InBatches(Dataset):
    """A dataset of whole batches, which needs no loader."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index >= 2:
            raise IndexError(index)
        return X, Y


def test_a_dataset_of_batches():
    assert wplfast.fisher_diagonal(mlp(), InBatches(), ce).n_samples == 2 * len(X)
