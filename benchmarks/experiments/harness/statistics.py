"""What many runs come to: the choice of settings on validation data, mean and spread over seeds, differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Run = TypeVar("Run")
Value = TypeVar("Value")


def grouped(runs: Iterable[Run], key: Callable[[Run], Value]) -> dict[Value, list[Run]]:
    """Sort runs by a key; keys stand in the order of their first runs."""
    groups: dict[Value, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def best(scores: Mapping[Value, float]) -> Value:
    """Return the setting with the highest score, the first one of equals."""
    return max(scores, key=scores.__getitem__)


def at_edge(chosen: float | None, values: Sequence[float]) -> bool:
    """Tell whether a setting is the smallest or largest one that was tried, so that a better one may lie beyond."""
    return bool(values) and chosen in (min(values), max(values))


def spread(values: Any, rounded: Callable[[float], float] = lambda value: round(value, 3)) -> dict[str, Any]:
    """Return mean (None where there are no values), standard deviation (0 of a single value) and the single values."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else None
    return {"mean": mean, "std": float(deviation(values)), "seeds": [rounded(float(v)) for v in values]}


def deviation(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation over the first axis, 0 of fewer than two values."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def five_digits(value: float) -> float:
    """Keep five digits."""
    return float(f"{value:.5g}")


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean of a - b, paired by seed, and the half width of its 95 % interval (Student's t).

    Args:
        a: spread over seeds.
        b: another one, over the same seeds.
    """
    from scipy.stats import t

    values = np.subtract(a["seeds"], b["seeds"])
    if len(values) < 2:
        return float(values.mean()), math.inf
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def signed(mean: float, half: float, digits: int = 1) -> str:
    """Format a difference with its 95 % interval, where there is one."""
    return f"{round(mean, digits) + 0.0:+.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def points(values: Mapping[str, Any], digits: int = 1) -> str:
    """Format mean and standard deviation, without the sign of a zero."""
    return f"{round(values['mean'], digits) + 0.0:.{digits}f} ± {values['std']:.{digits}f}"


def seeds_of(number: int) -> str:
    """Say how many seeds there are."""
    return f"{number} seed{'s' * (number != 1)}"
