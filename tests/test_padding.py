"""Samplers that repeat samples: without the repeats, all ranks together have each sample once; by brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from wplfast.distributed.padding import padding_of

GRID = list(product(range(1, 18), (2, 3, 4), (1, 2, 4, 6)))  # samples, ranks, batch size


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))

    def __len__(self):
        return self.n


def distributed(n, ranks, rank, size):
    sampler = DistributedSampler(range(n), ranks, rank, shuffle=True)
    sampler.set_epoch(3)
    return DataLoader(range(n), size, sampler=sampler)


def last_batch_dropped(n, ranks, rank, size):
    return DataLoader(range(n), size, sampler=DistributedSampler(range(n), ranks, rank), drop_last=True)


def lightning(n, ranks, rank, size):
    kind = pytest.importorskip("lightning.fabric.utilities.distributed").DistributedSamplerWrapper
    sampler = kind(RandomSampler(range(n), generator=torch.Generator().manual_seed(4)), ranks, rank, shuffle=False)
    return DataLoader(range(n), size, sampler=sampler)


def transformers(n, ranks, rank, size):
    kind = pytest.importorskip("transformers.trainer_pt_utils").DistributedLengthGroupedSampler
    lengths = [1 + i % 5 for i in range(n)]
    return DataLoader(range(n), size, sampler=kind(size, list(range(n)), ranks, rank, lengths=lengths))


def _accelerate(n, ranks, rank, size, split, shuffle=True):
    loaders = pytest.importorskip("accelerate.data_loader")
    draw = (
        RandomSampler(range(n), generator=torch.Generator().manual_seed(4)) if shuffle else SequentialSampler(range(n))
    )
    shard = loaders.BatchSamplerShard(BatchSampler(draw, size, drop_last=False), ranks, rank, split)
    return DataLoader(range(n), batch_sampler=shard)


def accelerate(n, ranks, rank, size):
    return _accelerate(n, ranks, rank, size, False)


def accelerate_split(n, ranks, rank, size):
    return _accelerate(n, ranks, rank, size * ranks, True)


def accelerate_stream(n, ranks, rank, size):
    shard = pytest.importorskip("accelerate.data_loader").IterableDatasetShard
    return DataLoader(shard(Stream(n), size, False, ranks, rank), size)


def transformers_stream(n, ranks, rank, size):
    shard = pytest.importorskip("transformers.trainer_pt_utils").IterableDatasetShard
    return DataLoader(shard(Stream(n), size, False, ranks, rank), size)


@pytest.mark.parametrize(
    "make",
    [distributed, lightning, transformers, accelerate, accelerate_split, accelerate_stream, transformers_stream],
    ids=lambda make: make.__name__,
)
def test_each_sample_once(make):
    repeats = 0
    for n, ranks, size in GRID:
        if make is transformers and n < ranks:  # which that sampler does not serve
            continue
        seen = []
        for rank in range(ranks):
            loader = make(n, ranks, rank, size)
            padding = padding_of(loader)
            for batch in loader:
                items = batch.tolist()
                seen += items if padding is None else items[: padding.take(len(items))]
                repeats += len(items)
            assert padding is None or padding.seen == padding.n_total
        assert sorted(seen) == list(range(n)), (n, ranks, size)
        repeats -= n
    assert repeats > 0


def test_a_dropped_batch_takes_its_repeats_along():
    """Of 11 samples on 2 ranks each has 6; of rank 1's, the last repeats one, and is dropped with its batch of 4."""
    padding = padding_of(loader := last_batch_dropped(11, 2, 1, 4))
    assert [padding.take(len(batch)) for batch in loader] == [4]


@pytest.mark.parametrize("n", [10, 12])
def test_nothing_is_repeated(n):
    for loader in (
        DataLoader(range(n), 3),
        distributed(n, 2, 1, 3),
        DataLoader(range(11), 3, sampler=DistributedSampler(range(11), 2, 1, drop_last=True)),
        DataLoader(range(11), 3, sampler=Unrepeated(range(11), 2, 1)),
        range(n),
        iter([1]),
    ):
        assert padding_of(loader) is None


class Unrepeated(DistributedSampler):
    """As Lightning's for predictions."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.total_size = len(self.dataset)

    def __iter__(self):
        return iter(range(self.rank, self.total_size, self.num_replicas))


class Reversed(DistributedSampler):
    """Repeats come first."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


class Grouped(BatchSampler):
    """Batches in another order than their samples."""

    def __iter__(self):
        return iter([[3, 1], [2]])


class Foreign(SequentialSampler):
    num_replicas = 2


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (lambda: DataLoader(range(11), 2, sampler=Reversed(range(11), 2, 1)), "Reversed repeats 1 of 11 samples"),
        (
            lambda: DataLoader(range(11), batch_sampler=Grouped(DistributedSampler(range(11), 2, 1), 2, False)),
            "cannot be told behind Grouped",
        ),
        (lambda: DataLoader(range(11), 2, sampler=Foreign(range(11))), "whether Foreign repeats samples"),
    ],
)
def test_what_cannot_be_told_is_an_error(loader, text):
    with pytest.raises(ValueError, match=text) as caught:
        padding_of(loader())
    assert "drop_last=True" in str(caught.value)
    assert "reduce=False" in str(caught.value)


def test_seen_through_a_progress_bar():
    tqdm = pytest.importorskip("tqdm").tqdm
    padding = padding_of(tqdm(distributed(11, 2, 1, 4), disable=True))
    assert (padding.n_real, padding.n_total) == (5, 6)


def test_a_batch_of_other_samples():
    padding = padding_of(distributed(11, 2, 1, 4))
    assert padding.take(4) == 4
    with pytest.raises(ValueError, match="a batch of 2 has 3 losses"):
        padding.take(3)
