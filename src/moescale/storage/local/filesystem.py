"""Files and folders on disk: never through a link that somebody planted, and durable."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

if sys.platform == "linux":
    import fcntl

BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_PLAIN = BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_FICLONERANGE = 0x4020940D  # of linux/fs.h on x86 and ARM; elsewhere it is refused

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
    """Whether one of the folders between `root` and a file below it is a link.

    `root` may be one: it is what the user named.
    """
    between = PurePosixPath(name).parents[:-1]
    return any((root / folder).is_symlink() for folder in between)


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


if sys.platform == "linux":

    def pass_cache(fd: int, on: bool) -> bool:
        """Write past the page cache from now on, or no longer; whether it is so then.

        Only on a file system with a block device of its own: those on a network, in memory or over
        others (and btrfs, which has checksums to make) are best left to do it their way.
        """
        try:
            if not os.major(os.fstat(fd).st_dev):
                return False
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT * on)
        except OSError:
            return False
        return on

    def reserve(fd: int, offset: int, size: int) -> None:
        """Ask for room in one piece, where several files that grow at once would mix theirs."""
        with suppress(OSError):
            os.posix_fallocate(fd, offset, size)

    def share_blocks(source: int, start: int, size: int, target: int, offset: int) -> bool:
        """Let a stretch of one open file be a stretch of another too, in whole blocks; if it can.

        Where it cannot, whatever the reason, reading and writing will do, or say why not.
        """
        try:
            fcntl.ioctl(target, _FICLONERANGE, struct.pack("@qQQQ", source, start, size, offset))
        except OSError:
            return False
        return True

else:

    def pass_cache(fd: int, on: bool) -> bool:
        """Other systems write through their cache."""
        return False

    def reserve(fd: int, offset: int, size: int) -> None:
        """Other systems decide by themselves."""

    def share_blocks(source: int, start: int, size: int, target: int, offset: int) -> bool:
        """Other systems are not asked."""
        return False
