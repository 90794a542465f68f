"""Where the files of an output directory are made: under temporary names, until they are synced."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from moescale.checkpoint.rewrite import Reader, pieces
from moescale.errors import DestinationError, RewriteError
from moescale.repos.base import Arrived, Made, Written, nobody
from moescale.repos.disk import BINARY, start_writeback
from moescale.repos.local_source import SHARE_HINT, LocalReader

_COPY_PIECE = 32 << 20
_BLOCK = 4096
_WRITEBACK = 16 << 20
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
    """A file under a temporary name."""

    def __init__(self, name: str, temporary: Path, size: int, digest: bool) -> None:
        self._size = size
        self._name = name
        self._temporary = temporary
        self.finished = False
        self._position = 0
        self._on_its_way = 0  # bytes that the system was asked to write to the disk
        self._digest = hashlib.sha256() if digest else None
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY
        self.fd = os.open(temporary, flags, 0o666)
        # Whoever tells the system to write waits while the disk is busy: not the thread that works.
        self._flusher = ThreadPoolExecutor(1, "moescale-flush")

    def write(self, data: memoryview) -> None:
        """Append the bytes."""
        if self._digest is not None:
            self._digest.update(data)
        while data:
            size = os.write(self.fd, data)
            data = data[size:]
            self._moved(size)

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append a stretch of another file, inside the kernel where it can."""
        in_kernel = isinstance(reader, LocalReader) and hasattr(os, "copy_file_range")
        if in_kernel and self._digest is None:
            assert isinstance(reader, LocalReader)
            while start < stop:
                size = self._kernel_copy(reader, start, stop)
                if not size:
                    break
                start += size
                yield size
        for piece in pieces(reader, start, stop):
            self.write(piece)
            yield len(piece)

    def _kernel_copy(self, reader: LocalReader, start: int, stop: int) -> int:
        """Copy one piece; 0 where this pair of files has no copy inside the kernel.

        File systems that share blocks do so from block to block only, so the first piece ends
        where a block ends.
        """
        piece = -start % _BLOCK or _COPY_PIECE
        try:
            size = os.copy_file_range(
                reader.fd, self.fd, min(piece, stop - start), start, self._position
            )
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return 0
            raise
        if size == 0:  # the end of the file, or a kernel that copies nothing: reading will tell
            return 0
        os.lseek(self.fd, self._position + size, os.SEEK_SET)
        self._moved(size)
        return size

    def _moved(self, size: int) -> None:
        self._position += size
        if self._position - self._on_its_way >= _WRITEBACK:
            stretch = self._on_its_way, self._position - self._on_its_way
            self._flusher.submit(start_writeback, self.fd, *stretch)
            self._on_its_way = self._position

    def finish(self) -> Made:
        """Sync; the sink renames."""
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
            self._flusher.shutdown(cancel_futures=True)
            os.close(fd)


class LocalBench:
    """Where the files of an output directory are made: its state folder, on any machine.

    Each attempt at a file has a name of its own, so that one which is believed dead and still
    writes can do no harm.
    """

    steps = 1

    def __init__(self, state: Path, marker: str | None = None) -> None:
        """`marker` names the file that shows that this is the folder which is meant."""
        self._state = state
        self._marker = marker

    def check(self) -> None:
        """Look for the marker.

        Raises:
            DestinationError: it is not there, so this is another folder, or none.
        """
        if self._marker is not None and not (self._state / self._marker).is_file():
            raise DestinationError(f"{self._state.parent}: cannot be seen", hint=SHARE_HINT)

    @contextmanager
    def shard(
        self, name: str, size: int, digest: bool = False, arrived: Arrived = nobody
    ) -> Iterator[LocalWriter]:
        """A writer for a file of `size` bytes; leaving without `finish` discards it."""
        self.check()
        temporary = self._state / f"{stem(name)}.{secrets.token_hex(8)}.tmp"
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
