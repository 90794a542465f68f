"""Reads open files of this machine, in a directory or in the Hub's cache."""

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
            RewriteError: the file ends too early.
        """
        done = 0
        while done < len(buffer):
            size = _read_at(self.fd, buffer[done:], offset + done)
            if size == 0:
                raise self.ended_early(offset + done)
            done += size

    def ended_early(self, offset: int) -> RewriteError:
        """The error for a file that is shorter than its header says."""
        return RewriteError(f"{self._name}: the source file ended early, at byte {offset}")


if hasattr(os, "preadv"):

    def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

else:  # Windows, and macOS before 11; one thread uses a reader

    def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)
