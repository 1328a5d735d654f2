"""A model, its data and a loss, from wherever they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass
class Step:
    """A batch on its way to the model.

    Attributes:
        batch: what ``fisher_diagonal`` takes; None where no sample of it counts.
        samples: how many samples of the data it accounts for.
        left_out: how many of these are too short to have a loss.
        truncated: how many were cut to the maximal length.
        state: what tells the batches up to this one from others.
    """

    batch: Any
    samples: int
    left_out: int = 0
    truncated: int = 0
    state: str = ""


class Batches(Protocol):
    """The batches of one process, in an order that is the same whenever the same command is run."""

    @property
    def n_samples(self) -> int | None:
        """How many samples they account for; None if that is unknown."""

    def steps(self, done: int, state: str) -> Iterator[Step]:
        """Yield batches, but for so many that are done, after which the state was this one.

        Raises:
            ValueError: if those that are done were others.
        """


@dataclass
class Problem:
    """What a Fisher is to be computed of.

    Attributes:
        model: the module, on its device.
        parameters: whose Fisher it is, by name.
        batches: of this process.
        loss: one loss per sample.
        likelihood: what "mc" and "exact" draw from.
        limit: most samples of this process; None: all of the batches'.
        identity: option or property -> what it is; two runs with the same are parts of one.
        origin: what files of the Fisher say about where it comes from.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    batches: Batches
    loss: Callable[[Any, Any], Tensor]
    likelihood: str
    limit: int | None
    identity: dict[str, Any]
    origin: dict[str, str]
