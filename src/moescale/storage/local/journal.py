"""The state of an unfinished run on disk: what is finished, and who may write."""

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
from moescale.storage.base import Written
from moescale.storage.entries import NOT_OURS, UNREADABLE, listed
from moescale.storage.local.filesystem import (
    NOT_PLAIN,
    open_plain,
    sync_directory,
    write_all,
    write_new,
)

STATE = ".moescale"
"""The folder in an unfinished destination that holds journal, lock and temporary files."""

JOURNAL = "journal.jsonl"

NOT_CHECKPOINT = frozenset({".git", ".cache", STATE})
"""Folders at the top of a directory that are no part of the checkpoint."""

_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class Journal:
    """What an unfinished run has finished: one line the job, then one line a file.

    A torn last line is what a crash leaves; it is not counted, so its file is done again.
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
        self._fd = open_plain(path, os.O_RDWR | os.O_APPEND)
        try:
            self._read()
        except OSError:
            self.close()
            raise

    @staticmethod
    def job_of(path: Path) -> Any:
        """The job of an existing journal, None where there is no journal, or a text if not ours."""
        try:
            with open(open_plain(path, os.O_RDONLY), "rb") as file:
                line = file.readline()
            return json.loads(line)["job"] if line.endswith(b"\n") else NOT_OURS
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UNREADABLE:
            return NOT_OURS
        except OSError as error:
            if error.errno in NOT_PLAIN:
                return NOT_OURS
            raise

    def _read(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            lines = file.read().split(b"\n")
        complete = lines[:-1]  # what follows the last line end is torn
        for line in complete[1:]:
            with contextlib.suppress(*UNREADABLE):
                name, entry = _entry(json.loads(line))
                self.entries[name] = entry
        if lines[-1]:
            os.ftruncate(self._fd, sum(len(line) + 1 for line in complete))

    def add(self, name: str, written: Written, stamp: list[int] | None) -> None:
        entry = {"file": name, "size": written.size, "sha256": written.sha256, "stamp": stamp}
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
    """A file's name and the rest of its line; raises one of `UNREADABLE` if it is none of ours."""
    name, stamp = line["file"], line["stamp"]
    written = listed(name, line)
    if [type(value) for value in stamp] != [int] * 3 or stamp[0] != written.size:
        raise ValueError
    return name, {"size": written.size, "sha256": written.sha256, "stamp": stamp}


class Lock:
    """One run at a time; the operating system lets go of it when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self) -> None:
        """Take it.

        Raises:
            DestinationError: another run has it.
            OSError: there can be no lock here.
        """
        fd = open_plain(self._path, os.O_RDWR | os.O_CREAT)
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
        """Let go of it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def remove(self) -> None:
        """Let go of it and remove its file, before anybody else can hold it where that works."""
        try:
            if sys.platform == "win32":  # which does not remove what is open
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
