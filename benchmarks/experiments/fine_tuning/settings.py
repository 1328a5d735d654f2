"""What a run is made of: settings that all have in common, what is varied, how it is trained, what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from .model import WIDTHS
from .stream import Sizes

METHODS = {"none": "no penalty", "wpl": "WPL", "l2": "L2 anchor (F = 1)"}
UNCHANGED = "unchanged"  # the model of the start, never trained again


@dataclass(frozen=True)
class Setup:
    """Settings that all runs have in common; optimizer and minibatch as in the paper."""

    sizes: Sizes
    data: str | None = None
    device: str = "cpu"
    model: str = "mlp"
    width: int = WIDTHS["mlp"]
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 0.0005
    lr_start: float = 0.02
    start_iterations: int = 300
    n_updates: int = 10


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
