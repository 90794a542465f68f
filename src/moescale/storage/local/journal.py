"""The state of an unfinished run on disk: a journal of finished files, and a lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from moescale.errors import DestinationError
from moescale.storage.base import FileRecord
from moescale.storage.journal_entry import NOT_A_JOURNAL, PARSE_ERRORS, parse_entry
from moescale.storage.local.filesystem import (
    NOT_REGULAR,
    open_regular,
    sync_directory,
    write_all,
    write_new,
)

STATE = ".moescale"
"""The folder in an unfinished destination that holds journal, lock and temporary files."""

JOURNAL = "journal.jsonl"

IGNORED_FOLDERS = frozenset({".git", ".cache", STATE})
"""Folders at the top of a directory that do not belong to the checkpoint."""

_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class Journal:
    """The journal of a run: one line for the job, then one for each finished file.

    A crash may leave a torn last line; it is ignored, so its file is written again.
    """

    def __init__(self, path: Path, job: Any) -> None:
        self._mutex = threading.Lock()
        self._fd = -1
        self.entries: dict[str, Any] = {}
        found = self.job_of(path)
        if found is not None and found != job:
            raise DestinationError(f"{path.parent.parent}: another run has just started here")
        if found is None:
            new = path.with_suffix(".tmp")
            new.unlink(missing_ok=True)
            write_new(new, json.dumps({"job": job}).encode() + b"\n")
            os.replace(new, path)
            sync_directory(path.parent)
        self._fd = open_regular(path, os.O_RDWR | os.O_APPEND)
        try:
            self._read()
        except OSError:
            self.close()
            raise

    @staticmethod
    def job_of(path: Path) -> Any:
        """The job of a journal; None if there is none, a text if moescale did not write it."""
        try:
            with open(open_regular(path, os.O_RDONLY), "rb") as file:
                line = file.readline()
            return json.loads(line)["job"] if line.endswith(b"\n") else NOT_A_JOURNAL
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PARSE_ERRORS:
            return NOT_A_JOURNAL
        except OSError as error:
            if error.errno in NOT_REGULAR:
                return NOT_A_JOURNAL
            raise

    def _read(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            lines = file.read().split(b"\n")
        complete = lines[:-1]  # the rest, after the last line end, is torn
        for line in complete[1:]:
            with contextlib.suppress(*PARSE_ERRORS):
                name, entry = _entry(json.loads(line))
                self.entries[name] = entry
        if lines[-1]:
            os.ftruncate(self._fd, sum(len(line) + 1 for line in complete))

    def add(self, name: str, record: FileRecord, stamp: list[int] | None) -> None:
        entry = {"file": name, "size": record.size, "sha256": record.sha256, "stamp": stamp}
        with self._mutex:
            write_all(self._fd, json.dumps(entry).encode() + b"\n")
            os.fsync(self._fd)
            self.entries[name] = entry

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # every line was synced
                os.close(fd)


def _entry(line: Any) -> tuple[str, dict[str, Any]]:
    """A file's name and entry; raises one of `PARSE_ERRORS` if moescale did not write it."""
    name, stamp = line["file"], line["stamp"]
    record = parse_entry(name, line)
    if [type(value) for value in stamp] != [int] * 3 or stamp[0] != record.size:
        raise ValueError
    return name, {"size": record.size, "sha256": record.sha256, "stamp": stamp}


class Lock:
    """A lock for one run at a time; the operating system releases it when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            DestinationError: another run holds it.
            OSError: the file system has no locks.
        """
        fd = open_regular(self._path, os.O_RDWR | os.O_CREAT)
        try:
            _lock_file(fd)
            held = os.fstat(fd).st_ino == self._path.stat().st_ino
        except OSError as error:
            if error.errno not in (*_HELD, errno.ENOENT):
                os.close(fd)
                raise
            held = False
        if not held:
            os.close(fd)
            raise DestinationError(
                f"{self._path.parent.parent}: another run of moescale is writing here",
                hint="Wait for it, or give another destination.",
            )
        self._fd = fd

    def release(self) -> None:
        """Release the lock."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def remove(self) -> None:
        """Release the lock and remove its file, if possible before another run can take it."""
        try:
            if sys.platform == "win32":  # cannot remove an open file
                self.release()
            self._path.unlink()
        finally:
            self.release()


if sys.platform == "win32":
    import msvcrt

    def _lock_file(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock_file(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
