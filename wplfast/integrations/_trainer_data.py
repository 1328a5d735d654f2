"""A Trainer's data without the Trainer's loader: its columns and collator, in an order and a part of one's own."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

T = TypeVar("T")


class _Part(IterableDataset[Any]):
    """The batches of a stream that are one rank's."""

    def __init__(self, stream: Any, batch_size: int, rank: int, n_ranks: int) -> None:
        """Refer to a stream."""
        self._stream, self._of = stream, (batch_size, rank, n_ranks)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this rank's samples."""
        return _dealt(self._stream, *self._of)


class TrainerData:
    """The samples of a data set as a Trainer's model is given them.

    Args:
        trainer: the Trainer.
        dataset: of the Trainer's kind; None: its ``train_dataset``.
        shuffled: take the samples in random order (seeded), where they have an order to choose.

    Raises:
        ValueError: if there is no data set.
    """

    def __init__(self, trainer: Any, dataset: Any, shuffled: bool) -> None:
        """See the class."""
        dataset = trainer.train_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("the Trainer has no train_dataset: pass trainer_fisher(trainer, dataset)")
        loader = trainer.get_test_dataloader(dataset)  # which leaves out columns, by data set or by collator
        samples = loader.dataset
        if hasattr(samples, "num_processes") and hasattr(samples, "dataset"):  # accelerate's part of a stream
            samples = samples.dataset
        self.samples, self.collate, self._args = samples, loader.collate_fn, trainer.args
        self.is_stream = isinstance(samples, IterableDataset)
        self._order: Sequence[int] | None = None if self.is_stream else range(len(samples))
        if shuffled and self._order is not None:
            seed = self._args.seed if self._args.data_seed is None else self._args.data_seed
            self._order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()

    @property
    def n_samples(self) -> int | None:
        """How many samples there are; None: it is a stream."""
        return None if self._order is None else len(self._order)

    def first(self, n_samples: int) -> dict[str, Any]:
        """Collate the first samples.

        Raises:
            ValueError: if there are none.
            TypeError: if the collator makes no batch of them.
        """
        if self._order is None:
            found = list(islice(iter(self.samples), n_samples))
        else:
            found = [self.samples[index] for index in self._order[:n_samples]]
        if not found:
            raise ValueError("the data set is empty")
        batch = self.collate(found)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the Trainer's collator must return a dict, got {type(batch).__name__}: where samples are made while "
                "training (GRPO), collect some and pass them with fisher_diagonal(model, data, loss_fn)"
            )
        return dict(batch)

    def loader(self, batch_size: int, rank: int = 0, n_ranks: int = 1) -> DataLoader[Any]:
        """Return a loader over a rank's batches, every so many of those that one process would have."""
        part = self.samples
        if self._order is not None:
            part = Subset(self.samples, list(_dealt(self._order, batch_size, rank, n_ranks)))
        elif n_ranks > 1:
            part = _Part(self.samples, batch_size, rank, n_ranks)
        n_workers = self._args.dataloader_num_workers
        return DataLoader(
            part,
            batch_size=batch_size,
            collate_fn=self.collate,
            num_workers=n_workers,
            pin_memory=self._args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self._args.dataloader_prefetch_factor if n_workers else None,
            generator=torch.Generator().manual_seed(self._args.seed),  # so that none is drawn from the global one
        )


def _dealt(samples: Iterable[T], batch_size: int, rank: int, n_ranks: int) -> Iterator[T]:
    """Yield the samples of a rank's batches, which are dealt out one by one."""
    return (sample for place, sample in enumerate(samples) if place // batch_size % n_ranks == rank)


@contextmanager
def left_alone(trainer: Any) -> Iterator[None]:
    """Give a Trainer back as it was: attributes, metrics it collected, loaders it counts, random numbers.

    What its loss gathers from other ranks, for metrics alone, is not gathered: ranks may have unequal parts.
    """
    attributes = dict(vars(trainer))
    metrics = {
        name: copy.deepcopy(attributes[name]) for name in ("_metrics", "_total_train_tokens") if name in attributes
    }
    accelerator = trainer.accelerator
    loaders = list(accelerator._dataloaders)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    generator = getattr(trainer.data_collator, "generator", None)
    state = _state(generator)
    gathering = vars(accelerator).get("gather_for_metrics")
    accelerator.gather_for_metrics = lambda value, *_, **__: value
    try:
        yield
    finally:
        del accelerator.gather_for_metrics
        if gathering is not None:
            accelerator.gather_for_metrics = gathering
        accelerator._dataloaders[:] = loaders
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        vars(trainer).update(attributes | metrics)
        for name in vars(trainer).keys() - attributes.keys():
            delattr(trainer, name)


def _state(generator: Any) -> Any:
    """Return the state of a collator's own generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else None
