"""Samplers that repeat samples until all ranks have equally many: which samples of a rank are repeats.

They all lay the samples of one epoch in a row, shuffled or not, append samples from its beginning, and deal the places
of that row out. A repeat is told by its place alone, so epochs and seeds do not matter; on each rank repeats come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

_ADVICE = (
    "use drop_last=True, a data set whose size the number of ranks times the batch size divides, or a loader without a "
    "padding sampler (data[rank::n_ranks]); or pass reduce=False to count repeats"
)

#: Samplers of other packages that deal out as DistributedSampler does, in an order of their own.
_STRIDED = {
    "lightning.fabric.utilities.distributed.DistributedSamplerWrapper",
    "lightning_fabric.utilities.distributed.DistributedSamplerWrapper",
    "transformers.trainer_pt_utils.DistributedLengthGroupedSampler",
}


@dataclass
class Padding:
    """The repeats at the end of this rank's part of the data.

    Attributes:
        n_real: samples of this rank that are no repeats, the first ones.
        n_total: with repeats.
        batch_size: of all batches but a shorter last one.
        by: what repeats them.
    """

    n_real: int
    n_total: int
    batch_size: int
    by: str
    seen: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether all samples to come are repeats."""
        return self.seen >= self.n_real

    def take(self, n: int) -> int:
        """Return how many of the next n samples, the first ones of a batch, are no repeats.

        Raises:
            ValueError: if the batch has other samples than its loader gave it.
        """
        expected = min(self.batch_size, self.n_total - self.seen)
        if n != expected:
            raise ValueError(
                f"{self.by} repeats {self.n_total - self.n_real} samples of this rank, which cannot be told from the "
                f"others: a batch of {expected} has {n} losses; {_ADVICE}"
            )
        real = max(0, min(n, self.n_real - self.seen))
        self.seen += n
        return real


def padding_of(data: Any) -> Padding | None:
    """Return what a loader repeats on this rank; None if nothing, or if it is no loader.

    Known are ``DistributedSampler``, those of Lightning and transformers that deal out as it does, and the loaders that
    ``Accelerator.prepare`` returns, all by their public attributes. A ``tqdm`` bar around one is seen through.

    Raises:
        ValueError: if it repeats samples, and which ones cannot be told.
    """
    data = getattr(data, "iterable", data)  # of a progress bar
    if hasattr(data, "base_dataloader") and type(data).__name__ == "DataLoaderDispatcher":
        raise ValueError(
            "accelerate's DataLoaderDispatcher sends every batch from one rank to the others, where a rank that fails "
            "lets them wait, and repeats samples that cannot be told from the others: prepare the loader with "
            "DataLoaderConfiguration(dispatch_batches=False), or pass reduce=False to count repeats"
        )
    if not (isinstance(data, DataLoader) or hasattr(data, "base_dataloader")):
        return None
    if isinstance(data.dataset, IterableDataset):
        return _of_stream(data)
    batches = data.sampler if isinstance(data.sampler, BatchSampler) else data.batch_sampler
    if hasattr(batches, "even_batches"):
        return _of_batches(batches, getattr(data, "skip_batches", 0))
    return _of_sampler(data, batches)


def _of_sampler(loader: Any, batches: Any) -> Padding | None:
    """Return what a sampler of samples repeats: it deals out place r, r + R, ... to rank r of R."""
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", loader.sampler)
    n_ranks = getattr(sampler, "num_replicas", None) or getattr(sampler, "num_processes", None) or 1
    if n_ranks == 1 or getattr(sampler, "drop_last", False):
        return None
    kind = type(sampler)
    if not isinstance(sampler, DistributedSampler):
        raise ValueError(f"whether {kind.__name__} repeats samples cannot be told: {_ADVICE}")
    n_samples = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.total_size <= n_samples:
        return None
    is_strided = kind.__iter__ is DistributedSampler.__iter__ or f"{kind.__module__}.{kind.__qualname__}" in _STRIDED
    if not is_strided or type(batches).__iter__ is not BatchSampler.__iter__:
        unknown = type(batches) if is_strided else kind
        raise ValueError(
            f"{kind.__name__} repeats {sampler.total_size - n_samples} of {n_samples} samples, and which ones cannot "
            f"be told behind {unknown.__name__}: {_ADVICE}"
        )
    n_real, n_total = len(range(sampler.rank, n_samples, n_ranks)), len(sampler)
    if n_real == n_total:
        return None
    return Padding(n_real, n_total, batches.batch_size, kind.__name__)


def _of_batches(shard: Any, n_skipped: int) -> Padding | None:
    """Return what accelerate's BatchSamplerShard repeats: it deals out whole batches, or a slice of each."""
    inner = shard.batch_sampler
    if not shard.even_batches or shard.drop_last or shard.num_processes == 1:
        return None
    if type(inner).__iter__ is not BatchSampler.__iter__:
        raise ValueError(
            f"which samples even_batches=True repeats cannot be told behind {type(inner).__name__}: {_ADVICE}"
        )
    n_samples, rows = len(inner.sampler), shard.batch_size
    rows = rows // shard.num_processes if shard.split_batches else rows
    return _dealt(n_samples, rows, shard.num_processes, shard.process_index, n_skipped, "even_batches=True")


def _of_stream(loader: Any) -> Padding | None:
    """Return what the IterableDatasetShard of accelerate or transformers repeats: it deals out slices of samples."""
    stream = loader.dataset
    if not hasattr(stream, "num_processes") or stream.num_processes == 1 or stream.drop_last:
        return None
    rows = stream.batch_size // stream.num_processes if stream.split_batches else stream.batch_size
    if not hasattr(stream.dataset, "__len__") or loader.num_workers > 1 or loader.batch_size != rows:
        raise ValueError(
            f"{type(stream).__name__} repeats samples at the end of a stream, and which ones cannot be told without "
            f"its length, in several workers, or in batches of other sizes than its own: {_ADVICE}"
        )
    n_samples = len(stream.dataset)
    return _dealt(n_samples, rows, stream.num_processes, stream.process_index, 0, type(stream).__name__)


def _dealt(n_samples: int, rows: int, n_ranks: int, rank: int, n_skipped: int, by: str) -> Padding | None:
    """Return what is repeated where each rank in turn gets so many rows, until the last round is full."""
    n_rounds = -(-n_samples // (rows * n_ranks))
    starts = (rows * (n_ranks * i + rank) for i in range(n_skipped, n_rounds))
    n_real = sum(max(0, min(rows, n_samples - start)) for start in starts)
    n_total = rows * max(0, n_rounds - n_skipped)
    return None if n_real == n_total else Padding(n_real, n_total, rows, by)
