"""Ranks of one Trainer that do something together and alike, or fail together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..distributed.agreement import Agreement, is_distributed
from ..distributed.fingerprint import fingerprints
from ..params import is_sharded
from ..penalty.loss import WeightPlasticityLoss


@contextmanager
def together(n_ranks: int, what: str, hint: str) -> Iterator[dict[str, Any]]:
    """Let all ranks do something, and fill in what must come to the same on all of them.

    Args:
        n_ranks: that the Trainer has.
        what: is done, for messages.
        hint: what to do where the ranks differ.

    Raises:
        ValueError: on all ranks, if they differ.
        RankFailedError: if another rank raised; with its error.
    """
    told: dict[str, Any] = {}
    if n_ranks == 1 or not is_distributed():
        yield told
        return
    with Agreement(what=what) as agreement:
        yield told
        said = agreement.finish(told)
    first = said[0]
    for rank, other in enumerate(said):
        differing = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if differing:
            raise ValueError(f"{what}: rank 0 and rank {rank} differ in {differing[:4]}: {hint}")


@contextmanager
def agreed(wpl: WeightPlasticityLoss, n_ranks: int) -> Iterator[None]:
    """Let all ranks prepare to train; afterwards their anchors and alpha must be the same bits.

    Args:
        wpl: this rank's penalty.
        n_ranks: that the Trainer has.

    Raises:
        ValueError: on all ranks, if their penalties differ.
        RankFailedError: if another rank raised; with its error.
    """
    hint = (
        "their penalties must be the same, or they would drift apart; reduce the Fisher (trainer_fisher does, else "
        "fisher.all_reduce_()), and consolidate alike on all ranks"
    )
    with together(n_ranks, "the start of training", hint) as told:
        yield
        if n_ranks > 1:
            sharded = any(map(is_sharded, wpl._groups.references.tensors()))  # of which each rank has other parts
            parts = {**({} if sharded else wpl._state()), "alpha": wpl.alpha}
            told |= zip(parts, fingerprints(parts.values()), strict=True)
