"""Mean and spread over seeds, for records and tables."""

from __future__ import annotations

from typing import Any

import numpy as np


def spread(values: Any) -> dict[str, Any]:
    """Return mean, standard deviation (0 of a single value) and the single values."""
    values = np.asarray(values, float)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": std, "seeds": [round(float(v), 3) for v in values]}


def points(values: dict[str, Any]) -> str:
    """Format mean and standard deviation, without the sign of a zero."""
    return f"{round(values['mean'], 1) + 0.0:.1f} ± {values['std']:>4.1f}"
