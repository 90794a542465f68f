"""An output directory, with the journal of an unfinished run.

A file is written under a temporary name inside ``.moescale/`` of the destination, synced, renamed
to its own name, and its directory synced; then the journal says so. Whatever the moment of a
crash, a file under its own name is complete, and what the journal does not list is done again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moescale.checkpoint.gguf.header import MAGIC
from moescale.checkpoint.gguf.names import first_of
from moescale.checkpoint.record import recorded
from moescale.errors import DestinationError, RewriteError
from moescale.storage.base import SMALL_FILE_BYTES, FileInfo, Made, SourceId, Written, io_errors
from moescale.storage.local.filesystem import (
    NOT_PLAIN,
    behind_link,
    make_directory,
    open_plain,
    sync_directory,
    write_new,
)
from moescale.storage.local.journal import JOURNAL, NOT_CHECKPOINT, STATE, Journal, Lock
from moescale.storage.local.source import LocalSource
from moescale.storage.local.writer import LocalWriters, stem
from moescale.storage.shelf import Shelf

_MARKER = ".shared"


class LocalDestination:
    """An output directory."""

    keeps_files = True
    remote = False
    default_jobs = 8

    def __init__(self, root: Path, shelf: Shelf | None = None, identity: str = "") -> None:
        """Nothing is created before `begin`; with a `shelf` the directory has other files too."""
        self.root = root.absolute()
        self.identity = identity or str(root)
        self.remarks: list[str] = []
        self.url: str | None = None
        self.shelf = shelf
        self._state = self.root / (shelf.state if shelf else STATE)
        self._marker: Path | None = None
        self.writers = LocalWriters(self._state)
        self._journal: Journal | None = None
        self._begun = False
        self._lock = Lock(self._state / "lock")

    def is_at(self, source: SourceId) -> bool:
        """Whether the source is this directory, or a file of the output."""
        if source.kind != "local":
            return False
        place = Path(source.id)
        if self.shelf is None:
            return place.resolve() == self.root.resolve()
        same = place.parent.resolve() == self.root.resolve()
        return same and self.shelf.planned(place.name) is not None

    def holds(self, file: Path) -> bool:
        """Whether a file, which need not be there, is one of the output."""
        if self.shelf is None:
            return file.is_relative_to(self.root.resolve())
        same = file.parent == self.root.resolve()
        return same and self.shelf.planned(file.name) is not None

    def at(self, name: str) -> Path:
        """Where a file of the output is, by the name that the plan has for it."""
        return self.root / self._name(name)

    def _name(self, name: str) -> str:
        return self.shelf.there(name) if self.shelf else name

    def existing(self) -> dict[str, int]:
        """Name and size of what is there now, without the state of an unfinished run.

        Raises:
            DestinationError: there is something, and it is not a directory, or cannot be read.
        """
        with self._accessible("read"):
            if not self.root.exists():
                return {}
            if not self.root.is_dir():
                raise DestinationError(f"{self.root}: exists and is not a directory")
            if self.shelf is not None:
                there = ((self.shelf.planned(e.name), e) for e in sorted_entries(self.root))
                return {n: e.stat(follow_symlinks=False).st_size for n, e in there if n is not None}
            names = list(_names(self.root, NOT_CHECKPOINT))
            return {name: (self.root / name).lstat().st_size for name in names}

    def room(self) -> int:
        """Bytes that an output may have here: what is free, and what is there already."""
        free = shutil.disk_usage(self._nearest()).free
        begun = sum(file.lstat().st_size for file in self._state.glob("*.tmp"))
        return free + begun + sum(self.existing().values())

    def may_share(self, source: SourceId) -> bool:
        """Whether the source may be on this disk, whose subvolumes have the same room."""
        if source.kind == "hub":
            return False
        here, there = self._nearest(), Path(source.id)
        if here.stat().st_dev == there.stat().st_dev:
            return True
        return shutil.disk_usage(here).free == shutil.disk_usage(there).free

    def check_writable(self) -> None:
        """Say beforehand what `begin` would find.

        Raises:
            DestinationError: the directory cannot be made, or nothing can be written into it.
        """
        place = self._nearest()
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            why = "no permission to write" if place.is_dir() else "is not a directory"
            if sys.platform != "win32" and os.statvfs(place).f_flag & os.ST_RDONLY:
                why = "is mounted read-only"
            raise DestinationError(
                f"{self.root}: cannot be written to: {place}: {why}",
                hint="Give another destination, or make this one writable.",
            )

    def _nearest(self) -> Path:
        """The destination, or what is there above it."""
        parents = (self.root, *self.root.absolute().parents)
        return next(path for path in parents if os.path.exists(path))

    def read(self, name: str, start: int = 0, size: int = SMALL_FILE_BYTES) -> bytes:
        """A small file of the output; nothing, where a link or no file has its name.

        Raises:
            DestinationError: it cannot be read.
        """
        with self._accessible("read"):
            try:
                fd = open_plain(self.at(name), os.O_RDONLY)
            except OSError as error:
                if error.errno in NOT_PLAIN:
                    return b""
                raise
            with open(fd, "rb") as file:
                file.seek(start)
                return file.read(size)

    def unfinished(self) -> Any:
        """The job whose unfinished run is here, or None; a text if the journal is not ours.

        Raises:
            DestinationError: the folder of the state is a link, or cannot be read.
        """
        with self._accessible("read"):
            self._check_state()
            return Journal.job_of(self._state / JOURNAL)

    def _check_state(self) -> None:
        if self._state.is_symlink():
            raise DestinationError(
                f"{self._state}: is a link, and nothing is written through it",
                hint="Remove it and run the same command again.",
            )

    @contextmanager
    def _accessible(self, how: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(
                f"{error.filename or self.root}: cannot be {how}: {error.strerror}",
                hint="Mend the cause, or give another destination.",
            ) from None

    def recorded(self) -> bytes | None:
        """The provenance of what is there."""
        return recorded(self.existing(), self.read)

    def changed_at(self, name: str) -> int:
        """When a file of the output was written, in nanoseconds."""
        with self._accessible("read"):
            return self.at(name).stat().st_mtime_ns

    def check_replaceable(self) -> None:
        """Refuse to remove what is no model: a home folder, say.

        Raises:
            DestinationError: nothing in the directory looks like a checkpoint.
        """
        if self.shelf is not None:
            self._check_gguf()
            return
        names = {name for name in self.existing() if "/" not in name}
        weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
        model = "moescale.json" in names or ("config.json" in names and weights)
        with self._accessible("read"):
            state = any((self._state / name).exists() for name in (JOURNAL, "lock"))
        if not model and not state:
            raise DestinationError(
                f"{self.root}: does not look like a model, so --overwrite does not remove it",
                hint="Remove it yourself, or give another destination.",
            )

    def _check_gguf(self) -> None:
        """Refuse to remove what only has the name of a model."""
        for name in self.existing():
            if self.read(name, 0, len(MAGIC)) != MAGIC:
                raise DestinationError(
                    f"{self.at(name)}: is no GGUF file, so --overwrite does not remove it",
                    hint="Remove it yourself, or give another destination.",
                )

    def share(self) -> None:
        """Leave a marker that other machines have to find, as long as the run lasts.

        Raises:
            DestinationError: the place cannot be written to.
        """
        self._marker = self._state / f"{secrets.token_hex(16)}{_MARKER}"
        with self._accessible("written to"):
            self._check_state()
            make_directory(self._state)
            self._marker.touch()
            sync_directory(self._state)
        self.writers = LocalWriters(self._state, self._marker.name)

    def begin(
        self, job: Any, replace: bool, keep: Mapping[str, Written] = MappingProxyType({})
    ) -> None:
        """Take the lock; start a journal for `job`, or go on with the one that is there.

        With `replace` the old content is removed, config and index first, so that it stops to
        load at once. Files of `keep` stay, and the journal has them as finished.

        Raises:
            DestinationError: another run holds the lock, or the place cannot be written to.
        """
        self._begun = True
        try:
            with self._accessible("written to"):
                self._check_state()
                make_directory(self._state)
                self._lock.acquire()
                if replace:
                    (self._state / JOURNAL).unlink(missing_ok=True)
                    self._remove_content(keep)
                elif not (self._state / JOURNAL).exists() and self.existing():
                    self._begun = False
                    raise DestinationError(
                        f"{self.root}: another run has just ended here",
                        hint="Run the same command again to see what it left.",
                    )
                self._journal = Journal(self._state / JOURNAL, job)
                for name, written in keep.items():
                    self._journal.add(name, written, _stamp(self.at(name)))
                self._remove_leftovers()
        except BaseException:
            self._lock.release()
            raise

    def _remove_leftovers(self) -> None:
        """Remove what earlier runs were writing; what still writes there is not listened to."""
        for leftover in (*self._state.glob("*.tmp"), *self._state.glob(f"*{_MARKER}")):
            if leftover != self._marker:
                leftover.unlink()

    def _remove_content(self, keep: Collection[str]) -> None:
        """Remove all files but those of `keep`, first those without which nothing loads."""
        gone = self.existing().keys() - set(keep)
        last = sorted(gone, key=lambda name: not name.endswith(".index.json"))
        first = {"config.json", first_of(last)}
        for name in sorted(last, key=lambda name: name not in first):
            self.at(name).unlink()
        self._remove_empty_folders()
        sync_directory(self.root)

    def _remove_empty_folders(self) -> None:
        if self.shelf is None:
            _remove_empty_folders(self.root)

    def check_card(self, card: bytes) -> None:
        """A directory takes every card."""

    def copy(self, files: Iterable[FileInfo], source: SourceId) -> dict[str, Written]:
        """Every file has to be read."""
        return {}

    def output(self) -> LocalSource:
        """The directory, of which no file may be a link out of it."""
        return LocalSource(self.root, follow_links=False, links_of_shards=False, shelf=self.shelf)

    def cancel(self) -> None:
        """Nobody waits for a disk for ever."""

    def finished(self) -> dict[str, Written]:
        """What the journal lists and the directory still holds unchanged."""
        assert self._journal is not None
        with self._accessible("read"):
            return {
                name: Written(entry["size"], entry["sha256"])
                for name, entry in self._journal.entries.items()
                if _stamp(self.at(name)) == entry["stamp"]
                and not behind_link(self.root, self._name(name))
            }

    def put(self, name: str, data: bytes) -> Written:
        """Write a small file whole, as durable as a large one."""
        with LocalWriters(self._state).open(name, len(data), digest=True) as writer:
            writer.write(memoryview(data))
            made = writer.finish()
        return self.commit_file(name, made)

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Write the last files in order, drop the state; old content is gone since `begin`."""
        with io_errors(self.identity):
            self._remove_empty_folders()
        for name, data in last.items():
            with io_errors(name):
                self.put(name, data)
        with io_errors(self.identity):
            self._drop_state()

    def _drop_state(self) -> None:
        """Remove the state, the journal last: while it is there, a rerun comes here again."""
        assert self._journal is not None
        self._journal.close()
        self._remove_marker()
        self._remove_leftovers()
        (self._state / JOURNAL).unlink()
        self._leave_state()
        sync_directory(self.root)

    def _leave_state(self) -> None:
        """Let go of the lock and remove the folder, unless another run has begun meanwhile."""
        self._lock.remove()
        try:
            self._state.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def amend(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output.

        Raises:
            DestinationError: a run is writing here.
        """
        self._check_state()
        make_directory(self._state)
        self._lock.acquire()
        new = self._temporary(name)
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._leave_state)
            leaving.callback(new.unlink, missing_ok=True)
            new.unlink(missing_ok=True)
            write_new(new, data)
            os.replace(new, self.at(name))
            sync_directory(self.root)

    def commit_file(self, name: str, made: Made) -> Written:
        """Rename a synced temporary file to its own name, sync the directory, note it.

        Raises:
            RewriteError: it has not the size that it was made with.
        """
        assert self._journal is not None
        target, temporary = self.at(name), self._state / made.at
        try:
            if behind_link(self.root, self._name(name)):
                raise DestinationError(
                    f"{target.parent}: is behind a link, and nothing is written through it",
                    hint="Remove the link and run the same command again; it resumes.",
                )
            if temporary.stat().st_size != made.written.size:
                raise RewriteError(f"{name}: has another size here than where it was written")
            make_directory(target.parent)
            os.replace(temporary, target)
        finally:  # other attempts too: a worker may have died, or only have been believed dead
            for attempt in self._state.glob(f"{stem(name)}.*.tmp"):
                with contextlib.suppress(OSError):
                    attempt.unlink()
        sync_directory(target.parent)
        self._journal.add(name, made.written, _stamp(target))
        return made.written

    def _temporary(self, name: str) -> Path:
        return self._state / f"{stem(name)}.tmp"

    def close(self) -> None:
        """Let go of journal and lock; the state stays for a rerun.

        Where nothing was begun, the output is finished; what a run left that was killed after its
        last file goes too.
        """
        self._remove_marker()
        if self._journal is not None:
            self._journal.close()
        self._lock.release()
        if not self._begun:
            with contextlib.suppress(OSError, DestinationError):
                self._tidy()

    def _remove_marker(self) -> None:
        marker, self._marker = self._marker, None
        if marker is not None:
            with contextlib.suppress(OSError):
                marker.unlink()

    def _tidy(self) -> None:
        if self._state.is_symlink() or not self._state.is_dir():
            return
        self._lock.acquire()
        if (self._state / JOURNAL).exists():
            self._lock.release()
        else:
            self._remove_leftovers()
            self._leave_state()


def _stamp(path: Path) -> list[int] | None:
    """What changes when the file does: size, time of last change, of content and of entry."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name."""
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


def _names(root: Path, skip: frozenset[str], prefix: str = "") -> Iterator[str]:
    for entry in sorted_entries(root):
        if entry.name in skip and not prefix:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _names(Path(entry.path), skip, prefix + entry.name + "/")
        else:
            yield prefix + entry.name


def _remove_empty_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        path = Path(folder)
        if path != root and path.relative_to(root).parts[0] not in NOT_CHECKPOINT:
            with contextlib.suppress(OSError):
                path.rmdir()
