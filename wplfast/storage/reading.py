"""A file of ours opened tensor by tensor, so that one larger than memory can be looked at."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FilePath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

FORMAT_VERSION = "1"

#: Metadata that every file has, but for the checksum, which those of older releases lack.
VERSION, KIND, CHECKSUM = "wplfast.version", "wplfast.kind", "wplfast.crc32"

#: How files of each kind are read.
_READERS = {"fisher": "wplfast.Fisher.load(path)", "penalty": "WeightPlasticityLoss.load(path)"}

#: What files of ``torch.save`` begin with: an archive, or the pickle that older releases wrote.
_TORCH_SAVE = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")

#: Types that files hold, by their names there.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, without its values.

    Attributes:
        dtype: its type's name in files.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def itemsize(self) -> int:
        """Bytes of an element; 0 for a type that is none of ours."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 0


class OpenFile:
    """An open file of ours. Tensors are maps of the file: they take no memory of the process, and end with it.

    Attributes:
        path: of the file.
        metadata: its metadata, without the checksum.
        entries: name -> what the header says of the tensor.
        stored_checksum: the checksum that was stored with it; None in files of older releases.
    """

    def __init__(self, path: str, file: Any, kind: str) -> None:
        """Read the header.

        Raises:
            ValueError: if the file is of another kind or version.
        """
        self.path, self._file = path, file
        metadata = dict(file.metadata() or {})
        found, version = metadata.get(KIND), metadata.get(VERSION)
        if found != kind or version != FORMAT_VERSION:
            other = f"; load it with {_READERS[found]}" if found != kind and found in _READERS else ""
            raise ValueError(
                f"{path} must be a wplfast {kind} file of version {FORMAT_VERSION}, "
                f"got kind {found!r}, version {version!r}{other}"
            )
        self.stored_checksum: str | None = metadata.pop(CHECKSUM, None)
        self.metadata: dict[str, str] = metadata
        self.entries: dict[str, Entry] = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            self.entries[name] = Entry(part.get_dtype(), tuple(part.get_shape()))

    def get(self, name: str) -> Tensor:
        """Return a tensor, which may only be read."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def checksum(self) -> str:
        """Compute the checksum of what the file holds now, tensor by tensor."""
        checksum = checksum_of_description(self.metadata, self.entries)
        for name in in_order(self.entries):
            checksum = zlib.crc32(data_of(self.get(name)), checksum)
        return f"{checksum:08x}"

    def check(self) -> None:
        """Compare the checksum with the stored one, if there is one.

        Raises:
            ValueError: if they differ.
        """
        if self.stored_checksum is not None:
            self.compare(self.checksum())

    def compare(self, checksum: str) -> None:
        """Compare the checksum of the contents with the stored one.

        Raises:
            ValueError: if they differ.
        """
        if checksum != self.stored_checksum:
            raise ValueError(
                f"{self.path} is damaged, or something else changed it: its contents have the checksum {checksum}, "
                f"those that were saved {self.stored_checksum}; take another copy, or save it anew"
            )


@contextmanager
def opened(path: FilePath, kind: str) -> Iterator[OpenFile]:
    """Open a file of ours to read it tensor by tensor; nothing but its header is checked.

    Args:
        path: of the file.
        kind: what it must hold, such as ``"fisher"``.

    Raises:
        OSError: if it cannot be read: FileNotFoundError if there is none, IsADirectoryError if it is a directory.
        ValueError: if it is truncated, foreign, or of another kind or version.
    """
    path = os.fsdecode(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        with safe_open(path, framework="pt") as file:
            yield OpenFile(path, file, kind)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {_what_it_is(path, kind) or error}") from error


def _what_it_is(path: str, kind: str) -> str:
    """Say so if a file is one of ``torch.save``; "" if not."""
    with open(path, "rb") as file:
        if not file.read(4).startswith(_TORCH_SAVE):
            return ""
    writer = {"fisher": "Fisher", "penalty": "WeightPlasticityLoss"}.get(kind, kind)
    return f"it is one of torch.save, which torch.load reads; {writer}.save writes what is read here"


def in_order(entries: Mapping[str, Entry]) -> list[str]:
    """Return the names in the order of the bytes: wide types first, so that all are aligned."""
    return sorted(entries, key=lambda name: (-entries[name].itemsize, name))


def described(entries: Mapping[str, Entry]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield names, and what the header says of the tensors."""
    start = 0
    for name in in_order(entries):
        entry = entries[name]
        end = start + entry.numel * entry.itemsize
        yield name, {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end


def checksum_of_description(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> int:
    """Return the CRC-32 of everything but the tensors' bytes, whatever a writer makes of spaces and order."""
    return zlib.crc32(json.dumps([sorted(metadata.items()), list(described(entries))]).encode())


def data_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, of its own memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data
