"""Where Fishers come from: what becomes of their metadata when they add up."""

from __future__ import annotations

import json
from collections.abc import Mapping

#: What must not differ: other types are other quantities.
TYPE = "fisher_type"

#: Keys of which passes over data are behind a Fisher: the one, and several of a merged one.
PROVENANCE, MERGED = "provenance", "merged"

#: Key of when a Fisher was made.
CREATED = "created"

#: Key of Fishers of passes that are not at their end.
PARTIAL = "partial"

_BETWEEN = "; "


def joined(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of the sum of two Fishers: of what differs both, of times the later one.

    Raises:
        ValueError: if they are of different types.
    """
    ours, theirs = first.get(TYPE), second.get(TYPE)
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"Fishers of different types do not add up: {TYPE} is {ours!r} in the first, {theirs!r} in the second"
        )
    found = {}
    for key in dict.fromkeys((*first, *second)):
        values = [metadata[key] for metadata in (first, second) if key in metadata]
        if key in (PROVENANCE, MERGED, PARTIAL):
            continue
        found[key] = max(values) if key == CREATED else _both(values)
    passes = [*passes_of(first), *passes_of(second)]
    return found | ({MERGED: json.dumps(passes)} if passes else {})


def passes_of(metadata: Mapping[str, str]) -> list[str]:
    """Return what tells the passes behind a Fisher from others, one entry for each; none where that is not known."""
    if MERGED in metadata:
        return [str(entry) for entry in json.loads(metadata[MERGED])]
    return [metadata[PROVENANCE]] if PROVENANCE in metadata else []


def _both(values: list[str]) -> str:
    """Return values that differ one behind the other."""
    return _BETWEEN.join(dict.fromkeys(part for value in values for part in value.split(_BETWEEN)))
