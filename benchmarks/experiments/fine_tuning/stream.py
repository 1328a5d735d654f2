"""What arrives when: the start, then update sets of one class each, with wrong labels; and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.digits import DataError, Part, Split

#: what an update set brings
SCENARIOS = {"known": "known classes", "new": "new classes"}
N_CLASSES = 10
N_UPDATES = 10  # about so many: each class that brings update sets brings as many as the others


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples. They are of classes that arrive: of others, which may be learnt before, all are."""

    update: int = 30  # of an update set
    start_known: int = 20  # of each class at the start, where all are known
    start_new: int = 60  # of each class at the start, where half of them are to come


class UpdateSet(NamedTuple):
    """Samples of one class that arrive together."""

    index: Tensor  # [U] into the training part
    n_classes: int  # known from now on


class Stream(NamedTuple):
    """All that arrives. Classes are numbered in the order of their arrival, so that a grown head keeps its rows."""

    split: Split  # digits
    rank: Tensor  # [10] the number of each digit; those that never arrive have the last ones
    labels: Tensor  # [N] of the training part, so numbered, some of the update sets' wrong
    start: Tensor  # [S] indices of the start's samples
    start_classes: int
    updates: list[UpdateSet]
    key: Tensor  # [N] random; what a limited memory keeps of a class is what has the smallest keys

    def samples(self, index: Tensor) -> Part:
        """Return images and labels, perhaps wrong ones, of samples of the training part."""
        images = self.split.train[0]
        return images[index.to(images.device)], self.labels[index].to(images.device)


def make_stream(
    split: Split, scenario: str, sizes: Sizes, noise: float, n_updates: int, seed: int, n_others: int = 0
) -> Stream:
    """Divide the training part into a start and update sets.

    With known classes, the model starts with all that arrive, and each brings one update set (two of five classes), in
    random order. With new ones, it starts with half of them, random ones, and each of the rest brings two update sets
    (three where five classes arrive), one after the other. Noise moves no other draw: the same samples arrive in the
    same order whatever its level.

    Args:
        split: the digits.
        scenario: "known" or "new".
        sizes: of the start and of update sets.
        noise: share of each update set's labels that is replaced by another of the classes known then.
        n_updates: how many update sets at most.
        seed: decides all that is random.
        n_others: number of classes that never arrive, the last ones.

    Raises:
        DataError: if a class has too few samples.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(N_CLASSES, generator=generator)
    rank = order.argsort()
    numbered = rank[split.train[1].cpu()]
    of_class = []
    for number in range(N_CLASSES):
        index = (numbered == number).nonzero().flatten()
        of_class.append(index[torch.randperm(len(index), generator=generator)])
    key = torch.rand(len(numbered), generator=generator)
    n_arriving = N_CLASSES - n_others
    if scenario == "known":
        start_classes, per_class = n_arriving, sizes.start_known
        rounds = range(N_UPDATES // n_arriving)
        arriving = list(chain.from_iterable(torch.randperm(n_arriving, generator=generator).tolist() for _ in rounds))
    else:
        start_classes, per_class = n_arriving // 2, sizes.start_new
        new = range(start_classes, n_arriving)
        arriving = [number for number in new for _ in range(N_UPDATES // len(new))]
    used = [per_class if number < start_classes else 0 for number in range(N_CLASSES)]
    needed = [used[number] + sizes.update * arriving.count(number) for number in range(N_CLASSES)]
    for digit, number in enumerate(rank.tolist()):
        if len(of_class[number]) < needed[number]:
            got = len(of_class[number])
            raise DataError(f"the training part has {got} samples of class {digit}, expected at least {needed[number]}")
    start = torch.cat([of_class[number][:per_class] for number in range(start_classes)])
    updates, n_classes = [], start_classes
    wrong = numbered.clone()
    for number in arriving[:n_updates]:
        index = of_class[number][used[number] :][: sizes.update]
        used[number] += sizes.update
        n_classes = max(n_classes, number + 1)
        shift = torch.randint(1, n_classes, (len(index),), generator=generator)
        hit = torch.randperm(len(index), generator=generator)[: round(noise * len(index))]
        wrong[index[hit]] = (number + shift[hit]) % n_classes
        updates.append(UpdateSet(index, n_classes))
    return Stream(split, rank, wrong, start, start_classes, updates, key)


def remembered(seen: Tensor, labels: Tensor, key: Tensor, per_class: int) -> Tensor:
    """Return what a memory of limited size keeps of the indices seen so far: of each class a random choice.

    Keeping the smallest random keys is a reservoir: what is dropped now would not be kept later either.
    """
    kept = [torch.empty(0, dtype=torch.int64)]
    for label in labels[seen].unique():
        same = seen[labels[seen] == label]
        kept.append(same[key[same].argsort()[:per_class]])
    return torch.cat(kept)


def draw(old: Tensor, new: Tensor, share_old: float, n: int, generator: torch.Generator) -> Tensor:
    """Draw indices [n], each independently: from the old part with probability lambda, else from the new one.

    Within a part draws are uniform and with replacement, so a minibatch of B holds Binomial(B, lambda) old samples,
    whatever the sizes of the parts. lambda = 0 trains on new data alone; lambda = 1 lets them wait until they are old.
    """
    # Always both draws, so that the place within a part does not depend on which part was drawn before.
    is_old = torch.rand(n, generator=generator, dtype=torch.float64) < share_old
    place = torch.rand(n, generator=generator, dtype=torch.float64)
    drawn = torch.empty(n, dtype=torch.int64)
    for part, chosen in ((old, is_old), (new, ~is_old)):
        drawn[chosen] = part[(place[chosen] * len(part)).long()]
    return drawn
