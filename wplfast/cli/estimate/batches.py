"""Batches of a data file's records, and of what a user's function returns."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ...capture.watched import tensors_in
from ...fisher.batches import Batch
from ...storage.reading import data_of
from .problem import Step
from .tasks import Example, Task

#: Batches whose samples are sorted by length together, so that little is padded.
WINDOW = 64


class FileBatches:
    """Batches of records: sorted by length within windows, longest first.

    Args:
        task: encodes and collates.
        records: index in the file and record, of this process.
        batch_size: samples in a batch.
    """

    def __init__(self, task: Task, records: Sequence[tuple[int, Any]], batch_size: int) -> None:
        self._task, self._records, self._size = task, records, batch_size

    @property
    def n_samples(self) -> int | None:
        """How many samples there are."""
        return len(self._records)

    def steps(self, done: int, state: str) -> Iterator[Step]:
        """Yield batches; windows that are done are not encoded again."""
        window = WINDOW * self._size
        skipped = done % WINDOW
        for start in range(done // WINDOW * window, len(self._records), window):
            encoded = self._task.encode(self._records[start : start + window])
            encoded.sort(key=lambda example: -example.length)
            groups = [encoded[i : i + self._size] for i in range(0, len(encoded), self._size)]
            for group in groups[skipped:]:
                yield self._step(group)
            skipped = 0

    def _step(self, group: Sequence[Example]) -> Step:
        """Make a batch of examples that have a loss."""
        counted = [example for example in group if example.counts]
        batch = self._task.collate(counted) if counted else None
        truncated = sum(example.truncated for example in counted)
        return Step(batch, len(group), len(group) - len(counted), truncated)


class FunctionBatches:
    """Batches that a user's function returned: each process takes its turn.

    Args:
        data: an iterable of batches, or a data set of samples.
        batch_size: samples in a batch of a data set.
        rank: of this process.
        world: number of processes.
        seed: of the random numbers that ``data`` may draw when it is iterated over.
        what: how to call it in messages.

    Raises:
        TypeError: if it is neither.
        ValueError: if a loader gives this process a part of the data already.
    """

    def __init__(self, data: Any, batch_size: int, rank: int, world: int, seed: int, what: str) -> None:
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size)
        if isinstance(getattr(data, "sampler", None), DistributedSampler):
            raise ValueError(f"{what}: the loader must yield all data in every process, which take turns; it has a "
                             "DistributedSampler")  # fmt: skip
        if not hasattr(data, "__iter__"):
            raise TypeError(f"{what}: data must be an iterable of batches or a Dataset, got {type(data).__name__}")
        self._data, self._rank, self._world, self._seed, self._what = data, rank, world, seed, what
        self.n_samples: int | None = None

    def steps(self, done: int, state: str) -> Iterator[Step]:
        """Yield batches; those that are done are drawn again, and compared with what they were by a checksum."""
        torch.manual_seed(self._seed)
        checksum, index = 0, 0
        cpu = torch.device("cpu")
        for turn, item in enumerate(self._data):
            if turn % self._world != self._rank:
                continue
            batch = Batch.of(item, None, cpu)
            for tensor in tensors_in((batch.inputs, batch.targets, batch.weights)):
                checksum = zlib.crc32(data_of(tensor), checksum)
            index += 1
            if index <= done:
                if index == done and f"{checksum:08x}" != state:
                    raise ValueError(
                        f"{self._what}: the batches that were done already are others now, so samples would be counted "
                        "twice; return the same data in the same order, or delete the unfinished file to start anew"
                    )
                continue
            targets = batch.targets
            count = len(targets) if isinstance(targets, torch.Tensor) and targets.dim() else 1
            yield Step(None if batch.is_empty else item, count, state=f"{checksum:08x}")
        if index < done:
            raise ValueError(f"{self._what}: data end after {index} batches, {done} of which are done already")
