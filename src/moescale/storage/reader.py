"""Reads open files of this machine: of a directory, or of the Hub's cache."""

from __future__ import annotations

import os

from moescale.errors import RewriteError


class FileReader:
    """Random access to one open file."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self._name = name

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer from `offset` on.

        Raises:
            RewriteError: the file ends before.
        """
        done = 0
        while done < len(buffer):
            size = _read_at(self.fd, buffer[done:], offset + done)
            if size == 0:
                raise self.ended(offset + done)
            done += size

    def ended(self, offset: int) -> RewriteError:
        """The error for a file that is shorter than its header says."""
        return RewriteError(f"{self._name}: the source file ended early, at byte {offset}")


if hasattr(os, "preadv"):

    def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

else:  # Windows, and macOS before 11; each reader is used by one thread only

    def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)
