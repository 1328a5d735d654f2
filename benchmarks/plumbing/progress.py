"""A progress bar over the cases of a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Case = TypeVar("Case")


def progress(cases: Iterable[Case], part: str) -> Iterator[Case]:
    """Yield the cases with a bar on stderr, where that is a terminal."""
    return iter(tqdm(cases, desc=part, unit="case", disable=None, leave=False))
