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


def within_noise(scores: Mapping[Value, Sequence[float]]) -> list[Value]:
    """Return the settings whose mean score is at most one standard error of the best one's mean below it.

    Args:
        scores: of each setting, one for each seed; a single one has no error, so that the best and its equals remain.
    """
    means = {value: float(np.mean(found)) for value, found in scores.items()}
    top = best(means)
    error = float(deviation(np.asarray(scores[top], float))) / math.sqrt(len(scores[top]))
    return [value for value, mean in means.items() if mean >= means[top] - error]


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


def half_width(values: np.ndarray) -> np.ndarray:
    """Return half the 95 % interval of the mean over the first axis (Student's t), inf of fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return np.full(values.shape[1:], math.inf)
    return np.asarray(t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / math.sqrt(len(values)))


def five_digits(value: float) -> float:
    """Keep five digits."""
    return float(f"{value:.5g}")


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean of a - b, paired by seed, and the half width of its 95 % interval (Student's t).

    Args:
        a: spread over seeds.
        b: another one, over the same seeds.
    """
    values = np.subtract(a["seeds"], b["seeds"])
    return float(values.mean()), float(half_width(values))


def good_range(alphas: Sequence[float], scores: Sequence[float], within: float) -> dict[str, float | bool]:
    """Return the range of strengths around the best one whose score is at most ``within`` below the best.

    Args:
        alphas: a grid in ascending order.
        scores: of each strength, in points; between two of them it is read off a line over log10(alpha).
        within: in points.

    Returns:
        ``low``, ``high`` (strengths), ``decades`` (log10 of their ratio), and ``open_low``, ``open_high``: whether the
        range reaches that end of the grid, so that it may be wider than that.
    """
    x, y = np.log10(alphas), np.asarray(scores, float)
    best, bound = int(y.argmax()), float(y.max()) - within
    ends, is_open = [], []
    for step in (-1, 1):
        at = best
        while 0 <= at + step < len(y) and y[at + step] >= bound:
            at += step
        is_open.append(not 0 <= at + step < len(y))
        share = 0.0 if is_open[-1] else (y[at] - bound) / (y[at] - y[at + step])
        ends.append(float(x[at]) if is_open[-1] else float(x[at] + share * (x[at + step] - x[at])))
    low, high = ends
    return {
        "low": float(f"{10**low:.4g}"),
        "high": float(f"{10**high:.4g}"),
        "decades": round(high - low, 3),
        "open_low": is_open[0],
        "open_high": is_open[1],
    }


def signed(mean: float, half: float, digits: int = 1) -> str:
    """Format a difference with its 95 % interval, where there is one."""
    return f"{round(mean, digits) + 0.0:+.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def points(values: Mapping[str, Any], digits: int = 1) -> str:
    """Format mean and standard deviation, without the sign of a zero."""
    return f"{round(values['mean'], digits) + 0.0:.{digits}f} ± {values['std']:.{digits}f}"


def seeds_of(number: int) -> str:
    """Say how many seeds there are."""
    return f"{number} seed{'s' * (number != 1)}"
