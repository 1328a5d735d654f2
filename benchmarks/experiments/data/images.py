"""Images with their height, width and channels: digits (scikit-learn's, MNIST's) or CIFAR-10 in its binary version."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .digits import DataError, Part, Split, load_split

_SHAPE = (3, 32, 32)  # of CIFAR's images; a record is a label's byte and the image's
_RECORD = 1 + math.prod(_SHAPE)
_CLASSES = 10


@lru_cache(maxsize=2)
def load_images(folder: str | None, seed: int) -> Split:
    """Load images of mean 0 and deviation 1; a process reads them once for each seed.

    Args:
        folder: holds MNIST's IDX files, or CIFAR-10's ``data_batch_*.bin`` and ``test_batch.bin``; None for
            scikit-learn's digits. Digits are split 70 : 10 : 20, CIFAR's training images 90 : 10.
        seed: decides who goes where.

    Raises:
        DataError: if files are missing or damaged.
    """
    if folder is not None and _is_cifar(Path(folder)):
        split = _cifar(Path(folder), seed)
    else:
        split = load_split(folder, seed)
        side = math.isqrt(*split.shape)
        if split.shape != (side * side,):
            raise DataError(f"{folder}: expected square images, got {split.shape[0]} pixels")
        split = split.map(lambda part: (part[0].view(-1, 1, side, side), part[1]))
    mean = split.train[0].mean((0, 2, 3), keepdim=True)
    std = split.train[0].std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return split.map(lambda part: ((part[0] - mean) / std, part[1]))


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of CIFAR-10's binary version: images [N, 3, 32, 32] and labels [N], bytes.

    Raises:
        DataError: if the file cannot be read, is empty or cut off, or has other labels.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not content or len(content) % _RECORD:
        raise DataError(f"{path}: expected records of {_RECORD:,} bytes, got {len(content):,} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    if records[:, 0].max() >= _CLASSES:
        raise DataError(f"{path}: expected labels 0 to {_CLASSES - 1}, got {records[:, 0].max()}")
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0]


def _is_cifar(root: Path) -> bool:
    """Tell whether a folder holds CIFAR-10.

    Raises:
        DataError: if it holds the version of pickles, which could run anything when they are read.
    """
    if any(root.glob("data_batch_*.bin")):
        return True
    if any(root.glob("data_batch_*")):
        raise DataError(f"{root}: expected CIFAR-10's binary version (data_batch_*.bin), got Python pickles")
    return False


def _cifar(root: Path, seed: int) -> Split:
    """Read CIFAR-10."""
    if not (root / "test_batch.bin").is_file():
        raise DataError(f"{root}: data_batch_*.bin are there without test_batch.bin")
    files = [read_cifar(path) for path in sorted(root.glob("data_batch_*.bin"))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*files, strict=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = round(0.9 * len(labels))
    if not 0 < cut < len(labels):
        raise DataError(f"{root}: expected at least 6 training images, got {len(labels)}")
    train, validation = ((images[part], labels[part]) for part in (order[:cut], order[cut:]))
    parts = (train, validation, read_cifar(root / "test_batch.bin"))
    return Split(*(_tensors(*part) for part in parts), name="CIFAR-10")


def _tensors(images: np.ndarray, labels: np.ndarray) -> Part:
    """Return pixels in [0, 1], and labels."""
    return torch.from_numpy(images.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))
