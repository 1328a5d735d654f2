"""How many samples of each batch count: repeats do not, nor do those beyond ``max_samples``, over all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable

from ..distributed.padding import Padding


class Limit:
    """Counts the samples of one pass.

    Where ranks share a limit, the batches that they run at the same time are a round, and samples count in the order
    of rounds, then of ranks; a rank whose data ended is in every round still to come, with none.

    Args:
        most: samples that may count, on all ranks; None: all.
        padding: what this rank's loader repeats.
        exchange: tells all ranks what one has, in rounds; None: this rank is alone.
        rank: of this process.
        skips: whether samples that were to count may be left out afterwards.
    """

    def __init__(
        self,
        most: int | None,
        padding: Padding | None,
        exchange: Callable[[tuple[int, int]], list[tuple[int, int]]] | None = None,
        rank: int = 0,
        skips: bool = False,
    ) -> None:
        """See the class."""
        self._most, self._padding = most, padding
        self._exchange, self._rank, self._skips = exchange if most is not None else None, rank, skips
        self._is_over = False

    @property
    def has_repeats_alone(self) -> bool:
        """Whether all that this rank's data still yield was there before."""
        return self._padding is not None and self._padding.is_spent

    def room(self, n_samples: int, counted: int) -> int:
        """Return how many samples of the next batch count, the first ones.

        Args:
            n_samples: of the batch.
            counted: samples of this rank so far.

        Raises:
            ValueError: if the loader repeats samples, and which ones they are cannot be told.
            RankFailedError: if the ranks share a limit, and one of them failed.
        """
        own = n_samples if self._padding is None else self._padding.take(n_samples)
        if self._most is None:
            return own
        if self._exchange is None:
            return min(own, self._most - counted)
        return self._round(own, counted, self._most)

    def is_reached(self, counted: int) -> bool:
        """Tell whether no further sample can count."""
        if self._exchange is not None:
            return self._is_over
        return self._most is not None and counted >= self._most

    def sit_out(self, counted: int) -> None:
        """Be in the rounds of the other ranks until theirs end, too."""
        while self._exchange is not None and self._most is not None and not self._is_over:
            self._round(0, counted, self._most)

    def pass_round(self, counted: int) -> None:
        """Be in one round of the other ranks without samples."""
        if self._exchange is not None and self._most is not None:
            self._round(0, counted, self._most)

    def copied(self) -> Limit:
        """Return a limit that has counted the same samples so far."""
        twin = copy.copy(self)
        twin._padding = copy.copy(self._padding)
        return twin

    def _round(self, own: int, counted: int, most: int) -> int:
        """Return how many of this rank's samples count in a round of all ranks."""
        assert self._exchange is not None
        said = self._exchange((own, counted))
        left = most - sum(before for _, before in said)
        offered = [n for n, _ in said]
        self._is_over = left <= 0 or not any(offered) or (left <= sum(offered) and not self._skips)
        return max(0, min(own, left - sum(offered[: self._rank])))
