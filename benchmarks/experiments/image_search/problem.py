"""Classification of images as a search problem: wrong answers in percent as the error, accuracy as the reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import wplfast

from ...plumbing.data import DataError
from ...plumbing.images import ImageSplit, Part
from ..search.problem import Choices, Cover, FisherPass, Problem
from .cells import Child, SharedCells, Sizes, decisions

_CHUNK = 512  # images at once where no gradient is needed


@dataclass(frozen=True)
class Batches:
    """How many images are used at once.

    Args:
        size: of a minibatch, for training, the Fisher and rewards.
        evaluate: validation images that an error is measured on, at most.
    """

    size: int = 64
    evaluate: int = 500


class Shuffled:
    """The minibatches of one part, without replacement within a round, in an order that the seed decides.

    Args:
        part: images and labels.
        size: of a minibatch.
        seed: of the order.
    """

    def __init__(self, part: Part, size: int, seed: int) -> None:
        """Begin before the first round."""
        self._images, self._labels = part
        self._size = min(size, len(self._labels))
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def next(self) -> Part:
        """Return the next minibatch; what is left of a round and does not fill one is left out."""
        if len(self._order) < self._size:
            self._order = torch.randperm(len(self._labels), generator=self._generator)
        chosen, self._order = self._order[: self._size], self._order[self._size :]
        chosen = chosen.to(self._labels.device)
        return self._images[chosen], self._labels[chosen]


class ImageProblem(Problem):
    """Convolution cells that classify images.

    Args:
        split: images and labels of the three parts.
        sizes: of the models.
        batches: how many images are used at once.
        seed: decides the initial weights and all orders.
        device: where the models are.
        cover: whether the penalty covers the first convolution and the classifier beside the cells' operations.

    Raises:
        DataError: if the images are too small to be halved as often as sizes say.
    """

    def __init__(
        self, split: ImageSplit, sizes: Sizes, batches: Batches, seed: int, device: str = "cpu", cover: Cover = "used"
    ) -> None:
        """Make the shared weights."""
        least = sizes.stride * 2 ** (sizes.stages - 1)
        if min(split.shape[1:]) < 2 * least:
            raise DataError(f"images of {list(split.shape)} are too small for {sizes.stages} stages")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: SharedCells = SharedCells(sizes)
        self.model.to(device)
        self.decisions = decisions(sizes.nodes)
        cells = dict(self.model.operations.named_parameters())
        self.cover(cells, cover)
        self._names = {key: [name for name in cells if name.startswith(f"{key}.")] for key in self._keys()}
        train, validation, test = ((x.to(device), y.to(device)) for x, y in (split.train, split.validation, split.test))
        self._train = Shuffled(train, batches.size, seed)
        self._fisher = Shuffled(validation, batches.size, seed + 1)
        self._rewards = Shuffled(validation, batches.size, seed + 2)
        self._measured = tuple(part[: batches.evaluate] for part in validation)
        self._test = test

    def of_cell(self, choices: Choices) -> list[str]:
        """Return the names of the weights of a cell's convolutions and their normalisations, in all cells."""
        return [name for key in self.model.used(choices) for name in self._names[key]]

    def train_loss(self, choices: Choices) -> Tensor:
        """Return the mean cross-entropy of the next minibatch."""
        images, labels = self._train.next()
        return F.cross_entropy(self.model(choices, images), labels)

    def fisher_pass(self, choices: Choices) -> FisherPass:
        """Return a validation minibatch."""
        return FisherPass(Child(self.model, choices), self._fisher.next(), wplfast.losses.cross_entropy)

    def error(self, choices: Choices) -> float:
        """Return the share of wrong answers among the first validation images, in percent."""
        return 100 * (1 - self._accuracy(choices, *self._measured))

    def reward(self, choices: Choices) -> float:
        """Return the accuracy on a validation minibatch."""
        return self._accuracy(choices, *self._rewards.next())

    def test_error(self, choices: Choices) -> float:
        """Return the share of wrong answers on the test part, in percent."""
        return 100 * (1 - self._accuracy(choices, *self._test))

    def _keys(self) -> list[str]:
        """Return the names of all operations with weights."""
        return list(self.model.operations)

    @torch.no_grad()
    def _accuracy(self, choices: Choices, images: Tensor, labels: Tensor) -> float:
        """Return the share of right answers."""
        right = torch.zeros((), dtype=torch.int64, device=labels.device)
        for x, y in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
            right += (self.model(choices, x).argmax(1) == y).sum()
        return right.item() / len(labels)
