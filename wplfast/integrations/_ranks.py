"""Ranks that start to train together, with the same penalty, or fail together."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ..penalty.loss import WeightPlasticityLoss
from ..storage.reading import data_of


@contextmanager
def agreed(wpl: WeightPlasticityLoss) -> Iterator[None]:
    """Let all ranks of the default group do something; afterwards their anchors and alpha must be the same bits.

    Raises:
        ValueError: on all ranks, if one raised, or if they differ.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    said: list[Any] = [None] * dist.get_world_size()
    own = {} if error is not None else _checksums(wpl)
    dist.all_gather_object(said, (None if error is None else f"{type(error).__name__}: {error}", own))
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(said) if text is not None]
    if failed:
        raise ValueError("; ".join(failed))
    first = said[0][1]
    for rank, (_, other) in enumerate(said):
        differing = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if differing:
            raise ValueError(
                f"the penalties of rank 0 and rank {rank} differ in {differing[:4]}: ranks would drift apart; "
                "reduce the Fisher (trainer_fisher does, else fisher.all_reduce_()), and consolidate alike on all ranks"
            )


def _checksums(wpl: WeightPlasticityLoss) -> dict[str, int]:
    """Return a checksum of each part of a penalty's state."""
    parts = {**wpl._state(), "alpha": wpl.alpha}
    return {key: zlib.crc32(data_of(tensor)) for key, tensor in parts.items()}
