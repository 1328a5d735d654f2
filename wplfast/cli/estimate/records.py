"""Records of a data file: JSONL, CSV, Parquet or text, with errors that name the line."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Chooses columns among those that there are.
Choose: TypeAlias = "Callable[[Sequence[str]], Sequence[str]]"

#: Where records are, such as "line 7", and their values by column.
Numbered: TypeAlias = "tuple[str, dict[str, Any]]"


@dataclass
class Records:
    """What a data file holds, in the columns that were asked for.

    Attributes:
        path: of the file.
        columns: names of the columns that were chosen.
        rows: values of these columns.
        places: where each row is, such as "line 7".
        digest: of the file's bytes.
    """

    path: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    places: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)


def read(path: str, choose: Choose) -> Records:
    """Read a data file; its suffix says the format.

    Args:
        path: of a .jsonl, .json, .ndjson, .csv, .tsv, .parquet, .txt or .text file. A line of text is a record with the
            column "text"; empty lines are none.
        choose: returns the columns to keep, given those of the first record.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is of another format, broken, empty, or a record lacks a column.
        ImportError: if the format takes a package that is missing.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: data must be one of {', '.join(_READERS)}, got {suffix or 'no suffix'!r}")
    with open(path, "rb") as file:
        digest = (
            hashlib.file_digest(file, "blake2b").hexdigest()[:32] if hasattr(hashlib, "file_digest") else _digest(file)
        )
    try:
        numbered = _READERS[suffix](path)
        first = next(numbered, None)
        if first is None:
            raise ValueError(f"{path} holds no records")
        columns = tuple(choose(list(first[1])))
        rows, places = [], []
        for place, values in itertools.chain([first], numbered):
            lacking = [column for column in columns if column not in values]
            if lacking:
                raise ValueError(f"{path}, {place}: there is no {lacking[0]!r}, only {_some(values)}")
            rows.append(tuple(values[column] for column in columns))
            places.append(place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error.reason} at byte {error.start}") from error
    return Records(path, columns, rows, places, digest)


def _digest(file: Any) -> str:
    """Hash a file."""
    found = hashlib.blake2b()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()[:32]


def _some(values: dict[str, Any]) -> str:
    """List columns for a message."""
    names = list(values)
    return f"[{', '.join(map(repr, names[:20]))}{', ...' if len(names) > 20 else ''}]"


def _json(path: str) -> Iterator[Numbered]:
    """Yield the objects of a file with one a line, or of one array."""
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from _array(path, file.read())
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: broken JSON: {error}") from error
            yield f"line {number}", _object(path, f"line {number}", values)


def _array(path: str, text: str) -> Iterator[Numbered]:
    """Yield the objects of a JSON array."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON: {error}") from error
    for number, values in enumerate(items, 1):
        yield f"record {number}", _object(path, f"record {number}", values)


def _object(path: str, place: str, values: Any) -> dict[str, Any]:
    """Require that a record is an object.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(values, dict):
        raise ValueError(f'{path}, {place}: a record must be an object such as {{"text": "..."}}, got {values!r:.60}')
    return values


def _csv(path: str) -> Iterator[Numbered]:
    """Yield the rows of a table with a header."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
        try:
            for values in reader:
                place = f"line {reader.line_num}"
                if None in values or None in values.values():
                    expected = len(reader.fieldnames or ())
                    got = expected + len(values.get(None, ())) - list(values.values()).count(None)
                    raise ValueError(f"{path}, {place}: the header has {expected} columns, this row {got}")
                yield place, values
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet(path: str) -> Iterator[Numbered]:
    """Yield the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{path}: Parquet takes pyarrow ({error}): pip install "wplfast[parquet]"') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", values
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no whole Parquet file: {error}") from error


def _text(path: str) -> Iterator[Numbered]:
    """Yield the lines of a text that are not empty."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", {"text": line.rstrip("\r\n")}


_READERS: dict[str, Callable[[str], Iterator[Numbered]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".text": _text,
}
