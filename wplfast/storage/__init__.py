"""Files: safetensors with a format version and a checksum, written to a neighbour first and then renamed.

Any reader of safetensors reads them. They are written here, one tensor after the other, because the writer of that
library takes no views of one buffer without a copy of all of them, and does not tell the errno of a full disk.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..params import is_sharded
from .replacing import replacing

FilePath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

FORMAT_VERSION = "1"

#: How often a file is read again because another one took its place meanwhile.
_MAX_READS = 16

#: Metadata that every file has, but for the checksum, which those of older releases lack.
_VERSION, _KIND, _CHECKSUM = "wplfast.version", "wplfast.kind", "wplfast.crc32"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(path: FilePath, tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically: readers, and who comes after a crash, see the old file or the new one.

    No tensor is copied but from a device or where it is not contiguous, and then one at a time. Of tensors that are
    shards (DTensor) all ranks call this; they are gathered one at a time, and rank 0 writes.

    Raises:
        OSError: if the file cannot be written (no such directory, no permission, a full disk); nothing is left then.
        TypeError: if a tensor is of a type that files do not hold, or metadata are not text.
    """
    stamped = {**metadata, _KIND: kind, _VERSION: FORMAT_VERSION}
    for key, value in stamped.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"{name!r} must be a dense tensor of {', '.join(map(str, _DTYPES))}, got {_type(tensor)}")
    names = _order(tensors)

    def write(whole: Callable[[Tensor], Tensor]) -> None:
        with replacing(os.fsdecode(path)) as file:
            checksum = _checksum_of_description(stamped, tensors)
            file.write(_header(stamped | {_CHECKSUM: f"{0:08x}"}, tensors))
            for name in names:
                data = _data(whole(tensors[name]))
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            file.seek(0)
            file.write(_header(stamped | {_CHECKSUM: f"{checksum:08x}"}, tensors))

    if any(map(is_sharded, tensors.values())):
        from ..distributed.files import writing  # not with the package

        writing([tensors[name] for name in names], write)
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
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
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
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found, version = metadata.get(_KIND), metadata.get(_VERSION)
            if found != kind or version != FORMAT_VERSION:
                raise ValueError(
                    f"{path} must be a wplfast {kind} file of version {FORMAT_VERSION}, "
                    f"got kind {found!r}, version {version!r}"
                )
            # Copies, because these are maps of the file, which others may write to.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    expected = metadata.pop(_CHECKSUM, None)
    if expected is not None:
        checksum = _checksum_of_description(metadata, tensors)
        for name in _order(tensors):
            checksum = zlib.crc32(_data(tensors[name]), checksum)
        if expected != f"{checksum:08x}":
            raise ValueError(
                f"{path} is damaged, or something else changed it: its contents have the checksum {checksum:08x}, "
                f"those that were saved {expected}; take another copy, or save it anew"
            )
    return tensors, metadata


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of the bytes: wide types first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _described(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield names, and what the header says of the tensors."""
    start = 0
    for name in _order(tensors):
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        yield name, {"dtype": _type(tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end


def _header(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Return the header: the length of what follows in 8 bytes, then JSON, filled up to a multiple of 8."""
    text = json.dumps({"__metadata__": dict(metadata), **dict(_described(tensors))}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum_of_description(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of everything but the tensors' bytes, whatever a writer makes of spaces and order."""
    return zlib.crc32(json.dumps([sorted(metadata.items()), list(_described(tensors))]).encode())


def _data(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, of its own memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def _type(tensor: Tensor) -> str:
    """Return the name of a tensor's type in files."""
    return _DTYPES.get(tensor.dtype, str(tensor.dtype))
