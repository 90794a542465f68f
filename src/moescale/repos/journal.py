"""The state of an unfinished run on disk: what is finished, and who may write."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from moescale.errors import DestinationError
from moescale.repos.base import Written

_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class Journal:
    """What an unfinished run has finished: one line the job, then one line a file.

    A torn last line is what a crash leaves; it is not counted, so its file is done again.
    """

    def __init__(self, path: Path, job: Any) -> None:
        self._mutex = threading.Lock()
        self.entries: dict[str, Any] = {}
        found = self.job_of(path)
        if found is not None and found != job:
            raise DestinationError(f"{path.parent.parent}: another run has just started here")
        if found is None:
            new = path.with_suffix(".tmp")
            with open(new, "wb") as file:
                file.write(json.dumps({"job": job}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            sync_directory(path.parent)
        else:
            self._read(path)
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as the run

    @staticmethod
    def job_of(path: Path) -> Any:
        """The job of an existing journal, None where there is no journal."""
        try:
            with open(path, "rb") as file:
                first = json.loads(file.readline())
            return first["job"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError, RecursionError, IsADirectoryError):
            return "not a journal of moescale"

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        complete = lines[:-1]  # what follows the last line end is torn
        for line in complete[1:]:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)
                self.entries[entry["file"]] = {
                    "size": entry["size"],
                    "sha256": entry["sha256"],
                    "stamp": entry["stamp"],
                }
        if lines[-1]:
            with open(path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in complete))

    def add(self, name: str, written: Written, stamp: list[int] | None) -> None:
        entry = {"file": name, "size": written.size, "sha256": written.sha256, "stamp": stamp}
        with self._mutex:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Lock:
    """One run at a time; the operating system lets go of it when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
        try:
            _lock_file(fd)
            held = os.fstat(fd).st_ino == self._path.stat().st_ino
        except OSError:
            held = False
        if not held:
            os.close(fd)
            raise DestinationError(
                f"{self._path.parent.parent}: another run of moescale is writing here",
                hint="Wait for it, or give another destination.",
            )
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


if sys.platform == "win32":
    import msvcrt

    def _lock_file(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def sync_directory(path: Path) -> None:
        """Directories cannot be synced on Windows."""

else:
    import fcntl

    def _lock_file(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def sync_directory(path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
