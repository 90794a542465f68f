"""Writes the large files of an output directory, under temporary names until they are synced."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moescale.checkpoint.rewrite import Reader
from moescale.errors import DestinationError, RewriteError
from moescale.storage.base import FileRecord, OnSent, PendingFile, ignore
from moescale.storage.local.filesystem import (
    BINARY,
    clone_blocks,
    make_buffers,
    preallocate,
    set_direct_io,
)
from moescale.storage.local.source import SHARE_HINT
from moescale.storage.reader import FileReader

BUFFER = 2 << 20
"""Size of a buffer in bytes. Between two buffers the disk waits for about 40 us."""

_KERNEL_PIECE = 32 << 20
_BLOCK = 4096
"""Direct I/O and cloned blocks need multiples of this."""

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
    """Writes a file under a temporary name.

    One buffer fills up while a thread writes the other, past the page cache if the system can. The
    cache would need a second copy and hold the output instead of the source, and the sync at the
    end would still wait for the disk.
    """

    def __init__(self, name: str, temporary: Path, size: int, digest: bool) -> None:
        self._size = size
        self._name = name
        self._temporary = temporary
        self.finished = False
        self._digest = hashlib.sha256() if digest else None
        self._kernel = not digest
        self._gathering, self._other = make_buffers(2, BUFFER)
        self._gathered = 0
        self._position = 0  # includes the gathered bytes
        self._thread = ThreadPoolExecutor(1, "moescale-write")
        self._writing: Future[None] | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY
        self.fd = os.open(temporary, flags, 0o666)
        self._uncached = set_direct_io(self.fd, True)
        if self._uncached and digest:  # without a digest, cloned blocks are tried first
            preallocate(self.fd, 0, size)

    def write(self, data: memoryview) -> None:
        """Append the bytes."""
        while data:
            room = self._buffer(len(data))
            room[:] = data[: len(room)]
            data = data[len(room) :]

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append part of another file, inside the kernel if that is better."""
        if self._kernel and isinstance(reader, FileReader):
            # File systems clone whole blocks only.
            for size in self._copy_through_memory(
                reader, start, min(start + -start % _BLOCK, stop)
            ):
                start += size
                yield size
            while start < stop and (size := self._copy_in_kernel(reader.fd, start, stop)):
                start += size
                yield size
        yield from self._copy_through_memory(reader, start, stop)

    def _copy_through_memory(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        while start < stop:
            room = self._buffer(stop - start)
            reader.read_into(room, start)
            start += len(room)
            yield len(room)

    def _buffer(self, size: int) -> memoryview:
        """The buffer for the next bytes, at most `size`; the caller fills all of it."""
        if self._gathered == BUFFER:
            # Submitted before waiting for the other buffer: the thread goes straight on.
            writing = self._thread.submit(self._write_out, self._gathering)
            self._wait()
            self._writing = writing
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

    def _flush(self) -> None:
        self._wait()
        self._write_out(self._gathering[: self._gathered])
        self._gathered = 0

    def _write_out(self, data: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(data)
        while data:
            if self._uncached and len(data) % _BLOCK:  # the end of the file, or of a short write
                self._uncached = set_direct_io(self.fd, False)
            try:
                size = os.write(self.fd, data)
            except OSError as error:
                if not self._uncached or error.errno != errno.EINVAL:
                    raise
                self._uncached = set_direct_io(self.fd, False)  # a disk with larger blocks
                continue
            data = data[size:]

    def _copy_in_kernel(self, source: int, start: int, stop: int) -> int:
        """Let the kernel copy or clone one piece; 0 if it cannot, or would be no faster."""
        size = min(_KERNEL_PIECE, stop - start)
        if self._uncached:
            size -= size % _BLOCK
            if not size or (start - self._position) % _BLOCK:
                return 0
        self._flush()
        if not self._uncached:
            size = self._copy_range(source, start, size)
        elif clone_blocks(source, start, size, self.fd, self._position):
            os.lseek(self.fd, size, os.SEEK_CUR)
        else:
            preallocate(self.fd, self._position, self._size - self._position)
            size = 0
        self._kernel = size > 0  # otherwise the bytes are read, which finds a file that ended early
        self._position += size
        return size

    def _copy_range(self, source: int, start: int, size: int) -> int:
        try:
            return os.copy_file_range(source, self.fd, size, start)
        except AttributeError:  # not on this system
            return 0
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return 0
            raise

    def finish(self) -> PendingFile:
        """Sync the file; the destination renames it."""
        self._flush()
        if self._position != self._size:
            raise RewriteError(
                f"{self._name}: {self._position} bytes were written instead of {self._size}"
            )
        os.fsync(self.fd)
        self.close()
        sha256 = None if self._digest is None else self._digest.hexdigest()
        self.finished = True
        return PendingFile(FileRecord(self._size, sha256), self._temporary.name)

    def close(self) -> None:
        """Close the file, with no guarantee about its content."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._thread.shutdown(cancel_futures=True)
            os.close(fd)


@dataclass(frozen=True, slots=True)
class LocalWriters:
    """Opens writers in the state folder of an output directory, on any machine.

    Each attempt at a file has its own name, so a worker that seemed dead and still writes does no
    harm.

    Attributes:
        state: the state folder.
        marker: the name of a file that must be in it; None if only this machine writes.
        steps: see `moescale.storage.base.Writers`.
    """

    state: Path
    marker: str | None = None
    steps: ClassVar[int] = 1

    def check_reachable(self) -> None:
        """Look for the marker.

        Raises:
            DestinationError: it is missing, so this is a different folder, or none.
        """
        if self.marker is not None and not (self.state / self.marker).is_file():
            raise DestinationError(f"{self.state.parent}: cannot be reached", hint=SHARE_HINT)

    @contextmanager
    def open(
        self, name: str, size: int, digest: bool = False, on_sent: OnSent = ignore
    ) -> Iterator[LocalWriter]:
        """Open a writer for a file of `size` bytes; leaving without `finish` discards it."""
        self.check_reachable()
        temporary = self.state / f"{temporary_stem(name)}.{secrets.token_hex(8)}.tmp"
        writer = LocalWriter(name, temporary, size, digest)
        try:
            yield writer
        finally:
            writer.close()
            if not writer.finished:
                temporary.unlink(missing_ok=True)


def temporary_stem(name: str) -> str:
    """The common start of the temporary names of a file."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]
