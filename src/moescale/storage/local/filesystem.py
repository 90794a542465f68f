"""Durable files and folders that are never written through a planted link."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

if sys.platform == "linux":
    import fcntl

BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_FOLLOW = BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_HUGE_PAGE = 2 << 20
"""On x86 and on most ARM systems; elsewhere it only aligns."""

_FICLONERANGE = 0x4020940D  # from linux/fs.h on x86 and ARM; other systems refuse it

NOT_REGULAR = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, None})
"""Errors of `open_regular` for a path that is not a regular file; the disk causes all others."""


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file without following a link or waiting for a pipe.

    Raises:
        OSError: the path is not a regular file, or cannot be opened.
    """
    fd = os.open(path, flags | _NO_FOLLOW, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "is not a regular file", str(path))
    except OSError:
        os.close(fd)
        raise
    return fd


def write_new(path: Path, data: bytes) -> None:
    """Write a new file and sync it."""
    fd = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all bytes, even if the system takes only some at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def behind_link(root: Path, name: str) -> bool:
    """Whether a folder between `root` and a file below it is a link.

    `root` itself may be one, since the user named it.
    """
    between = PurePosixPath(name).parents[:-1]
    return any((root / folder).is_symlink() for folder in between)


if sys.platform == "win32":

    def sync_directory(path: Path) -> None:
        """Do nothing: Windows cannot sync directories."""

else:

    def sync_directory(path: Path) -> None:
        """Make the entries of a directory durable."""
        fd = os.open(path, os.O_RDONLY | BINARY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, with durable entries."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


def _buffers(area: mmap.mmap, start: int, count: int, size: int) -> list[memoryview]:
    whole = memoryview(area)
    return [whole[at : at + size] for at in range(start, start + count * size, size)]


if sys.platform == "linux":

    def make_buffers(count: int, size: int) -> list[memoryview]:
        """Buffers for direct I/O, in huge pages if the system has them.

        The system hands other memory to the disk in pages of 4 KiB, which took 1.4 times as long.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        area = mmap.mmap(-1, count * size + _HUGE_PAGE, flags=flags)
        with suppress(OSError):
            area.madvise(mmap.MADV_HUGEPAGE)
        return _buffers(area, -_address(area) % _HUGE_PAGE, count, size)

    def _address(area: mmap.mmap) -> int:
        """The address of a mapping; 0 if this Python cannot say, and Linux 6.7 aligns it anyway."""
        try:
            import ctypes
        except ImportError:  # built without libffi
            return 0
        return ctypes.addressof(ctypes.c_char.from_buffer(area))

    def set_direct_io(fd: int, on: bool) -> bool:
        """Switch direct I/O (past the page cache) on or off; returns whether it is on.

        Only a file system on a block device of its own gets it. Network, memory and overlay file
        systems, and btrfs with its checksums, are faster without it.
        """
        try:
            if not os.major(os.fstat(fd).st_dev):
                return False
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT * on)
        except OSError:
            return False
        return on

    def preallocate(fd: int, offset: int, size: int) -> None:
        """Reserve space in one piece; files that grow in parallel would interleave theirs."""
        with suppress(OSError):
            os.posix_fallocate(fd, offset, size)

    def clone_blocks(source: int, start: int, size: int, target: int, offset: int) -> bool:
        """Share whole blocks of one file with another (reflink); returns whether that worked.

        The reason for a failure does not matter: the reads and writes that follow report it.
        """
        try:
            fcntl.ioctl(target, _FICLONERANGE, struct.pack("@qQQQ", source, start, size, offset))
        except OSError:
            return False
        return True

else:

    def make_buffers(count: int, size: int) -> list[memoryview]:
        """Buffers that begin at a page."""
        return _buffers(mmap.mmap(-1, count * size), 0, count, size)

    def set_direct_io(fd: int, on: bool) -> bool:
        """Do nothing: other systems write through their cache."""
        return False

    def preallocate(fd: int, offset: int, size: int) -> None:
        """Do nothing: other systems allocate by themselves."""

    def clone_blocks(source: int, start: int, size: int, target: int, offset: int) -> bool:
        """Do nothing: only Linux is supported."""
        return False
