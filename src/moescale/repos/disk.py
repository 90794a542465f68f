"""Files and folders on disk: never through a link that somebody planted, and durable."""

from __future__ import annotations

import errno
import functools
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_PLAIN = BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

NOT_PLAIN = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, None})
"""Errors of `open_plain` that say what stands there, not that something is wrong with the disk."""


def open_plain(path: Path, flags: int) -> int:
    """Open a regular file that is no link; a pipe is not waited for.

    Raises:
        OSError: it is something else, besides what opening raises.
    """
    fd = os.open(path, flags | _PLAIN, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "is not a regular file", str(path))
    except OSError:
        os.close(fd)
        raise
    return fd


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, and sync it."""
    fd = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write the bytes, however few at a time the system takes."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def behind_link(root: Path, name: str) -> bool:
    """Whether one of the folders between `root` and a file below it is a link."""
    return any((root / folder).is_symlink() for folder in PurePosixPath(name).parents)


if sys.platform == "win32":

    def sync_directory(path: Path) -> None:
        """Directories cannot be synced on Windows."""

else:

    def sync_directory(path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | BINARY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, each with a durable entry in the one above."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call that starts writing to the disk without waiting for it."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin with what was written, so that the sync at the end has little to wait for.

    A hint: what it cannot do, the sync does.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, size, 2)  # SYNC_FILE_RANGE_WRITE
