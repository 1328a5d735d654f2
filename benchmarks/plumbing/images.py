"""Images with their height, width and channels: digits (scikit-learn's, MNIST's) or CIFAR-10 in its binary version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import DataError, load_split

Part = tuple[Tensor, Tensor]
_SHAPE = (3, 32, 32)  # of CIFAR's images; a record is a label's byte and the image's
_RECORD = 1 + math.prod(_SHAPE)
_CLASSES = 10


@dataclass(frozen=True)
class ImageSplit:
    """Images [N, C, H, W] float32 and labels [N] int64 of the three parts; pixels have mean 0 and deviation 1."""

    train: Part
    validation: Part
    test: Part
    name: str

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each part."""
        return {"train": len(self.train[1]), "validation": len(self.validation[1]), "test": len(self.test[1])}

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.train[0].shape[1:])


@lru_cache(maxsize=2)
def load_images(folder: str | None, seed: int) -> ImageSplit:
    """Load images; a process reads them once for each seed.

    Args:
        folder: holds MNIST's IDX files, or CIFAR-10's ``data_batch_*.bin`` and ``test_batch.bin``; None for
            scikit-learn's digits. Digits are split 70 : 10 : 20, CIFAR's training images 90 : 10.
        seed: decides who goes where.

    Raises:
        DataError: if files are missing or damaged.
    """
    if folder is not None and _is_cifar(Path(folder)):
        parts, name = _cifar(Path(folder), seed), "CIFAR-10"
    else:
        split = load_split(folder, seed)
        side = math.isqrt(split.n_features)
        if side * side != split.n_features:
            raise DataError(f"{folder}: expected square images, got {split.n_features} pixels")
        parts = [(x.view(-1, 1, side, side), y) for x, y in (split.train, split.validation, split.test)]
        name = "MNIST" if folder else "scikit-learn digits"
    mean = parts[0][0].mean((0, 2, 3), keepdim=True)
    std = parts[0][0].std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    train, validation, test = (((x - mean) / std, y) for x, y in parts)
    return ImageSplit(train, validation, test, name)


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


def _cifar(root: Path, seed: int) -> list[Part]:
    """Read CIFAR-10."""
    if not (root / "test_batch.bin").is_file():
        raise DataError(f"{root}: data_batch_*.bin are there without test_batch.bin")
    files = [read_cifar(path) for path in sorted(root.glob("data_batch_*.bin"))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*files, strict=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = round(0.9 * len(labels))
    if not 0 < cut < len(labels):
        raise DataError(f"{root}: expected at least 6 training images, got {len(labels)}")
    parts = [(images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])]
    parts.append(read_cifar(root / "test_batch.bin"))
    return [(torch.from_numpy(x.astype(np.float32) / 255), torch.from_numpy(y.astype(np.int64))) for x, y in parts]
