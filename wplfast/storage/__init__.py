"""Files: safetensors with a format version and a checksum, written to a neighbour first and then renamed.

Any reader of safetensors reads them. They are written here, one tensor after the other, because the writer of that
library takes no views of one buffer without a copy of all of them, and does not tell the errno of a full disk.
``reading.py`` opens them tensor by tensor, ``replacing.py`` is the file that is replaced whole or not at all.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..params import is_sharded
from .reading import (
    CHECKSUM,
    DTYPES,
    FORMAT_VERSION,
    KIND,
    VERSION,
    Entry,
    FilePath,
    OpenFile,
    checksum_of_description,
    data_of,
    described,
    in_order,
    opened,
)
from .replacing import replacing

__all__ = ["Deferred", "FilePath", "OpenFile", "load", "opened", "save"]

#: How often a file is read again because another one took its place meanwhile.
_MAX_READS = 16

#: Names in files of the types that they hold.
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written, so that not all need be in memory at a time.

    Args:
        dtype: its type.
        shape: its shape.
        make: returns it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def save(path: FilePath, tensors: Mapping[str, Tensor | Deferred], kind: str, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically: readers, and who comes after a crash, see the old file or the new one.

    No tensor is copied but from a device or where it is not contiguous, and then one at a time. Of tensors that are
    shards (DTensor) all ranks call this; they are gathered one at a time, and rank 0 writes.

    Raises:
        OSError: if the file cannot be written (no such directory, no permission, a full disk); nothing is left then.
        TypeError: if a tensor is of a type that files do not hold, or metadata are not text.
    """
    stamped = {**metadata, KIND: kind, VERSION: FORMAT_VERSION}
    for key, value in stamped.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    entries = {name: _entry(name, tensor) for name, tensor in tensors.items()}
    names = in_order(entries)

    def write(whole: Callable[[Tensor], Tensor]) -> None:
        with replacing(os.fsdecode(path)) as file:
            checksum = checksum_of_description(stamped, entries)
            file.write(_header(stamped | {CHECKSUM: f"{0:08x}"}, entries))
            for name in names:
                data = data_of(whole(_made(name, tensors[name])))
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            file.seek(0)
            file.write(_header(stamped | {CHECKSUM: f"{checksum:08x}"}, entries))

    shards = [tensor for name in names if isinstance(tensor := tensors[name], Tensor)]
    if any(map(is_sharded, shards)):
        from ..distributed.files import writing  # not with the package

        writing(shards, write)
    else:
        write(lambda tensor: tensor)


def load(path: FilePath, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Raises:
        OSError: if the file cannot be read: FileNotFoundError if there is none, IsADirectoryError if it is a directory.
        ValueError: if the file is truncated, foreign, of another kind or version, or its contents are not those that
            were saved.
    """
    path = os.fsdecode(path)
    for _ in range(_MAX_READS):
        before = _identity(path)
        try:
            found = _load(path, kind)
        except ValueError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return found
    return _load(path, kind)


def _identity(path: str) -> tuple[int, ...]:
    """Tell a file from one that replaced it: safetensors opens it twice, for its header and for its tensors."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _load(path: str, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a file that nobody replaces meanwhile."""
    with opened(path, kind) as file:
        # Copies, because these are maps of the file, which others may write to.
        tensors = {name: file.get(name).clone() for name in file.entries}
        if file.stored_checksum is not None:
            checksum = checksum_of_description(file.metadata, file.entries)
            for name in in_order(file.entries):
                checksum = zlib.crc32(data_of(tensors[name]), checksum)
            file.compare(f"{checksum:08x}")
    return tensors, file.metadata


def _entry(name: str, tensor: Tensor | Deferred) -> Entry:
    """Return what a file's header says of a tensor.

    Raises:
        TypeError: if files do not hold such tensors.
    """
    is_dense = isinstance(tensor, Deferred) or (tensor.layout == torch.strided and not tensor.is_meta)
    if tensor.dtype not in _NAMES or not is_dense:
        got = _NAMES.get(tensor.dtype, str(tensor.dtype))
        raise TypeError(f"{name!r} must be a dense tensor of {', '.join(map(str, _NAMES))}, got {got}")
    return Entry(_NAMES[tensor.dtype], tuple(tensor.shape))


def _made(name: str, tensor: Tensor | Deferred) -> Tensor:
    """Return a tensor, made now if it was deferred."""
    if isinstance(tensor, Tensor):
        return tensor
    made = tensor.make()
    if (made.dtype, tuple(made.shape)) != (tensor.dtype, tensor.shape):
        expected = f"{tensor.dtype} {list(tensor.shape)}"
        raise TypeError(f"{name!r} must be made as {expected}, got {made.dtype} {list(made.shape)}")
    return made


def _header(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    """Return the header: the length of what follows in 8 bytes, then JSON, filled up to a multiple of 8."""
    text = json.dumps({"__metadata__": dict(metadata), **dict(described(entries))}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
