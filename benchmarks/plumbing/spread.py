"""Mean and spread over seeds, for records and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def spread(values: Any) -> dict[str, Any]:
    """Return mean, standard deviation (0 of a single value) and the single values."""
    values = np.asarray(values, float)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": std, "seeds": [round(float(v), 3) for v in values]}


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


def points(values: dict[str, Any]) -> str:
    """Format mean and standard deviation, without the sign of a zero."""
    return f"{round(values['mean'], 1) + 0.0:.1f} ± {values['std']:>4.1f}"
