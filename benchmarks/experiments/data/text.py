"""Text for language models, as word indices: three files of a folder, or a text that ships with Python itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..harness.options import option
from .digits import DataError

UNKNOWN, END = "<unk>", "<eos>"
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Files:
    """Where the parts of a text are: files of one sentence a line, words apart by blanks, as Penn Treebank's are.

    Without a folder it is the help texts of Python's ``pydoc_data.topics``, in alphabetical order, the ninth tenth of
    the words for validation and the last for the test.
    """

    folder: str | None = option(None, str, "of text files; default: Python's help texts", flag="data", metavar="DIR")
    train: str = option("train.txt", str, "in the folder", metavar="FILE")
    validation: str = option("valid.txt", str, metavar="FILE")
    test: str = option("test.txt", str, metavar="FILE")
    held_out: str | None = option(
        None, str, "one file for both: its halves are validation and test part", metavar="FILE"
    )


@dataclass(frozen=True)
class Text:
    """Word indices [L] int64 of the parts "train", "validation" and "test", and the words."""

    parts: dict[str, Tensor]
    words: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of words of each part and of the vocabulary."""
        return {**{name: len(part) for name, part in self.parts.items()}, "vocabulary": len(self.words)}


@lru_cache(maxsize=2)
def load_text(files: Files, vocabulary: int) -> Text:
    """Load a text; a process reads it once.

    Args:
        files: where it is.
        vocabulary: the most frequent words of the training part that are kept; all others become ``<unk>``.

    Raises:
        DataError: if a file is missing, is no UTF-8, or has no words.
    """
    parts = _builtin() if files.folder is None else _read(files, Path(files.folder))
    counts = Counter(parts["train"])
    counts.pop(UNKNOWN, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))  # equal counts must not depend on the reading order
    words = (UNKNOWN, *ranked[: vocabulary - 1])
    index = {word: i for i, word in enumerate(words)}
    return Text({name: torch.tensor([index.get(w, 0) for w in part]) for name, part in parts.items()}, words)


def _read(files: Files, root: Path) -> dict[str, list[str]]:
    """Return the words of the parts."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    train = _words(root / files.train)
    if files.held_out is None:
        return {"train": train, "validation": _words(root / files.validation), "test": _words(root / files.test)}
    held_out = _words(root / files.held_out)
    half = len(held_out) // 2
    return {"train": train, "validation": held_out[:half], "test": held_out[half:]}


def _words(path: Path) -> list[str]:
    """Return the words of a file, every line closed by ``<eos>``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], error.start
        raise DataError(f"{path}: expected UTF-8, got byte 0x{byte:02x} at {place}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    words = _closed(line.split() for line in lines)
    if not words:
        raise DataError(f"{path}: expected text, got no words")
    return words


def _closed(sentences: Iterable[list[str]]) -> list[str]:
    """Join the sentences that have words."""
    return [word for sentence in sentences if sentence for word in (*sentence, END)]


def _builtin() -> dict[str, list[str]]:
    """Return Python's help texts, cut at eight and nine tenths."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data.topics; give a folder of text files with --data") from None
    words = _closed(_WORD.findall(line) for name in sorted(topics) for line in topics[name].lower().splitlines())
    cuts = 8 * len(words) // 10, 9 * len(words) // 10
    return {"train": words[: cuts[0]], "validation": words[cuts[0] : cuts[1]], "test": words[cuts[1] :]}
