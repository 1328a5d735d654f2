"""Digit images: scikit-learn's own set, or MNIST's IDX files from a folder; split by seed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_IDX_UBYTE = 0x08  # the third byte of an IDX file's magic number: unsigned bytes; the fourth is the number of axes
_STEMS = ("train", "t10k")
_FEWEST = 10  # so that no part of the split is empty
#: what the option for a folder says
DIGITS = "folder with MNIST's IDX files, gzipped or not; default: scikit-learn's digits"

Part = tuple[Tensor, Tensor]


class DataError(ValueError):
    """The data are missing or damaged; the message is one line for the user."""


@dataclass(frozen=True)
class Split:
    """Images [N, D] or [N, C, H, W] float32 and labels [N] int64 of the three parts, and what the data are called."""

    train: Part
    validation: Part
    test: Part
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.train[0].shape[1:])

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples of each part."""
        return {"train": len(self.train[1]), "validation": len(self.validation[1]), "test": len(self.test[1])}

    def map(self, function: Callable[[Part], Part]) -> Split:
        """Return the split with a function of each part in its place."""
        return Split(function(self.train), function(self.validation), function(self.test), self.name)

    def to(self, device: str) -> Split:
        """Move all parts to a device."""
        return self.map(lambda part: (part[0].to(device), part[1].to(device)))


def load_split(folder: str | None, seed: int) -> Split:
    """Load flat digits, pixels in [0, 1], split 70 : 10 : 20 into train, validation and test parts by the seed.

    Args:
        folder: holds MNIST's IDX files; None for the 1,797 digits that scikit-learn ships.
        seed: decides who goes where.

    Raises:
        DataError: if files are missing or damaged.
    """
    images, labels = _load(folder)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cuts = round(0.7 * len(labels)), round(0.8 * len(labels))
    train, validation, test = ((images[part], labels[part]) for part in torch.tensor_split(order, cuts))
    return Split(train, validation, test, "scikit-learn digits" if folder is None else "MNIST")


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Format: two zero bytes, the type (8 = unsigned byte), the number of axes, one big-endian uint32 per axis, the data.

    Raises:
        DataError: if the file cannot be read, is of another kind, or has too few or too many bytes.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(content) < 4:
        raise DataError(f"{path}: expected an IDX file, got {len(content)} bytes")
    zero, kind, axes = struct.unpack(">HBB", content[:4])
    if zero != 0 or kind != _IDX_UBYTE or axes == 0:
        raise DataError(f"{path}: expected IDX unsigned bytes (magic 00 00 08 ..), got {content[:4].hex(' ')}")
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"{path}: truncated in its header of {start} bytes, got {len(content)}")
    shape = struct.unpack(f">{axes}I", content[4:start])
    size = math.prod(shape)
    if len(content) - start != size:
        raise DataError(f"{path}: expected {size:,} bytes for shape {list(shape)}, got {len(content) - start:,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=1)
def _load(folder: str | None) -> tuple[Tensor, Tensor]:
    """Return all images and labels; a process reads them once."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target, dtype=torch.int64)
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    pairs = [_pair(root, stem) for stem in _STEMS if _find(root, f"{stem}-images-idx3-ubyte")]
    if not pairs:
        names = ", ".join(f"{stem}-images-idx3-ubyte[.gz]" for stem in _STEMS)
        raise DataError(f"{root}: expected MNIST's IDX files ({names} and their labels), found none")
    if len({images.shape[1] for images, _ in pairs}) > 1:
        raise DataError(f"{root}: the images of the parts differ in size")
    images, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    if len(labels) < _FEWEST:
        raise DataError(f"{root}: expected at least {_FEWEST} digits, got {len(labels)}")
    return torch.from_numpy(images.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


def _pair(root: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images, flattened, and the labels of one part."""
    image_path, label_path = (_find(root, f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if image_path is None or label_path is None:
        raise DataError(f"{root}: {stem}-images-idx3-ubyte is there without {stem}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        got = f"{list(images.shape)} and {list(labels.shape)}"
        raise DataError(f"{image_path}: expected images [N, H, W] and labels [N], got {got}")
    if labels.max(initial=0) > 9:
        raise DataError(f"{label_path}: expected labels 0 to 9, got {labels.max()}")
    return images.reshape(len(images), -1), labels


def _find(root: Path, name: str) -> Path | None:
    """Return the file of this name, plain or gzipped."""
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)
