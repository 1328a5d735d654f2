"""Files: safetensors with a format version, written to a neighbour first and then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = "1"


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    stamped = {**metadata, "wplfast.kind": kind, "wplfast.version": FORMAT_VERSION}
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(contiguous, temporary, metadata=stamped)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, foreign, or of another kind or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found, version = metadata.get("wplfast.kind"), metadata.get("wplfast.version")
            if found != kind or version != FORMAT_VERSION:
                raise ValueError(
                    f"{os.fspath(path)} must be a wplfast {kind} file of version {FORMAT_VERSION}, "
                    f"got kind {found!r}, version {version!r}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error


def _umask() -> int:
    """Return the process's file creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
