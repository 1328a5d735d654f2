"""A sampler that mixes old and new data by a share, whatever their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class OldNewSampler(Sampler[int]):
    """Draw indices so that old data have the share ``share_old`` of the draws, and new data the rest.

    Every draw is independent: old with probability lambda, else new, and uniform, with replacement, within the part.
    So a sample of the old part is drawn with probability lambda / n_old, one of the new part with
    (1 - lambda) / n_new, and a minibatch of B holds Binomial(B, lambda) old samples. lambda = 0 trains on new data
    alone; lambda = 1 lets them wait until they count as old.

    A pass costs memory and time proportional to ``num_samples``, not to the size of the data (as a weighted sampler's
    would), so it may be made anew for every small update of a large data set. In a ``DataLoader`` it runs in the main
    process: the order does not depend on the number of workers. For minibatches, put it into a ``BatchSampler``.

    Args:
        old: indices of the old data in the data set that is sampled from.
        new: indices of the new data.
        share_old: lambda, in [0, 1].
        num_samples: number of draws in a pass, ``len()`` of the sampler.
        generator: source of the draws; passes with one generator differ. Default: every pass seeds its own from
            torch's global generator, as ``RandomSampler`` does.

    Raises:
        ValueError: if share_old is not in [0, 1], num_samples is below 1, or a part with a share is empty.

    Example:
        >>> import torch
        >>> sampler = OldNewSampler(range(100), range(100, 110), 0.5, 1000, torch.Generator().manual_seed(0))
        >>> drawn = list(sampler)
        >>> len(drawn), 450 < sum(index < 100 for index in drawn) < 550
        (1000, True)

    Source: Kaeding, Rodner, Freytag and Denzler, "Fine-tuning deep neural networks in continuous learning scenarios",
    ACCV workshops 2016, doi 10.1007/978-3-319-54526-4_43, which mixes old data and update sets by such a share.
    """

    def __init__(
        self,
        old: Sequence[int] | Tensor,
        new: Sequence[int] | Tensor,
        share_old: float,
        num_samples: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """See the class."""
        if not 0 <= share_old <= 1:
            raise ValueError(f"share_old must be in [0, 1], got {share_old}")
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be an integer of at least 1, got {num_samples!r}")
        for part, indices, share in (("old", old, share_old), ("new", new, 1 - share_old)):
            if share > 0 and len(indices) == 0:
                raise ValueError(f"{part} is empty, but share_old={share_old} gives it a share of {share:g}")
        self._old, self._new = (torch.as_tensor(part, dtype=torch.int64) for part in (old, new))
        self._share_old, self._num_samples, self._generator = float(share_old), num_samples, generator

    def __iter__(self) -> Iterator[int]:
        """Yield ``num_samples`` indices."""
        generator = self._generator
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        # Always both draws, so that the place within a part does not depend on which part was drawn before.
        is_old = torch.rand(self._num_samples, generator=generator, dtype=torch.float64) < self._share_old
        place = torch.rand(self._num_samples, generator=generator, dtype=torch.float64)
        drawn = torch.empty(self._num_samples, dtype=torch.int64)
        for part, chosen in ((self._old, is_old), (self._new, ~is_old)):
            drawn[chosen] = part[(place[chosen] * len(part)).long()]
        yield from drawn.tolist()

    def __len__(self) -> int:
        """Return the number of draws in a pass."""
        return self._num_samples
