"""Combinations of parameters for tests: not all, but all that two of them can have together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return rows with one value of each parameter, in which any two values of two parameters meet.

    The largest two parameters say how many rows there are; the full product would have as many times more as the others
    have values.
    """
    values = [list(choice) for choice in choices]
    columns = list(itertools.combinations(range(len(values)), 2))
    rows = list(itertools.product(*(range(len(choice)) for choice in values)))
    missing = {(i, row[i], j, row[j]) for row in rows for i, j in columns}
    chosen = []
    while missing:
        row = max(rows, key=lambda row: sum((i, row[i], j, row[j]) in missing for i, j in columns))
        missing -= {(i, row[i], j, row[j]) for i, j in columns}
        chosen.append(tuple(choice[k] for choice, k in zip(values, row, strict=True)))
    return chosen
