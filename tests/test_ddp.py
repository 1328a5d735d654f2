"""A Fisher of several ranks, of a model in DistributedDataParallel: what one process finds in all data, to float64."""

from __future__ import annotations

import copy

import ddp_cases as cases
import ddp_training as training
import pytest
import torch
from fisher_cases import ce
from oracle import assert_close, fisher_loop
from ranks import NEEDS_GLOO, launched

import wplfast

pytestmark = NEEDS_GLOO


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of 2 ranks found."""
    return launched(2, [*cases.SITUATIONS[2], *training.SITUATIONS], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each of 4 ranks found."""
    return launched(4, cases.SITUATIONS[4], tmp_path_factory.mktemp("four"))


@pytest.fixture(params=["two", "four"])
def ranks(request):
    """What each of 2 or 4 ranks found."""
    return request.getfixturevalue(request.param)


def everything(ranks, *more):
    return [batch for rank in range(len(ranks)) for batch in cases.data(rank, *more)]


def joined(batches):
    """All samples, in order."""
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def loop(batches, model=None):
    return fisher_loop(cases.model() if model is None else model, [(x, y) for x, y, *_ in batches], ce)


def close(found, expected):
    assert_close(found, expected, rtol=1e-12, model_rtol=1e-12)


def of_all(ranks, situation):
    """Each rank's value; F has the same bits on all."""
    found = [outcomes[situation].get() for outcomes in ranks]
    for one in found:
        assert one["reduced"]
        assert one["F"].keys() == found[0]["F"].keys()
        assert all(torch.equal(f, found[0]["F"][name]) for name, f in one["F"].items())
        assert one["n"] == found[0]["n"]
    return found


@pytest.mark.parametrize("situation", cases.OF_ALL_DATA, ids=lambda f: f.__name__)
def test_all_samples_of_both_ranks(two, situation):
    test_all_samples_of_all_ranks(two, situation.__name__)


@pytest.mark.parametrize("situation", ["wrapped", "inner_module", "accumulated"])
def test_all_samples_of_all_ranks(ranks, situation):
    for found in of_all(ranks, situation):
        assert list(found["F"]) == [name for name, _ in cases.model().named_parameters()]
        close(found["F"], loop(everything(ranks)))
        assert found["n"] == found["weight"] == sum(map(sum, cases.SIZES[: len(ranks)]))


@pytest.mark.parametrize("situation", ["wrapped", "inner_module", "weighted"])
def test_mean_gradients_and_weights(ranks, situation):
    batches = everything(ranks, "weights") if situation == "weighted" else everything(ranks)
    whole = wplfast.fisher_diagonal(cases.model(), [joined(batches)], ce, with_grad=True)
    for found in of_all(ranks, situation):
        close(found["F"], dict(whole))
        close(found["grad"], whole.mean_grad)
        assert found["weight"] == pytest.approx(whole.total_weight, rel=1e-15)


def test_max_samples_counts_those_of_all_ranks(ranks):
    """In the order of batches, then of ranks."""
    parts = [cases.data(rank) for rank in range(len(ranks))]
    rounds = [part[i] for i in range(3) for part in parts if i < len(part)]
    x, y = joined(rounds)
    for index, most in enumerate((1, 4, 6, 8, 1000)):
        for outcomes in ranks:
            found = outcomes["max_samples"].get()[index]
            assert found["n"] == min(most, len(y))
            close(found["F"], loop([(x[:most], y[:most])]))


def test_left_out_samples(ranks):
    rest = [batch for rank in range(len(ranks)) for batch in cases.data(rank)[1 if rank == 1 else 0 :]]
    for rank, found in enumerate(of_all(ranks, "skipped")):
        close(found["F"], loop(rest))
        assert found["skipped"] == (cases.SIZES[1][0] if rank == 1 else 0)


def test_left_out_samples_make_room(two):
    for found in of_all(two, "max_samples_skipping"):  # the first batch of rank 0 took all three places of its round
        close(found["F"], loop([cases.data(0)[1]]))
        assert found["n"] == 2


def test_exact(two):
    whole = wplfast.fisher_diagonal(cases.model(), [joined(everything(two))], ce, fisher_type="exact")
    for found in of_all(two, "exact"):
        close(found["F"], dict(whole))


def test_own_fishers(two):
    for rank, outcomes in enumerate(two):
        for situation in ("not_reduced", "plain"):
            found = outcomes[situation].get()
            close(found["F"], loop(cases.data(rank)))
            assert not found["reduced"]
        lines = [line for line in outcomes["plain"].log if "reduce=True" in line]
        assert len(lines) == 1  # of two calls
        assert not outcomes["not_reduced"].log


def test_draws(two):
    """Each rank has its own; the same seeds draw the same again."""
    found = [outcomes["drawn"].get() for outcomes in two]
    names = list(found[0][0][0])
    means = {name: sum(own[0][name] for own, _, _ in found) / len(found) for name in names}
    for (first, again, alone), one, other in found:
        assert all(torch.equal(first[name], again[name]) for name in names)
        assert all(torch.equal(alone[name], found[0][0][0][name]) for name in names)  # as one process
        assert all(torch.equal(one["F"][name], other["F"][name]) for name in names)
        close(one["F"], means)
    assert not torch.equal(found[0][0][0]["0.weight"], found[1][0][0]["0.weight"])


def test_constant_losses_of_one_rank(two):
    share = sum(cases.SIZES[0])
    for found in of_all(two, "constants_on_one"):
        expected = loop(cases.data(0))
        close(found["F"], {name: f * share / (share + sum(cases.SIZES[1])) for name, f in expected.items()})


def test_the_group_of_the_model(ranks):
    for rank, outcomes in enumerate(ranks):
        first = rank // 2 * 2
        close(outcomes["pairs"].get()["F"], loop([*cases.data(first), *cases.data(first + 1)]))


def normed(buffers):
    model = cases.Normed().eval()
    model.load_state_dict(buffers, strict=False)
    return model


def test_buffers(ranks):
    """F is of one model, with the buffers of rank 0, which every forward pass of the wrapper would take, too."""
    first = ranks[0]["buffers"].get()[1]
    for rank, outcomes in enumerate(ranks):
        found, before, same, training = outcomes["buffers"].get()
        assert rank == 0 or not torch.equal(before["1.running_mean"], first["1.running_mean"])
        close(found["F"], loop(everything(ranks), normed(first)))
        assert same
        assert training


def test_buffers_of_each_rank(two):
    """A wrapper that broadcasts no buffers has a model on each rank."""
    parts = [loop(cases.data(rank), normed(o["own_buffers"].get()[1])) for rank, o in enumerate(two)]
    counts = [sum(cases.SIZES[rank]) for rank in range(2)]
    expected = {n: sum(c * part[n] for c, part in zip(counts, parts, strict=True)) / sum(counts) for n in parts[0]}
    for outcomes in two:
        close(outcomes["own_buffers"].get()[0]["F"], expected)


@pytest.mark.parametrize("options", cases.OPTIONS)
def test_training_goes_on(two, options):
    """Whatever the wrapper is at when a pass comes: its hooks, buckets and gradients are as they were."""
    first = two[0]["steps_around"].get()[options][0]
    assert not torch.equal(first[0], cases.model()[0].weight)
    for outcomes in two:
        for kept in outcomes["steps_around"].get()[options]:
            assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))


ELEVEN = loop([cases.ELEVEN.tensors])


@pytest.mark.parametrize("how", ["False 0", "False 1", "True 0", "True 1", "plain", "limited"])
def test_repeats_of_distributed_sampler(ranks, how):
    for outcomes in ranks:
        found = outcomes["padded"].get()[how]
        close(found["F"], ELEVEN)
        assert found["n"] == 11


def test_repeats_count_if_asked_to(ranks):
    for outcomes in ranks:
        found = outcomes["padded"].get()
        assert found["counted"]["n"] == 12
        with pytest.raises(AssertionError):
            close(found["counted"]["F"], ELEVEN)
        close(found["two"]["F"], loop([cases.ELEVEN[:2]]))
        assert found["two"]["n"] == 2


def test_repeats_that_cannot_be_told(two):
    for outcomes in two:
        text = outcomes["padded_and_collated"].error
        assert "a batch of 2 has 3 losses" in text
        assert "drop_last=True" in text
    assert "rank 1 failed with ValueError" in two[0]["padded_and_collated"].error


@pytest.mark.parametrize("how", ["False 0", "False 1", "True 0", "True 1", "SizedStream"])
def test_repeats_of_accelerate(two, how):
    for outcomes in two:
        found = outcomes["prepared"].get()[how]
        close(found["F"], ELEVEN)
        assert found["n"] == 11


def test_repeats_of_accelerate_that_count_or_are_errors(two):
    for outcomes in two:
        found = outcomes["prepared"].get()
        assert found["False rows"] > 11
        assert found["True rows"] > 11
        assert "without its length" in found["Stream"]
        assert "dispatch_batches=False" in found["dispatched"]


def test_reduce_needs_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        wplfast.fisher_diagonal(cases.model(), cases.data(0), ce, reduce=True)
    whole = wplfast.fisher_diagonal(copy.deepcopy(cases.model()), cases.data(0), ce, reduce=False)
    close(whole, loop(cases.data(0)))


# ---- training with a penalty -----------------------------------------------------------------------------------------


class Reference:
    """One process, with the penalty written out."""

    def __init__(self, batches, offset=0.0):
        self.model, self.fisher = cases.model(), loop(batches)
        self.anchors = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        with torch.no_grad():
            for p in self.model.parameters():
                p += offset

    def penalty(self):
        moved = ((name, p - self.anchors[name]) for name, p in self.model.named_parameters())
        return training.ALPHA / 2 * sum((self.fisher[name] * d.square()).sum() for name, d in moved)

    def step(self, optimizer, batches):
        loss = sum(ce(self.model(x), y).mean() for x, y in batches) / len(batches) + self.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def values(self):
        return {name: p.detach() for name, p in self.model.named_parameters()}


def trained_alone(optimizer):
    reference = Reference([*cases.data(0), *cases.data(1)], offset=0.1)
    optimizer = optimizer(reference.model.parameters())
    for step in range(training.STEPS):
        reference.step(optimizer, [cases.batch(4, 100 * step + rank) for rank in range(2)])
    return reference


@pytest.mark.parametrize("how", ["loss", "gradient", "attached", "views"])
def test_training_with_a_penalty(two, how):
    reference = trained_alone(training.sgd)
    for outcomes in two:
        found, names, value = outcomes["penalised"].get()[how]
        assert names == list(reference.anchors)
        close(found, reference.values())
        assert value == pytest.approx(reference.penalty().item(), rel=1e-12)


@pytest.mark.parametrize("how", ["gradient", "attached"])
def test_training_with_a_sharded_optimizer(two, how):
    """ZeRO-1 and 2 keep whole parameters on every rank, and work as DistributedDataParallel does."""
    expected = trained_alone(training.adam).values()
    for outcomes in two:
        whole, sharded = outcomes["sharded_optimizer"].get()[how]
        for name, value in expected.items():
            torch.testing.assert_close(whole[0][name], value, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(sharded[0][name], value, rtol=1e-9, atol=1e-12)


def test_training_with_accelerate(two):
    x, y = training.SIXTEEN.tensors
    reference = Reference([(x, y)])
    optimizer = training.sgd(reference.model.parameters())
    epochs = []
    for _ in range(2):
        for first in (0, 8):
            reference.step(optimizer, [(x[first : first + 8], y[first : first + 8])])
        epochs.append({name: p.clone() for name, p in reference.values().items()})
    for outcomes in two:
        found = outcomes["accelerated"].get()
        assert found["kind"] == "DistributedDataParallel"
        assert found["n"] == 16
        close(found["first"], epochs[0])
        close(found["second"], epochs[1])
        assert found["restored"]
        close(found["again"], epochs[1])
