"""What may protect earlier tasks, how each estimates F, and which settings of it are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

import wplfast

from ..data.digits import Part
from ..harness.training import batch_squared

FISHERS = ("mc", "exact", "empirical")

Setting = float | str | None  # alpha; which parts are frozen; None where there is nothing to choose


@dataclass(frozen=True)
class Row:
    """What an experiment's tasks, arms and scores are called.

    Attributes:
        arms: titles by name, in the order in which they are shown; of "none", "frozen", "l2", "mc", "exact",
            "empirical", "squared" (which has a batch size behind it, such as "squared 64") and "joint".
        name: of the experiment, as a title.
        title: of the figure with every task's score; {n} is how many there are.
        key: of the score over all tasks, in the record.
        words: what a score is, for axes.
        task: what a task is called.
        parts: what may be frozen.
        versus: what the column is called that compares with the L2 anchor: by how much an arm is better.
        unit: stands behind a score.
        scale: turns a run's scores into those of the record.
        better: 1 where more is better, -1 where less is.
        digits: behind the point, in tables.
        within: distance from the best alpha's validation score that still counts as good.
        limits: of the scores' axes; None: as matplotlib finds them.
        clock: what the tasks' axis counts.
    """

    arms: Mapping[str, str]
    name: str
    title: str
    key: str
    words: str
    task: str
    parts: str
    versus: str
    unit: str
    scale: float
    better: int
    digits: int
    within: float
    limits: tuple[float, float] | None = None
    clock: str = "epochs"

    def title_of(self, arm: str) -> str:
        """Name an arm."""
        kind, _, size = arm.partition(" ")
        return f"{self.arms[kind]} {size}" if size else self.arms[kind]


def half_decades(first: float, count: int) -> tuple[float, ...]:
    """Return as many values, half a decade apart, from 10 to the power of ``first`` on."""
    return tuple(float(f"{10 ** (first + half / 2):.3g}") for half in range(count))


def settings_of(arm: str, grid: Sequence[float], l2_grid: Sequence[float], parts: int) -> list[Setting]:
    """List what is tried of an arm.

    Args:
        arm: its name.
        grid: alphas of the Fishers; times the batch size for the batch-squared F.
        l2_grid: alphas of the L2 anchor.
        parts: how many may be frozen, in all choices of them.
    """
    if arm == "l2":
        return list(l2_grid)
    if arm in FISHERS:
        return list(grid)
    if arm.startswith("squared"):
        return [float(f"{alpha * int(arm.split()[1]):.6g}") for alpha in grid]
    if arm == "frozen":
        choices = [chosen for n in range(1, parts + 1) for chosen in combinations(range(1, parts + 1), n)]
        return ["+".join(map(str, chosen)) for chosen in choices]
    return [None]


def importance(
    arm: str,
    model: nn.Module,
    part: Part,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Mapping[str, Tensor]:
    """Return an arm's F of a task's data, of the parameters that require grad.

    Args:
        arm: its name.
        model: after the task.
        part: the task's data.
        seed: of the labels that are drawn.
        loss: of each sample, [N].
        batch_size: of the pass; the batch-squared F has its own.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if arm == "l2":
        return {name: torch.ones_like(p) for name, p in params.items()}
    kind, _, size = arm.partition(" ")
    inputs, labels = part
    loader = list(zip(*(tensor.split(int(size or batch_size)) for tensor in (inputs, labels)), strict=True))
    if kind == "squared":
        return batch_squared(model, params, loader, len(loader), lambda outputs, labels: loss(outputs, labels).mean())
    generator = torch.Generator(inputs.device).manual_seed(seed)
    drawn = generator if kind == "mc" else None
    return wplfast.fisher_diagonal(model, loader, loss, fisher_type=kind, generator=drawn)
