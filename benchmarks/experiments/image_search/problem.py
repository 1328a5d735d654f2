"""Classification of images as a search problem: wrong answers in percent as the error, accuracy as the reward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import wplfast

from ..data.digits import DataError, Split
from ..data.images import load_images
from ..harness.options import option, positive
from ..harness.training import batches as shuffled
from ..search.problem import Child, Choices, Cover, FisherPass, Problem
from .cells import SharedCells, Sizes, decisions

FOLDER = "folder with MNIST's IDX files or CIFAR-10's data_batch_*.bin; default: scikit-learn's digits"
_CHUNK = 512  # images at once where no gradient is needed


@dataclass(frozen=True)
class Batches:
    """How many images are used at once: in a minibatch (training, the Fisher, rewards), and to measure an error."""

    size: int = option(64, positive, flag="batch_size")
    evaluate: int = option(500, positive, "images that errors are measured on, at most")


@dataclass(frozen=True)
class Task:
    """What a problem is made from besides its seed."""

    folder: str | None = option(None, str, FOLDER, flag="data", metavar="DIR")
    sizes: Sizes = field(default_factory=Sizes)
    batches: Batches = field(default_factory=Batches)
    device: str = "cpu"
    cover: Cover = "used"

    def problem(self, seed: int) -> ImageProblem:
        """Make the problem of one run; raises DataError if the images cannot be read, or are too small.

        All seeds have one split, so that no test image of one is a validation image of the seed that chooses settings.
        """
        return ImageProblem(self, load_images(self.folder, 0), seed)


class ImageProblem(Problem):
    """Convolution cells that classify images; the seed decides the initial weights and all orders.

    Beside the cells' operations there are the first convolution and the classifier, which all cells use.

    Raises:
        DataError: if the images are too small to be halved as often as sizes say.
    """

    def __init__(self, task: Task, split: Split, seed: int) -> None:
        """Make the shared weights."""
        sizes, batches, split = task.sizes, task.batches, split.to(task.device)
        if min(split.shape[1:]) < 2 * sizes.stride * 2 ** (sizes.stages - 1):
            raise DataError(f"images of {list(split.shape)} are too small for {sizes.stages} stages")
        super().__init__(task, seed, SharedCells, decisions(sizes.nodes))
        keys = self.model.operations
        self._names = {key: [name for name in self.cells() if name.startswith(f"{key}.")] for key in keys}
        self._train = shuffled(split.train, batches.size, seed)
        self._fisher = shuffled(split.validation, batches.size, seed + 1)
        self._rewards = shuffled(split.validation, batches.size, seed + 2)
        self._measured = tuple(part[: batches.evaluate] for part in split.validation)
        self._test = split.test

    def cells(self) -> dict[str, Tensor]:
        """Return the weights of the cells' operations."""
        return dict(self.model.operations.named_parameters())

    def of_cell(self, choices: Choices) -> list[str]:
        """Return the names of the weights of a cell's convolutions and their normalisations, in all cells."""
        return [name for key in self.model.used(choices) for name in self._names[key]]

    def train_loss(self, choices: Choices) -> Tensor:
        """Return the mean cross-entropy of the next minibatch."""
        images, labels = next(self._train)
        return F.cross_entropy(self.model(choices, images), labels)

    def fisher_pass(self, choices: Choices) -> FisherPass:
        """Return a validation minibatch."""
        return FisherPass(Child(self.model, choices), next(self._fisher), wplfast.losses.cross_entropy)

    def error(self, choices: Choices) -> float:
        """Return the share of wrong answers among the first validation images, in percent."""
        return 100 * (1 - self._accuracy(choices, *self._measured))

    def reward(self, choices: Choices) -> float:
        """Return the accuracy on a validation minibatch."""
        return self._accuracy(choices, *next(self._rewards))

    def test_error(self, choices: Choices) -> float:
        """Return the share of wrong answers on the test part, in percent."""
        return 100 * (1 - self._accuracy(choices, *self._test))

    @torch.no_grad()
    def _accuracy(self, choices: Choices, images: Tensor, labels: Tensor) -> float:
        """Return the share of right answers."""
        right = torch.zeros((), dtype=torch.int64, device=labels.device)
        for x, y in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
            right += (self.model(choices, x).argmax(1) == y).sum()
        return right.item() / len(labels)
