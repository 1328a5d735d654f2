"""What architectures lost between their own training and the end of the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: the measures, and what each is called
MEASURES = {"mean": "mean difference", "best5": "best-5 mean difference", "max": "max difference"}
_BEST = 5


def forgetting(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Compare errors right after the training of each architecture with those at the end of the epoch.

    Args:
        before: errors of n >= 1 architectures, each right after its own training.
        after: of the same ones, after all others of the epoch were trained too.

    Returns:
        Mean and maximum of after - before, and its mean over the five architectures that were best before.
    """
    first = np.asarray(before, float)
    difference = np.asarray(after, float) - first
    best = np.argsort(first, kind="stable")[:_BEST]
    return {"mean": float(difference.mean()), "best5": float(difference[best].mean()), "max": float(difference.max())}
