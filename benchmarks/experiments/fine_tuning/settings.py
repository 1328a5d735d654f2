"""What a run is made of: settings that all have in common, what is varied, how it is trained, what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..data.digits import DIGITS
from ..harness.options import count, option, positive
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
    n_others: int = option(0, count, "classes that never arrive, but are learnt before", flag="others")
    pretraining: int = option(2000, count, "SGD steps on all samples of the others; 0: none, to compare with")


class Condition(NamedTuple):
    """What is varied."""

    scenario: str  # "known" or "new"
    steps: float  # SGD steps of an update, counted in ...
    unit: str = "iterations"  # ... or in "epochs" of all data in reach, old and new
    share_old: float = 0.5  # lambda
    noise: float = 0.0  # share of wrong labels
    memory: int | None = None  # most old samples of a class that are kept; None: all

    @property
    def title(self) -> str:
        """What the record calls it."""
        memory = "all old data" if self.memory is None else f"{self.memory} old samples of a class"
        return f"{self.steps:g} {self.unit}, lambda {self.share_old:g}, noise {self.noise:g}, {memory}"


class Arm(NamedTuple):
    """How a run is trained."""

    method: str  # of METHODS, or UNCHANGED
    lr: float  # of the updates
    strength: float | None = None  # of the penalty: alpha * max(F) with the F of the start


class Run(NamedTuple):
    """Accuracies on all classes so far: after the start, then after every update."""

    seed: int
    test: list[float]
    validation: list[float]
    iterations: int  # of all updates
    diverged: bool
