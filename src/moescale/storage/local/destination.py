"""An output directory, with the journal of an unfinished run.

A file is written under a temporary name inside ``.moescale/`` of the destination, synced, renamed
to its final name, and its directory synced; then the journal lists it. So a file under its final
name is complete, whenever a crash happens, and a rerun writes the files that are not listed.
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

from moescale.checkpoint.gguf.names import first_of
from moescale.checkpoint.stored_provenance import stored_provenance
from moescale.errors import DestinationError, RewriteError
from moescale.storage.base import (
    SMALL_FILE_BYTES,
    FileInfo,
    FileRecord,
    PendingFile,
    SourceId,
    io_errors,
)
from moescale.storage.gguf_set import GgufSet
from moescale.storage.local.filesystem import (
    NOT_REGULAR,
    behind_link,
    make_directory,
    open_regular,
    sync_directory,
    write_new,
)
from moescale.storage.local.journal import IGNORED_FOLDERS, JOURNAL, STATE, Journal, Lock
from moescale.storage.local.source import LocalSource
from moescale.storage.local.writer import LocalWriters, temporary_stem

_MARKER = ".shared"


class LocalDestination:
    """An output directory.

    Attributes:
        root: its absolute path.
        gguf_set: the files of the output, if the directory may have others.
    """

    keeps_files = True
    remote = False
    default_jobs = 8

    def __init__(self, root: Path, gguf_set: GgufSet | None = None, identity: str = "") -> None:
        """Create nothing before `begin`.

        Args:
            root: the directory.
            gguf_set: the files of the output, if the directory may have others.
            identity: the destination as the user gave it; by default `root`.
        """
        self.root = root.absolute()
        self.identity = identity or str(root)
        self.remarks: list[str] = []
        self.url: str | None = None
        self.gguf_set = gguf_set
        self._state = self.root / (gguf_set.state if gguf_set else STATE)
        self._marker: Path | None = None
        self.writers = LocalWriters(self._state)
        self._journal: Journal | None = None
        self._begun = False
        self._lock = Lock(self._state / "lock")

    def is_same_as(self, source: SourceId) -> bool:
        """Whether the source is this directory, or a file of the output."""
        path = source.path
        if path is None:
            return False
        if self.gguf_set is None:
            return path.resolve() == self.root.resolve()
        same = path.parent.resolve() == self.root.resolve()
        return same and self.gguf_set.name_in_plan(path.name) is not None

    def holds(self, file: Path) -> bool:
        """Whether a path, existing or not, belongs to the output."""
        if self.gguf_set is None:
            return file.is_relative_to(self.root.resolve())
        same = file.parent == self.root.resolve()
        return same and self.gguf_set.name_in_plan(file.name) is not None

    def path_of(self, name: str) -> Path:
        """The path of a file, given its name in the plan."""
        return self.root / self._name(name)

    def _name(self, name: str) -> str:
        return self.gguf_set.name_in_folder(name) if self.gguf_set else name

    def existing(self) -> dict[str, int]:
        """Names and sizes of the existing files, without the state of an unfinished run.

        Raises:
            DestinationError: the path is not a directory, or cannot be read.
        """
        with self._os_errors("read"):
            if not self.root.exists():
                return {}
            if not self.root.is_dir():
                raise DestinationError(f"{self.root}: exists and is not a directory")
            if self.gguf_set is not None:
                there = ((self.gguf_set.name_in_plan(e.name), e) for e in sorted_entries(self.root))
                return {n: e.stat(follow_symlinks=False).st_size for n, e in there if n is not None}
            names = list(_names(self.root, IGNORED_FOLDERS))
            return {name: (self.root / name).lstat().st_size for name in names}

    def available_bytes(self) -> int:
        """Bytes that the output may take: the free space and that of the existing files."""
        free = shutil.disk_usage(self._nearest_existing()).free
        begun = sum(file.lstat().st_size for file in self._state.glob("*.tmp"))
        return free + begun + sum(self.existing().values())

    def may_share_blocks(self, source: SourceId) -> bool:
        """Whether the source may be on this disk; its subvolumes show the same free space."""
        here, there = self._nearest_existing(), source.path
        if there is None:
            return False
        if here.stat().st_dev == there.stat().st_dev:
            return True
        return shutil.disk_usage(here).free == shutil.disk_usage(there).free

    def check_writable(self) -> None:
        """Refuse early what `begin` would refuse.

        Raises:
            DestinationError: the directory cannot be created or written to.
        """
        path = self._nearest_existing()
        if not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            why = "no permission to write" if path.is_dir() else "is not a directory"
            if sys.platform != "win32" and os.statvfs(path).f_flag & os.ST_RDONLY:
                why = "is mounted read-only"
            raise DestinationError(
                f"{self.root}: cannot be written to: {path}: {why}",
                hint="Give another destination, or make this one writable.",
            )

    def _nearest_existing(self) -> Path:
        """The destination, or its nearest existing parent."""
        parents = (self.root, *self.root.absolute().parents)
        return next(path for path in parents if os.path.exists(path))

    def read_existing(self, name: str, start: int = 0, size: int = SMALL_FILE_BYTES) -> bytes:
        """The content of a small file; empty if its name is a link or not a file.

        Raises:
            DestinationError: the file cannot be read.
        """
        with self._os_errors("read"):
            try:
                fd = open_regular(self.path_of(name), os.O_RDONLY)
            except OSError as error:
                if error.errno in NOT_REGULAR:
                    return b""
                raise
            with open(fd, "rb") as file:
                file.seek(start)
                return file.read(size)

    def unfinished_job(self) -> Any:
        """The job of the unfinished run, or None; a text if moescale did not write the journal.

        Raises:
            DestinationError: the state folder is a link, or cannot be read.
        """
        with self._os_errors("read"):
            self._check_state()
            return Journal.job_of(self._state / JOURNAL)

    def _check_state(self) -> None:
        if self._state.is_symlink():
            raise DestinationError(
                f"{self._state}: is a link, and moescale does not write through links",
                hint="Remove it and run the same command again.",
            )

    @contextmanager
    def _os_errors(self, how: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(
                f"{error.filename or self.root}: cannot be {how}: {error.strerror}",
                hint="Fix the cause, or give another destination.",
            ) from None

    def read_provenance(self) -> bytes | None:
        """The provenance of the existing output."""
        return stored_provenance(self.existing(), self.read_existing)

    def changed_at(self, name: str) -> int:
        """When a file of the output was written, in nanoseconds."""
        with self._os_errors("read"):
            return self.path_of(name).stat().st_mtime_ns

    def check_replaceable(self) -> None:
        """Refuse to remove a directory that is not a model, such as a home folder.

        Raises:
            DestinationError: the directory does not look like a checkpoint.
        """
        if self.gguf_set is not None:
            self._check_gguf()
            return
        names = {name for name in self.existing() if "/" not in name}
        weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
        model = "moescale.json" in names or ("config.json" in names and weights)
        with self._os_errors("read"):
            state = any((self._state / name).exists() for name in (JOURNAL, "lock"))
        if not model and not state:
            raise DestinationError(
                f"{self.root}: does not look like a model, so --overwrite does not remove it",
                hint="Remove it yourself, or give another destination.",
            )

    def _check_gguf(self) -> None:
        """Refuse to remove a file that only has the name of a GGUF model."""
        from moescale.checkpoint.gguf.header import MAGIC

        for name in self.existing():
            if self.read_existing(name, 0, len(MAGIC)) != MAGIC:
                raise DestinationError(
                    f"{self.path_of(name)}: is not a GGUF file, so --overwrite does not remove it",
                    hint="Remove it yourself, or give another destination.",
                )

    def prepare_for_workers(self) -> None:
        """Create a marker for the time of the run; other machines must find it.

        Raises:
            DestinationError: the directory cannot be written to.
        """
        self._marker = self._state / f"{secrets.token_hex(16)}{_MARKER}"
        with self._os_errors("written to"):
            self._check_state()
            make_directory(self._state)
            self._marker.touch()
            sync_directory(self._state)
        self.writers = LocalWriters(self._state, self._marker.name)

    def begin(
        self, job: Any, replace: bool, keep: Mapping[str, FileRecord] = MappingProxyType({})
    ) -> None:
        """Take the lock; start a journal for `job`, or continue the existing one.

        `replace` removes the old content, config and index first, so that it stops loading at
        once. Files of `keep` stay, and the journal lists them as finished.

        Raises:
            DestinationError: another run holds the lock, or the directory cannot be written to.
        """
        self._begun = True
        try:
            with self._os_errors("written to"):
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
                        hint="Run the same command again to see its result.",
                    )
                self._journal = Journal(self._state / JOURNAL, job)
                for name, record in keep.items():
                    self._journal.add(name, record, _stamp(self.path_of(name)))
                self._remove_leftovers()
        except BaseException:
            self._lock.release()
            raise

    def _remove_leftovers(self) -> None:
        """Remove temporary files of earlier runs; a writer that is still alive is ignored."""
        for leftover in (*self._state.glob("*.tmp"), *self._state.glob(f"*{_MARKER}")):
            if leftover != self._marker:
                leftover.unlink()

    def _remove_content(self, keep: Collection[str]) -> None:
        """Remove all files except those of `keep`, starting with those that loaders need."""
        gone = self.existing().keys() - set(keep)
        last = sorted(gone, key=lambda name: not name.endswith(".index.json"))
        first = {"config.json", first_of(last)}
        for name in sorted(last, key=lambda name: name not in first):
            self.path_of(name).unlink()
        self._remove_empty_folders()
        sync_directory(self.root)

    def _remove_empty_folders(self) -> None:
        if self.gguf_set is None:
            _remove_empty_folders(self.root)

    def check_card(self, card: bytes) -> None:
        """Accept every card."""

    def copy_on_server(self, files: Iterable[FileInfo], source: SourceId) -> dict[str, FileRecord]:
        """Copy nothing: every file must be read."""
        return {}

    def open_output(self) -> LocalSource:
        """The directory, in which no file may be a link out of it."""
        return LocalSource(
            self.root, follow_links=False, follow_shard_links=False, gguf_set=self.gguf_set
        )

    def cancel(self) -> None:
        """Do nothing: disk writes do not block indefinitely."""

    def finished_files(self) -> dict[str, FileRecord]:
        """The files that the journal lists and that have not changed since."""
        assert self._journal is not None
        with self._os_errors("read"):
            return {
                name: FileRecord(entry["size"], entry["sha256"])
                for name, entry in self._journal.entries.items()
                if _stamp(self.path_of(name)) == entry["stamp"]
                and not behind_link(self.root, self._name(name))
            }

    def write_small(self, name: str, data: bytes) -> FileRecord:
        """Write a small file in one piece, as durably as a large one."""
        with LocalWriters(self._state).open(name, len(data), digest=True) as writer:
            writer.write(memoryview(data))
            pending = writer.finish()
        return self.commit_file(name, pending)

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Write the last files in order, then remove the state; `begin` removed old content."""
        with io_errors(self.identity):
            self._remove_empty_folders()
        for name, data in last.items():
            with io_errors(name):
                self.write_small(name, data)
        with io_errors(self.identity):
            self._remove_state()

    def _remove_state(self) -> None:
        """Remove the state, the journal last: as long as it exists, a rerun can finish."""
        assert self._journal is not None
        self._journal.close()
        self._remove_marker()
        self._remove_leftovers()
        (self._state / JOURNAL).unlink()
        self._remove_state_folder()
        sync_directory(self.root)

    def _remove_state_folder(self) -> None:
        """Release the lock and remove the folder, unless another run has begun meanwhile."""
        self._lock.remove()
        try:
            self._state.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def replace_small(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output.

        Raises:
            DestinationError: a run is writing here.
        """
        self._check_state()
        make_directory(self._state)
        self._lock.acquire()
        new = self._temporary(name)
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._remove_state_folder)
            leaving.callback(new.unlink, missing_ok=True)
            new.unlink(missing_ok=True)
            write_new(new, data)
            os.replace(new, self.path_of(name))
            sync_directory(self.root)

    def commit_file(self, name: str, pending: PendingFile) -> FileRecord:
        """Rename a synced file to its final name, sync the directory, add the file to the journal.

        Raises:
            RewriteError: the size differs from that reported by its writer.
        """
        assert self._journal is not None
        target, temporary = self.path_of(name), self._state / pending.handle
        try:
            if behind_link(self.root, self._name(name)):
                raise DestinationError(
                    f"{target.parent}: is behind a link, and moescale does not write through links",
                    hint="Remove the link and run the same command again; it resumes.",
                )
            if temporary.stat().st_size != pending.record.size:
                raise RewriteError(f"{name}: size differs between the worker and this machine")
            make_directory(target.parent)
            os.replace(temporary, target)
        finally:  # also those of workers that died, or only seemed to
            for attempt in self._state.glob(f"{temporary_stem(name)}.*.tmp"):
                with contextlib.suppress(OSError):
                    attempt.unlink()
        sync_directory(target.parent)
        self._journal.add(name, pending.record, _stamp(target))
        return pending.record

    def _temporary(self, name: str) -> Path:
        return self._state / f"{temporary_stem(name)}.tmp"

    def close(self) -> None:
        """Release journal and lock; the state stays for a rerun.

        Without `begin`, the output is finished; then this removes the state of a run that was
        killed after its last file.
        """
        self._remove_marker()
        if self._journal is not None:
            self._journal.close()
        self._lock.release()
        if not self._begun:
            with contextlib.suppress(OSError, DestinationError):
                self._remove_stale_state()

    def _remove_marker(self) -> None:
        marker, self._marker = self._marker, None
        if marker is not None:
            with contextlib.suppress(OSError):
                marker.unlink()

    def _remove_stale_state(self) -> None:
        if self._state.is_symlink() or not self._state.is_dir():
            return
        self._lock.acquire()
        if (self._state / JOURNAL).exists():
            self._lock.release()
        else:
            self._remove_leftovers()
            self._remove_state_folder()


def _stamp(path: Path) -> list[int] | None:
    """Size, and when content and entry were last changed: they change with the file."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name."""
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
        if path != root and path.relative_to(root).parts[0] not in IGNORED_FOLDERS:
            with contextlib.suppress(OSError):
                path.rmdir()
