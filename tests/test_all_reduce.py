"""Fishers of several ranks: merged by name, once, or the same error on all of them and no rank that waits."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile

import pytest
import torch
import torch.distributed as dist
from fisher_cases import ce, mlp
from oracle import fisher_loop
from ranks import NEEDS_GLOO, launched

import wplfast
from wplfast import Fisher
from wplfast.errors import NameMismatchError, WplfastError

pytestmark = NEEDS_GLOO

RANKS = 3


def data(rank: int) -> list:
    """A part of the data of its own size for each rank."""
    generator = torch.Generator().manual_seed(rank)
    n = (5, 2, 4)[rank]
    return [(torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.arange(n) % 4)]


def model(dtype=torch.float64):
    """The same model on every rank."""
    torch.manual_seed(0)
    return mlp(dtype)


def own(rank: int, **options) -> Fisher:
    """The Fisher of a rank's own data."""
    return wplfast.fisher_diagonal(model(), data(rank), ce, **options)


def constant(value: float, n: int, names=("a", "b"), dtype=torch.float64, shape=(2,)) -> Fisher:
    """A Fisher of one value."""
    return Fisher({name: torch.full(shape, value, dtype=dtype) for name in names}, n)


# Every situation is a function of the rank that returns a Fisher, before it is reduced.


def plain(rank):
    return own(rank, with_grad=True)


def other_orders(rank):
    fisher = own(rank, with_grad=True)
    names = list(fisher)
    return fisher.select(names[rank:] + names[:rank])


def empty_zeros(rank):
    return own(rank, with_grad=True) if rank != 1 else Fisher.zeros(model())


def empty_nameless(rank):
    return own(rank) if rank != 0 else Fisher({}, 0)


def other_dtypes(rank):
    return constant(1.0 + rank, 1, dtype=(torch.float32, torch.float64, torch.bfloat16)[rank])


def gradients_on_some(rank):
    return own(rank, with_grad=rank != 2)


def strided(rank):
    tensor = torch.arange(12.0).view(4, 3).t()[:, ::2] if rank else torch.arange(12.0).view(4, 3).t()[:, ::2].clone()
    return Fisher({"w": tensor, "empty": torch.zeros(0, 3), "scalar": torch.tensor(float(rank))}, rank + 1)


def weighted(rank):
    return Fisher({"w": torch.tensor([1.0 + rank])}, 2, total_weight=(0.5, 0.0, 1.5)[rank])


def inference(rank):
    with torch.inference_mode():
        return Fisher({"w": torch.full((3,), 1.0 + rank)}, 1)


RIGHT = [
    plain, other_orders, empty_zeros, empty_nameless, other_dtypes, gradients_on_some, strided, weighted, inference
]  # fmt: skip


def other_sets(rank):
    return constant(1.0, 1, ("a", "b", "c") if rank == 2 else ("a", "b"))


def other_names(rank):
    return constant(1.0, 1).rename(lambda n: f"module.{n}") if rank == 1 else constant(1.0, 1)


def other_shapes(rank):
    return constant(1.0, 1, shape=(3,) if rank == 1 else (2,))


def nan_on_one(rank):
    return constant(float("nan") if rank == 1 else 1.0, 1)


def negative_on_one(rank):
    return constant(-1.0 if rank == 2 else 1.0, 1)


def all_empty(rank):
    return Fisher({}, 0) if rank else Fisher.zeros(model())


def samples_without_names(rank):
    return Fisher({}, 3) if rank == 1 else constant(1.0, 1)


def no_memory(rank):
    fisher = constant(1.0, 1)
    if rank == 1:
        fisher._tensors["a"] = NoMemory(fisher["a"])
    return fisher


class NoMemory(torch.Tensor):
    """A tensor that cannot be read on this rank."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("aminmax", "reshape"):
            raise torch.OutOfMemoryError("no memory here")
        return super().__torch_function__(func, types, args, kwargs or {})


def reduced_on_one(rank):
    fisher = constant(1.0, 1)
    fisher.reduced = rank == 2
    return fisher


WRONG = {
    other_sets: (NameMismatchError, ("rank 0 alone has []", "rank 2 alone ['c']")),
    other_names: (NameMismatchError, ("rank 0 alone has ['a', 'b']", "rank 1 alone ['module.a', 'module.b']")),
    other_shapes: (ValueError, ("[2] on rank 0, [3] on rank 1",)),
    nan_on_one: (ValueError, ("rank 1", "'a'", "nan")),
    negative_on_one: (ValueError, ("rank 2", "'a'", "not negative")),
    all_empty: (ValueError, ("at least one of the 3 ranks must have samples",)),
    samples_without_names: (ValueError, ("0 samples", "rank 1")),
    no_memory: (WplfastError, ("rank 1", "no memory here")),
    reduced_on_one: (WplfastError, ("rank 2 was reduced already",)),
}


def copies(fisher: Fisher) -> dict[str, Fisher]:
    """Everything that is made of a Fisher."""
    with tempfile.TemporaryDirectory() as folder:
        fisher.save(os.path.join(folder, "f"))
        loaded = Fisher.load(os.path.join(folder, "f"))
    return {
        "itself": fisher,
        "to": fisher.to(torch.float32),
        "select": fisher.select(list(fisher)[:1]),
        "rename": fisher.rename(lambda n: f"x.{n}"),
        "sum": fisher + fisher.to(torch.float32),
        "sum with a part": constant(1.0, 1) + fisher,
        "copy": copy.copy(fisher),
        "deepcopy": copy.deepcopy(fisher),
        "pickle": pickle.loads(pickle.dumps(fisher)),
        "file": loaded,
    }


def all_situations(rank: int, n_ranks: int) -> dict[str, object]:
    """Run all of them on each rank; return what came of them, by name."""
    found: dict[str, object] = {}
    for situation in RIGHT:
        fisher = situation(rank)
        assert fisher.all_reduce_() is fisher
        assert fisher.reduced
        found[situation.__name__] = fisher
    for situation in WRONG:
        fisher = situation(rank)
        before = {name: tensor.detach().clone() for name, tensor in fisher.items() if type(tensor) is torch.Tensor}
        try:
            fisher.all_reduce_()
            found[situation.__name__] = None
        except (WplfastError, ValueError) as error:
            untouched = all(torch.equal(fisher[n], t) or bool(t.isnan().any()) for n, t in before.items())
            found[situation.__name__] = (
                type(error),
                str(error),
                untouched and list(before) == list(fisher)[-len(before) :],
            )
    for name, fisher in copies(constant(1.0 + rank, 1).all_reduce_()).items():
        try:
            fisher.all_reduce_()
            found[name] = None
        except WplfastError as error:
            found[name] = str(error)
    pair = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="not in it"):
            constant(1.0, 1).all_reduce_(pair)
    else:
        found["pair"] = constant(1.0 + rank, 1 + rank).all_reduce_(pair)
    alone = dist.new_group([1])
    if rank == 1:
        found["alone"] = constant(3.0, 2).all_reduce_(alone)
    from wplfast.distributed import reduce

    reduce.BUCKET = 8  # every tensor travels alone
    found["small buckets"] = own(rank, with_grad=True).all_reduce_()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every rank found."""
    ranks = launched(RANKS, [all_situations], tmp_path_factory.mktemp("ranks"))
    return [found["all_situations"].get() for found in ranks]


def expected(ranks) -> dict[str, torch.Tensor]:
    """The loop over samples of these ranks' data."""
    return fisher_loop(model(), [batch for rank in ranks for batch in data(rank)], ce)


@pytest.mark.parametrize("situation", ["plain", "other_orders", "gradients_on_some", "small buckets"])
def test_all_samples_count_once(outcomes, situation):
    right = expected(range(RANKS))
    for found in outcomes:
        assert found[situation].n_samples == 11
        assert found[situation].total_weight == 11.0
        for name, tensor in right.items():
            torch.testing.assert_close(found[situation][name], tensor, rtol=1e-10, atol=1e-14)
        assert torch.equal(found[situation]["0.weight"], outcomes[0][situation]["0.weight"])  # the same bits everywhere


def test_names_keep_their_order_on_each_rank(outcomes):
    names = list(outcomes[0]["plain"])
    for rank, found in enumerate(outcomes):
        assert list(found["other_orders"]) == names[rank:] + names[:rank]


def test_mean_gradients(outcomes):
    whole = wplfast.fisher_diagonal(model(), [b for rank in range(RANKS) for b in data(rank)], ce, with_grad=True)
    for found in outcomes:
        for situation in ("plain", "other_orders", "small buckets"):
            for name, tensor in whole.mean_grad.items():
                torch.testing.assert_close(found[situation].mean_grad[name], tensor, rtol=1e-10, atol=1e-12)
        assert found["gradients_on_some"].mean_grad is None


def test_a_rank_without_data(outcomes):
    for situation, ranks in (("empty_zeros", (0, 2)), ("empty_nameless", (1, 2))):
        right = expected(ranks)
        for found in outcomes:
            assert found[situation].n_samples == sum(len(data(rank)[0][1]) for rank in ranks)
            for name, tensor in right.items():
                torch.testing.assert_close(found[situation][name], tensor, rtol=1e-10, atol=1e-14)
    assert outcomes[1]["empty_zeros"].mean_grad is not None


def test_dtypes_stay(outcomes):
    for found, dtype in zip(outcomes, (torch.float32, torch.float64, torch.bfloat16), strict=True):
        assert found["other_dtypes"]["a"].dtype == dtype
        torch.testing.assert_close(found["other_dtypes"]["a"], torch.full((2,), 2.0, dtype=dtype))


def test_forms(outcomes):
    whole = torch.arange(12.0).view(4, 3).t()[:, ::2]
    for found in outcomes:
        torch.testing.assert_close(found["strided"]["w"], whole)
        assert found["strided"]["empty"].shape == (0, 3)
        torch.testing.assert_close(found["strided"]["scalar"], torch.tensor((0 + 2 * 1 + 3 * 2) / 6))
        torch.testing.assert_close(found["weighted"]["w"], torch.tensor([(0.5 * 1 + 1.5 * 3) / 2]))
        assert (found["weighted"].n_samples, found["weighted"].total_weight) == (6, 2.0)
        torch.testing.assert_close(found["inference"]["w"], torch.full((3,), 2.0))


def test_groups(outcomes):
    for rank in (0, 2):
        torch.testing.assert_close(outcomes[rank]["pair"]["a"], torch.full((2,), (1 + 9) / 4, dtype=torch.float64))
        assert outcomes[rank]["pair"].n_samples == 4
    assert outcomes[1]["alone"].n_samples == 2


@pytest.mark.parametrize("situation", WRONG, ids=lambda f: f.__name__)
def test_errors_are_the_same_on_all_ranks(outcomes, situation):
    kind, texts = WRONG[situation]
    for found in outcomes:
        assert found[situation.__name__] is not None, "no error"
        got, text, untouched = found[situation.__name__]
        assert issubclass(got, kind)
        assert all(part in text for part in texts), text
        assert text == outcomes[0][situation.__name__][1]
        assert untouched


@pytest.mark.parametrize(
    "made", ["itself", "to", "select", "rename", "sum", "sum with a part", "copy", "deepcopy", "pickle", "file"]
)
def test_once(outcomes, made):
    for found in outcomes:
        assert found[made] is not None, "reduced twice"
        assert "was reduced already" in found[made]


def test_without_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        constant(1.0, 1).all_reduce_()


def test_zeros():
    zeros = Fisher.zeros(model(), with_grad=True)
    whole = wplfast.fisher_diagonal(m := model(), data(0), ce)
    assert (zeros.n_samples, zeros.total_weight, zeros.reduced) == (0, 0.0, False)
    assert {n: (t.shape, t.dtype) for n, t in zeros.items()} == {n: (t.shape, t.dtype) for n, t in whole.items()}
    assert zeros.mean_grad.keys() == zeros.keys()
    assert Fisher.zeros(m).names_of(list(m.parameters())) == dict(enumerate(whole))
    torch.testing.assert_close(dict(Fisher.zeros(m) + whole), dict(whole))
