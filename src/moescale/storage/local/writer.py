"""Writes the files of an output directory, under temporary names until they are synced."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moescale.checkpoint.rewrite import PIECE, Reader
from moescale.errors import DestinationError, RewriteError
from moescale.storage.base import Arrived, Made, Written, no_progress
from moescale.storage.local.filesystem import BINARY, pass_cache, reserve, share_blocks
from moescale.storage.local.source import SHARE_HINT
from moescale.storage.reader import FileReader

_KERNEL_PIECE = 32 << 20
_BLOCK = 4096
"""Disks are written past the page cache, and blocks shared, in multiples of this."""

_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EPERM,
    errno.ETXTBSY,
}


class LocalWriter:
    """A file under a temporary name.

    Its bytes gather in one piece of memory while a thread writes the other: past the page cache
    where the system can. The cache would be filled with the output in place of the source, at the
    price of a second copy, and the sync at the end would wait for the disk all the same.
    """

    def __init__(self, name: str, temporary: Path, size: int, digest: bool) -> None:
        self._size = size
        self._name = name
        self._temporary = temporary
        self.finished = False
        self._digest = hashlib.sha256() if digest else None
        self._kernel = not digest
        self._gathering, self._other = (memoryview(mmap.mmap(-1, PIECE)) for _ in range(2))
        self._gathered = 0
        self._position = 0  # the bytes that are gathered included
        self._thread = ThreadPoolExecutor(1, "moescale-write")
        self._writing: Future[None] | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY
        self.fd = os.open(temporary, flags, 0o666)
        self._uncached = pass_cache(self.fd, True)
        if self._uncached and digest:  # else a copy of blocks is tried first, which needs no room
            reserve(self.fd, 0, size)

    def write(self, data: memoryview) -> None:
        """Append the bytes."""
        while data:
            room = self._room(len(data))
            room[:] = data[: len(room)]
            data = data[len(room) :]

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append a stretch of another file, inside the kernel where that is better."""
        if self._kernel and isinstance(reader, FileReader):
            # File systems share whole blocks only.
            for size in self._through_memory(reader, start, min(start + -start % _BLOCK, stop)):
                start += size
                yield size
            while start < stop and (size := self._in_kernel(reader.fd, start, stop)):
                start += size
                yield size
        yield from self._through_memory(reader, start, stop)

    def _through_memory(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        while start < stop:
            room = self._room(stop - start)
            reader.read_into(room, start)
            start += len(room)
            yield len(room)

    def _room(self, size: int) -> memoryview:
        """Where the next bytes go, at most `size` of them; the caller fills all of it."""
        if self._gathered == PIECE:
            self._wait()
            self._writing = self._thread.submit(self._put, self._gathering)
            self._gathering, self._other = self._other, self._gathering
            self._gathered = 0
        room = self._gathering[self._gathered : self._gathered + size]
        self._gathered += len(room)
        self._position += len(room)
        return room

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _put_gathered(self) -> None:
        self._wait()
        self._put(self._gathering[: self._gathered])
        self._gathered = 0

    def _put(self, data: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(data)
        while data:
            if self._uncached and len(data) % _BLOCK:  # the last bytes, or what a short write left
                self._uncached = pass_cache(self.fd, False)
            try:
                size = os.write(self.fd, data)
            except OSError as error:
                if not self._uncached or error.errno != errno.EINVAL:
                    raise
                self._uncached = pass_cache(self.fd, False)  # a disk with larger blocks
                continue
            data = data[size:]

    def _in_kernel(self, source: int, start: int, stop: int) -> int:
        """Let the kernel copy or share one piece; 0 where it cannot, or not better than we can."""
        size = min(_KERNEL_PIECE, stop - start)
        if self._uncached:
            size -= size % _BLOCK
            if not size or (start - self._position) % _BLOCK:
                return 0
        self._put_gathered()
        if not self._uncached:
            size = self._copied(source, start, size)
        elif share_blocks(source, start, size, self.fd, self._position):
            os.lseek(self.fd, size, os.SEEK_CUR)
        else:
            reserve(self.fd, self._position, self._size - self._position)
            size = 0
        self._kernel = size > 0  # else the bytes are read, which tells whether they are there
        self._position += size
        return size

    def _copied(self, source: int, start: int, size: int) -> int:
        try:
            return os.copy_file_range(source, self.fd, size, start)
        except AttributeError:  # not on this system
            return 0
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return 0
            raise

    def finish(self) -> Made:
        """Sync; the destination renames."""
        self._put_gathered()
        if self._position != self._size:
            raise RewriteError(
                f"{self._name}: {self._position} bytes were written instead of {self._size}"
            )
        os.fsync(self.fd)
        self.close()
        sha256 = None if self._digest is None else self._digest.hexdigest()
        self.finished = True
        return Made(Written(self._size, sha256), self._temporary.name)

    def close(self) -> None:
        """Close the file; nothing is promised about it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._thread.shutdown(cancel_futures=True)
            os.close(fd)


@dataclass(frozen=True, slots=True)
class LocalWriters:
    """Opens writers in the state folder of an output directory, on any machine.

    Each attempt at a file has a name of its own, so that one which is believed dead and still
    writes can do no harm. `marker` names the file that shows that this is the folder which is
    meant.
    """

    state: Path
    marker: str | None = None
    steps: ClassVar[int] = 1

    def check(self) -> None:
        """Look for the marker.

        Raises:
            DestinationError: it is not there, so this is another folder, or none.
        """
        if self.marker is not None and not (self.state / self.marker).is_file():
            raise DestinationError(f"{self.state.parent}: cannot be seen", hint=SHARE_HINT)

    @contextmanager
    def open(
        self, name: str, size: int, digest: bool = False, arrived: Arrived = no_progress
    ) -> Iterator[LocalWriter]:
        """A writer for a file of `size` bytes; leaving without `finish` discards it."""
        self.check()
        temporary = self.state / f"{stem(name)}.{secrets.token_hex(8)}.tmp"
        writer = LocalWriter(name, temporary, size, digest)
        try:
            yield writer
        finally:
            writer.close()
            if not writer.finished:
                temporary.unlink(missing_ok=True)


def stem(name: str) -> str:
    """What the temporary names of one file begin with."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]
