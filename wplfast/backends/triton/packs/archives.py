"""Packs: Triton kernels that were compiled when the package was built, one file for each kind of GPU.

A pack is a zip archive ``sm_90.zip`` of a manifest and of cubins, which ``precompile`` makes. It holds for the sources
that it was made from, and for GPUs that run its code: those of compute capability 8.x as far as they are not older than
the target, from 9.0 on those of the target alone, as Triton then compiles for that very architecture.

Environment:
    WPLFAST_PACKS: the folder of the packs, in place of the one in the package.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import wplfast._C as _C
except ImportError:  # packs are launched from C++
    _C = None

#: Version of the layout described here and in :class:`Precompiled`.
FORMAT = 1
MANIFEST = "manifest.json"
#: The class of kernels that came from a pack, for ``isinstance``.
LOADED: Any = () if _C is None else _C.LoadedKernel
#: The C++ extension, or None.
EXTENSION: Any = _C

logger = logging.getLogger(__name__)


class PackError(Exception):
    """A pack that cannot be used, with the reason."""


@dataclass(frozen=True)
class Precompiled:
    """One kernel of a pack: the name of its function, its code, and what a launch must know."""

    function: str
    image: str
    warps: int
    shared: int
    parameters: str


class Pack:
    """An archive of kernels for one target.

    Args:
        path: the file. It is read once: it may be replaced, or the process forked, while kernels are still to come.

    Raises:
        PackError: if it is no pack, or was made from other sources.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
            manifest = json.loads(self._archive.read(MANIFEST))
            if manifest["format"] != FORMAT:
                raise PackError(f"has format {manifest['format']}, expected {FORMAT}")
            if manifest["sources"] != sources():
                raise PackError("was made from other kernel sources")
            self.arch, self.triton = int(manifest["arch"]), str(manifest["triton"])
            #: name of the Triton function -> what its arguments are like -> kernel
            self.kernels: dict[str, dict[str, Precompiled]] = {
                name: {key: Precompiled(**entry) for key, entry in kernels.items()}
                for name, kernels in manifest["kernels"].items()
            }
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackError(f"cannot be read: {type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        """Return the number of kernels."""
        return sum(map(len, self.kernels.values()))

    def image(self, kernel: Precompiled) -> bytes:
        """Return a kernel's code; raise PackError if it is damaged."""
        try:
            return self._archive.read(kernel.image)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as error:
            raise PackError(f"its code cannot be read: {error}") from error


@lru_cache
def sources() -> str:
    """Return a hash of this backend's sources: kernels, and the launches that choose their constants."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def folder() -> Path:
    """Return the folder of the packs, which need not exist."""
    chosen = os.environ.get("WPLFAST_PACKS")
    return Path(chosen) if chosen else Path(__file__).parent


def present() -> dict[int, Path]:
    """Return the files of packs by their target, such as 90."""
    found = {path: re.fullmatch(r"sm_(\d+)\.zip", path.name) for path in sorted(folder().glob("sm_*.zip"))}
    return {int(match[1]): path for path, match in found.items() if match}


def serves(arch: int, capability: tuple[int, int]) -> bool:
    """Tell whether code for a target runs on GPUs of a compute capability."""
    major, minor = divmod(arch, 10)
    return (major, minor) == capability or (major == capability[0] == 8 and minor <= capability[1])


@lru_cache
def open_pack(path: Path) -> Pack | None:
    """Return a pack; None, with one warning, if it cannot be used."""
    try:
        return Pack(path)
    except PackError as error:
        logger.warning("%s %s; Triton compiles its kernels instead", path, error)
        return None


def find(capability: tuple[int, int]) -> Pack | None:
    """Return the pack for a GPU: of those that serve it, the one with the nearest target."""
    for arch, path in sorted(present().items(), reverse=True):
        pack = open_pack(path) if serves(arch, capability) else None
        if pack is not None and serves(pack.arch, capability):
            return pack
    return None
