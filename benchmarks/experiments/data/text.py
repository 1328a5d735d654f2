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
    """Word indices [L] int64 of the three parts, and the words."""

    train: Tensor
    validation: Tensor
    test: Tensor
    words: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of words of each part and of the vocabulary."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {**{name: len(part) for name, part in parts.items()}, "vocabulary": len(self.words)}


@lru_cache(maxsize=2)
def load_text(files: Files, vocabulary: int) -> Text:
    """Load a text; a process reads it once.

    Args:
        files: where it is.
        vocabulary: the most frequent words of the training part that are kept; all others become ``<unk>``.

    Raises:
        DataError: if a file is missing, is no UTF-8, or has no words.
    """
    train, validation, test = _builtin() if files.folder is None else _read(files)
    counts = Counter(train)
    counts.pop(UNKNOWN, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))  # equal counts must not depend on the reading order
    words = (UNKNOWN, *ranked[: vocabulary - 1])
    index = {word: i for i, word in enumerate(words)}
    parts = [torch.tensor([index.get(word, 0) for word in part]) for part in (train, validation, test)]
    return Text(parts[0], parts[1], parts[2], words)


def columns(words: Tensor, count: int) -> Tensor:
    """Cut a text into ``count`` rows of equal length, [count, L // count]; the rest is left out."""
    return words[: len(words) // count * count].view(count, -1)


def _read(files: Files) -> tuple[list[str], list[str], list[str]]:
    """Return the words of the parts."""
    assert files.folder is not None
    root = Path(files.folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    train = _words(root / files.train)
    if files.held_out is None:
        return train, _words(root / files.validation), _words(root / files.test)
    held_out = _words(root / files.held_out)
    return train, held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]


def _words(path: Path) -> list[str]:
    """Return the words of a file, every line closed by ``<eos>``.

    Raises:
        DataError: if there is no such file, or it is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return _closed((line.split() for line in lines), str(path))


def _closed(sentences: Iterable[list[str]], where: str) -> list[str]:
    """Join the sentences that have words.

    Raises:
        DataError: if there are none.
    """
    words = [word for sentence in sentences if sentence for word in (*sentence, END)]
    if not words:
        raise DataError(f"{where}: expected text, got no words")
    return words


def _builtin() -> tuple[list[str], list[str], list[str]]:
    """Return Python's help texts, cut at eight and nine tenths.

    Raises:
        DataError: if this Python came without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data.topics; give a folder of text files with --data") from None
    lines = (line for name in sorted(topics) for line in topics[name].lower().splitlines())
    words = _closed((_WORD.findall(line) for line in lines), "pydoc_data.topics")
    cuts = 8 * len(words) // 10, 9 * len(words) // 10
    return words[: cuts[0]], words[cuts[0] : cuts[1]], words[cuts[1] :]
