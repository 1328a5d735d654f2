"""What one tensor of a Fisher comes to: sums and extremes, and an evenly spaced part of its entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Entries of a tensor that quantiles are taken of.
SAMPLED = 1 << 14


@dataclass(frozen=True)
class Spread:
    """Statistics of one tensor, or of several.

    Attributes:
        name: the parameter's, or the module's.
        elements: number of elements.
        total: their sum.
        largest: the largest one; 0 where there is none.
        tensors: number of tensors.
        entries: evenly spaced entries, float32 on the CPU: those of a part are as many as its share of the elements.
    """

    name: str
    elements: int
    total: float
    largest: float
    tensors: int = 1
    entries: Tensor | None = None

    @staticmethod
    def of(name: str, tensor: Tensor, sampled: int = SAMPLED) -> Spread:
        """Look at a tensor.

        Args:
            name: the parameter's.
            tensor: F, of any shape and floating point type.
            sampled: how many entries to keep at most.
        """
        flat = tensor.detach()
        if not flat.numel():
            return Spread(name, 0, 0.0, 0.0, entries=torch.zeros(0) if sampled else None)
        entries = None
        if sampled:
            step = even_step(flat.numel(), math.ceil(flat.numel() / sampled))
            entries = flat.reshape(-1)[step // 2 :: step].to("cpu", torch.float32)
        total = float(flat.sum(dtype=torch.float64 if flat.device.type != "mps" else torch.float32))
        return Spread(name, flat.numel(), total, float(flat.amax()), entries=entries)

    @staticmethod
    def joined(name: str, parts: Sequence[Spread]) -> Spread:
        """Join what belongs to one module."""
        sampled = [part.entries for part in parts if part.entries is not None]
        return Spread(
            name,
            sum(part.elements for part in parts),
            math.fsum(part.total for part in parts),
            max((part.largest for part in parts), key=lambda x: (math.isnan(x), x), default=0.0),
            sum(part.tensors for part in parts),
            _evenly(sampled, [p.elements for p in parts if p.entries is not None]) if sampled else None,
        )

    @property
    def mean(self) -> float:
        """The mean entry; NaN where there is none."""
        return self.total / self.elements if self.elements else math.nan


def _evenly(parts: list[Tensor], elements: list[int]) -> Tensor:
    """Join entries of several tensors so that each is represented by its number of elements."""
    steps = [n / max(1, len(part)) for part, n in zip(parts, elements, strict=True)]
    widest = max(steps, default=1.0)
    thinned = []
    for part, step in zip(parts, steps, strict=True):
        if len(part):
            wanted = max(1, round(len(part) * step / widest))
            is_whole = wanted == len(part)
            thinned.append(part if is_whole else part[torch.linspace(0, len(part) - 1, wanted).round().long()])
    return torch.cat(thinned) if thinned else torch.zeros(0)


def even_step(elements: int, least: int) -> int:
    """Return the smallest step through a flat tensor, from ``least`` on, that takes all of its columns in turn.

    It has no divisor in common with the number of elements. Otherwise it would come to the same few columns of a matrix
    in every row, and F differs most between columns.
    """
    return next(step for step in itertools.count(least) if math.gcd(step, elements) == 1)


def module_of(name: str, depth: int | None = None) -> str:
    """Return the module that a parameter is counted to; the parameter itself where it is outside of any module.

    Args:
        name: such as ``encoder.0.linear.weight``.
        depth: how many parts of the module's name count; None: all.
    """
    parts = name.split(".")
    if depth == 0:
        return ""
    return ".".join(parts[:-1][:depth]) or name


def by_module(parts: Sequence[Spread], depth: int | None = None) -> list[Spread]:
    """Join tensors by module, in the order in which modules begin."""
    groups: dict[str, list[Spread]] = {}
    for part in parts:
        groups.setdefault(module_of(part.name, depth), []).append(part)
    return [Spread.joined(module, members) for module, members in groups.items()]
