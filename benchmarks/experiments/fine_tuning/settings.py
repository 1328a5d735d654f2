"""What a run is made of: settings that all have in common, what is varied, how it is trained, what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.digits import DIGITS
from ..harness.options import option, positive
from .model import WIDTHS
from .stream import Sizes

METHODS = {"none": "no penalty", "wpl": "WPL", "l2": "L2 anchor (F = 1)"}
UNCHANGED = "unchanged"  # the model of the start, never trained again


@dataclass(frozen=True)
class Setup:
    """Settings that all runs have in common; optimizer and minibatch as in the paper."""

    sizes: Sizes = field(default_factory=Sizes)
    data: str | None = option(None, str, DIGITS, metavar="DIR")
    device: str = "cpu"
    model: str = option("mlp", str, choices=WIDTHS)
    width: int = WIDTHS["mlp"]
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 0.0005
    lr_start: float = 0.02
    start_iterations: int = option(300, positive, "SGD steps before the first update", flag="start")
    n_updates: int = option(10, positive, "update sets: one of each class, or two of each new one", flag="updates")


@dataclass(frozen=True)
class Condition:
    """What is varied.

    Args:
        scenario: "known" or "new".
        steps: SGD steps of an update, counted in ``unit``.
        unit: "epochs" of all data in reach, old and new, or "iterations".
        share_old: lambda.
        noise: share of wrong labels.
        memory: most old samples of a class that are kept; None: all.
    """

    scenario: str
    steps: float
    unit: str = "iterations"
    share_old: float = 0.5
    noise: float = 0.0
    memory: int | None = None

    @property
    def title(self) -> str:
        """What the record calls it."""
        memory = "all old data" if self.memory is None else f"{self.memory} old samples of a class"
        return f"{self.steps:g} {self.unit}, lambda {self.share_old:g}, noise {self.noise:g}, {memory}"


@dataclass(frozen=True)
class Arm:
    """How a run is trained.

    Args:
        method: of :data:`METHODS`, or :data:`UNCHANGED`.
        lr: learning rate of the updates.
        strength: of the penalty, alpha * max(F) with the F of the start.
    """

    method: str
    lr: float
    strength: float | None = None


@dataclass(frozen=True)
class Run:
    """Accuracies on all classes so far: after the start, then after every update."""

    seed: int
    test: list[float]
    validation: list[float]
    iterations: int  # of all updates
    diverged: bool
