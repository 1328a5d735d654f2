"""Texts of several kinds as bytes, for language models: what ships with Python, scikit-learn and PyTorch, or files."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .digits import DataError, Part, Split

_MODULES = ("calendar", "contextlib", "csv", "fractions", "functools", "heapq", "shlex", "statistics", "textwrap")
_TABLES = ("iris.csv", "wine_data.csv", "breast_cancer.csv")
_HEADERS = "include/c10/util"
_PAGE = 8  # windows that stay together, so that few of them have a neighbour in another part
_FEWEST = 10 * _PAGE  # windows, so that each part has some


@dataclass(frozen=True)
class Domain:
    """One kind of text."""

    name: str
    text: bytes

    def describe(self) -> dict[str, Any]:
        """Return what tells it apart from another text of the same name."""
        return {"name": self.name, "bytes": len(self.text), "sha256": hashlib.sha256(self.text).hexdigest()[:16]}


@lru_cache(maxsize=2)
def load_domains(folder: str | None, first_size: int, size: int) -> tuple[Domain, ...]:
    """Load a text to begin with, and after it the row of domains; a process does so once.

    Args:
        folder: holds text files, of which the first by name is what to begin with; None for Python's help texts, and
            after them Python's sources, scikit-learn's tables of numbers and PyTorch's C++ headers.
        first_size: bytes of the first text that are used, from its start.
        size: bytes of each domain, likewise.

    Raises:
        DataError: if a text is missing or too short.
    """
    first, *rest = _builtin() if folder is None else _read(Path(folder))
    if len(rest) < 2:
        raise DataError(f"{folder}: expected a text to begin with and at least two domains, got {1 + len(rest)} files")
    return Domain(first.name, first.text[:first_size]), *(Domain(one.name, one.text[:size]) for one in rest)


def windows(domain: Domain, length: int) -> Part:
    """Cut a text into windows.

    Returns:
        Inputs and targets [N, length], int64: bytes, and those that follow them.

    Raises:
        DataError: if there are too few windows to split.
    """
    n = (len(domain.text) - 1) // length
    if n < _FEWEST:
        raise DataError(f"{domain.name}: expected at least {_FEWEST * length + 1:,} bytes, got {len(domain.text):,}")
    text = torch.frombuffer(bytearray(domain.text[: n * length + 1]), dtype=torch.uint8).long()
    return text[:-1].view(n, length), text[1:].view(n, length)


def split_windows(domain: Domain, length: int, seed: int) -> Split:
    """Split a text's windows 70 : 10 : 20 into train, validation and test parts; the seed deals out pages of them.

    Raises:
        DataError: if there are too few windows to split.
    """
    inputs, targets = windows(domain, length)
    pages = torch.randperm(len(inputs) // _PAGE, generator=torch.Generator().manual_seed(seed))
    parts = torch.tensor_split(pages, (round(0.7 * len(pages)), round(0.8 * len(pages))))
    chosen: list[Tensor] = [(part[:, None] * _PAGE + torch.arange(_PAGE)).flatten() for part in parts]
    train, validation, test = ((inputs[rows], targets[rows]) for rows in chosen)
    return Split(train, validation, test, domain.name)


def _read(root: Path) -> list[Domain]:
    """Return the text files of a folder, by name."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    return [Domain(path.stem, path.read_bytes()) for path in sorted(root.glob("*.txt"))] or [Domain("", b"")]


def _builtin() -> list[Domain]:
    """Return texts that are on every machine where the experiments run."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data.topics; give a folder of text files with --data") from None
    import sklearn.datasets

    help_texts = "\n".join(topics[name] for name in sorted(topics)).encode()
    specs = (importlib.util.find_spec(name) for name in _MODULES)
    sources = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    tables = Path(sklearn.datasets.__file__).parent / "data"
    headers = sorted((Path(torch.__file__).parent / _HEADERS).glob("*.h"))
    return [
        Domain("Python's help texts", help_texts),
        _joined("Python sources", sources),
        _joined("tables of numbers", [tables / name for name in _TABLES]),
        _joined("C++ headers", headers),
    ]


def _joined(name: str, paths: list[Path]) -> Domain:
    """Return the texts of some files as one."""
    try:
        return Domain(name, b"".join(path.read_bytes() for path in paths))
    except OSError as error:
        raise DataError(f"{name}: {error.filename} cannot be read ({error.strerror})") from error
