"""A file that is written beside the one that it replaces, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` when the context ends, unless an error ends it.

    It is on the disk before it is renamed. A file that is replaced keeps its permissions, and a symbolic link stays
    one: what it points to is replaced. A new file has the permissions that new files have. Writers hold a lock on their
    temporary files: one without it was left by a writer that was killed, and the next writer of ``path`` removes it.

    Raises:
        OSError: if the file cannot be written, with ``path`` as its file name; no temporary file is left then.
    """
    try:
        target = os.path.realpath(path)
        mode = _replaced_mode(path, target)
        folder, name = os.path.split(target)
        prefix = f".wplfast-{zlib.crc32(os.fsencode(name)):08x}-"  # short, however long the name is
        _remove_abandoned(folder, prefix)
        temporary, file = _create(os.path.join(folder, prefix), 0o666 if mode is None else 0o600)
        try:
            with file:
                yield file
                file.flush()
                if mode is not None:
                    os.chmod(temporary, mode)
                os.fsync(file.fileno())
                os.replace(temporary, target)  # still locked, so that nobody takes it for abandoned
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync(folder)
    except OSError as error:
        if error.errno is None or error.filename == path:
            raise
        raise OSError(error.errno, error.strerror, path) from error


def _replaced_mode(path: str, target: str) -> int | None:
    """Return the permissions of the file that will be replaced; None if there is none.

    Raises:
        OSError: if something other than a file is there, or no folder for one.
    """
    if os.path.isdir(target) or path.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "must name a file to save to, not a directory", path)
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(errno.ENOENT, f"there is no directory {os.path.dirname(target)!r} to save to", path)
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "must name a file to save to, not a device, pipe or socket", path)
    return stat.S_IMODE(status.st_mode)


def _create(prefix: str, mode: int) -> tuple[str, BinaryIO]:
    """Create a temporary file and lock it."""
    while True:
        temporary = f"{prefix}{secrets.token_hex(8)}.tmp"
        file = open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        if _lock(file) is not False and os.path.exists(temporary):
            return temporary, file
        file.close()  # another writer took it for abandoned before it was locked


def _remove_abandoned(folder: str, prefix: str) -> None:
    """Remove temporary files of killed writers: those that nobody holds a lock on."""
    for temporary in glob.glob(os.path.join(glob.escape(folder), f"{prefix}*.tmp")):
        with contextlib.suppress(OSError), open(temporary, "r+b") as file:
            if _lock(file):
                os.unlink(temporary)


def _lock(file: BinaryIO) -> bool | None:
    """Lock a file as long as it is open; False if it is locked already, None if there are no locks here.

    A lock belongs to the open file, so it ends with a process however that ends, and keeps threads apart too.
    """
    try:
        import fcntl  # of POSIX alone

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _sync(folder: str) -> None:
    """Bring a folder's entries to the disk, where its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
