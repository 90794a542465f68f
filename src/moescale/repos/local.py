"""Directories: the source on disk, and the sink on disk with its journal.

A file is written under a temporary name inside ``.moescale/`` of the destination, synced, renamed
to its own name, and its directory synced; then the journal says so. Whatever the moment of a
crash, a file under its own name is complete, and what the journal does not list is done again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from moescale.checkpoint.rewrite import Reader, pieces
from moescale.errors import CheckpointError, DestinationError, RewriteError, SourceError
from moescale.repos.base import (
    SMALL_FILE_BYTES,
    Arrived,
    FileInfo,
    Made,
    SourceId,
    Written,
    check_name,
    io_errors,
    nobody,
)
from moescale.repos.disk import (
    BINARY,
    NOT_PLAIN,
    behind_link,
    open_plain,
    start_writeback,
    sync_directory,
    write_new,
)
from moescale.repos.journal import Journal, Lock

STATE = ".moescale"
"""The folder in an unfinished destination that holds journal, lock and temporary files."""

JOURNAL = "journal.jsonl"

NOT_CHECKPOINT = frozenset({".git", ".cache", STATE})
"""Folders at the top of a repo that are no part of the checkpoint."""

_MARKER = ".shared"
_SHARE = "Give a place that all machines share under the same path."

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


class LocalSource:
    """A checkpoint in a directory, which may be a snapshot of the Hub's cache."""

    def __init__(self, root: Path, identity: SourceId | None = None) -> None:
        """`root` is an existing directory; `identity` says what it is a copy of.

        Raises:
            SourceError: it is not a directory, or an output that is not finished.
        """
        with _readable(root):
            if not root.is_dir():
                raise SourceError(
                    f"{root}: {'is not a directory' if root.exists() else 'does not exist'}",
                    hint="Give the directory of a checkpoint; a repo on the Hub is org/name.",
                )
            if not os.access(root, os.R_OK | os.X_OK):
                raise SourceError(f"{root}: cannot be read", hint="Mend its permissions.")
            unfinished = (root / STATE / JOURNAL).exists()
        if unfinished:
            raise SourceError(
                f"{root}: holds an unfinished run of moescale ({STATE}/)",
                hint="Run the command that started it again; it resumes.",
            )
        self.root = root.resolve()
        self.received = 0
        self._files: dict[str, FileInfo] | None = None
        self._states: dict[str, list[int]] = {}
        self._entry_times: dict[str, int] = {}
        repo, revision = _hub_cache_snapshot(self.root)
        self.identity = identity or SourceId("local", str(root), revision, repo, self.root.name)

    def files(self) -> Mapping[str, FileInfo]:
        """All regular files, by name relative to the root.

        Raises:
            CheckpointError: a link leads out of the repo or nowhere, or a file is no plain file.
            SourceError: the system does not let us look.
        """
        if self._files is None:
            with _readable(self.root):
                self._files = dict(sorted(self._walk(self.root, "")))
        return self._files

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, FileInfo]]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name in NOT_CHECKPOINT and not prefix:
                continue
            name = check_name(prefix + entry.name, str(self.root))
            if entry.is_symlink():
                self._check_link(Path(entry.path), name)
            self._check_readable(entry, name)
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path), name + "/")
                continue
            info = entry.stat()
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{self.root}: {name!r} is not a regular file")
            self._states[name] = [info.st_size, info.st_mtime_ns]
            self._entry_times[name] = info.st_ctime_ns
            yield name, FileInfo(name, info.st_size)

    def _check_readable(self, entry: os.DirEntry[str], name: str) -> None:
        """What cannot be read is found now, and not after the first hundred gigabytes."""
        mode = os.R_OK | os.X_OK if entry.is_dir() else os.R_OK
        if not os.access(entry.path, mode):
            raise SourceError(f"{self.root}: {name!r} cannot be read", hint="Mend its permissions.")

    def _check_link(self, link: Path, name: str) -> None:
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):
            raise CheckpointError(f"{self.root}: {name!r} is a link that leads nowhere") from None
        blobs = self.root.parent.parent / "blobs"
        in_cache = self.root.parent.name == "snapshots" and target.is_relative_to(blobs)
        if not (in_cache or target.is_relative_to(self.root)):
            raise CheckpointError(
                f"{self.root}: {name!r} is a link out of the directory",
                hint="Replace it by the file itself, or give the directory that it points to.",
            )

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A stretch of one file; the whole file, if it is a small one, by default."""
        if size is None:
            size = self.files()[name].size - start
            if size > SMALL_FILE_BYTES:
                raise CheckpointError(f"{name}: {size} bytes are too many for a file of this kind")
        try:
            with open(self.root / name, "rb") as file:
                self._check_unchanged(file.fileno(), name)
                file.seek(start)
                data = file.read(size)
                self._check_unchanged(file.fileno(), name)
                return data
        except OSError as error:
            raise SourceError(f"{self.root}: {name}: {error.strerror}") from None

    @contextmanager
    def open(self, name: str) -> Iterator[LocalReader]:
        """Open a file, and check at the end that it is still what it was when planned."""
        fd = os.open(self.root / name, os.O_RDONLY | BINARY)
        try:
            self._check_unchanged(fd, name)
            yield LocalReader(fd, name)
            self._check_unchanged(fd, name)
        finally:
            os.close(fd)

    def on_disk(self, names: Sequence[str]) -> Path:
        """They are there already."""
        return self.root

    def newest_change(self) -> int:
        """When the youngest file was last changed, in nanoseconds."""
        self.files()
        return max(mtime for _, mtime in self._states.values())

    def _check_unchanged(self, fd: int, name: str) -> None:
        info = os.fstat(fd)
        self.files()
        if [info.st_size, info.st_mtime_ns] != self._states[name]:
            raise RewriteError(
                f"{name}: the source file changed while it was being read",
                hint="Wait until nothing writes to the source, then run the command again.",
            )

    def state(self, name: str) -> list[int]:
        """Size in bytes, times of the last change of the content and of the entry in nanoseconds.

        The last one tells of a file that was replaced between two runs and got its old time back.
        """
        self.files()
        return [*self._states[name], self._entry_times[name]]

    def only(self, names: Iterable[str]) -> LocalSource:
        """The same directory with no more than these files, as they are now known."""
        part = copy(self)
        part._files = {name: self.files()[name] for name in names}
        part._states = {name: self._states[name] for name in part._files}
        part._entry_times = {name: self._entry_times[name] for name in part._files}
        return part

    def check(self) -> None:
        """Look at every file again.

        Raises:
            SourceError: one is not there, or is another one.
        """
        for name in self.files():
            path = self.root / name
            try:
                info = path.stat()
            except OSError as error:
                raise SourceError(
                    f"{path}: cannot be seen: {error.strerror}", hint=_SHARE
                ) from None
            if [info.st_size, info.st_mtime_ns] != self._states[name]:
                raise SourceError(f"{path}: is another file here", hint=_SHARE)


class LocalReader:
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
            start_writeback(self.fd, self._on_its_way, self._position - self._on_its_way)
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
            raise DestinationError(f"{self._state.parent}: cannot be seen", hint=_SHARE)

    @contextmanager
    def shard(
        self, name: str, size: int, digest: bool = False, arrived: Arrived = nobody
    ) -> Iterator[LocalWriter]:
        """A writer for a file of `size` bytes; leaving without `finish` discards it."""
        self.check()
        temporary = self._state / f"{_stem(name)}.{secrets.token_hex(8)}.tmp"
        writer = LocalWriter(name, temporary, size, digest)
        try:
            yield writer
        finally:
            writer.close()
            if not writer.finished:
                temporary.unlink(missing_ok=True)


def _stem(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


class LocalSink:
    """An output directory."""

    def __init__(self, root: Path) -> None:
        """Nothing is created before `begin`."""
        self.root = root.absolute()
        self.identity = str(root)
        self.remarks: list[str] = []
        self.url: str | None = None
        self._state = self.root / STATE
        self._marker: Path | None = None
        self.bench = LocalBench(self._state)
        self._journal: Journal | None = None
        self._begun = False
        self._lock = Lock(self._state / "lock")

    def is_at(self, source: SourceId) -> bool:
        """Whether the source is this directory."""
        return source.kind == "local" and Path(source.id).resolve() == self.root.resolve()

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
            names = list(_names(self.root, NOT_CHECKPOINT))
            return {name: (self.root / name).lstat().st_size for name in names}

    def room(self) -> int:
        """Bytes that an output may have here: what is free, and what is there already."""
        free = shutil.disk_usage(self._nearest()).free
        return free + sum(self.existing().values())

    def check_writable(self) -> None:
        """Say beforehand what `begin` would find.

        Raises:
            DestinationError: the directory cannot be made, or nothing can be written into it.
        """
        place = self._nearest()
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            why = "no permission to write" if place.is_dir() else "is not a directory"
            raise DestinationError(
                f"{self.root}: cannot be written to: {place}: {why}",
                hint="Give another destination, or make this one writable.",
            )

    def _nearest(self) -> Path:
        """The destination, or what is there above it."""
        parents = (self.root, *self.root.absolute().parents)
        return next(path for path in parents if os.path.exists(path))

    def read(self, name: str) -> bytes:
        """A small file of the output; nothing, where a link or no file has its name.

        Raises:
            DestinationError: it cannot be read.
        """
        with self._accessible("read"):
            try:
                fd = open_plain(self.root / name, os.O_RDONLY)
            except OSError as error:
                if error.errno in NOT_PLAIN:
                    return b""
                raise
            with open(fd, "rb") as file:
                return file.read(SMALL_FILE_BYTES)

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

    def changed_at(self, name: str) -> int:
        """When a file of the output was written, in nanoseconds."""
        with self._accessible("read"):
            return (self.root / name).stat().st_mtime_ns

    def check_replaceable(self) -> None:
        """Refuse to remove what is no model: a home folder, say.

        Raises:
            DestinationError: nothing in the directory looks like a checkpoint.
        """
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
        self.bench = LocalBench(self._state, self._marker.name)

    def begin(self, job: Any, replace: bool) -> None:
        """Take the lock; start a journal for `job`, or go on with the one that is there.

        With `replace` the old content is removed, config and index first, so that it stops to
        load at once.

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
                    self._remove_content()
                elif not (self._state / JOURNAL).exists() and self.existing():
                    self._begun = False
                    raise DestinationError(
                        f"{self.root}: another run has just ended here",
                        hint="Run the same command again to see what it left.",
                    )
                self._journal = Journal(self._state / JOURNAL, job)
                self._remove_leftovers()
        except BaseException:
            self._lock.release()
            raise

    def _remove_leftovers(self) -> None:
        """Remove what earlier runs were writing; what still writes there is not listened to."""
        for leftover in (*self._state.glob("*.tmp"), *self._state.glob(f"*{_MARKER}")):
            if leftover != self._marker:
                leftover.unlink()

    def _remove_content(self) -> None:
        """Remove all files, first those without which nothing loads."""
        last = sorted(self.existing(), key=lambda name: not name.endswith(".index.json"))
        for name in sorted(last, key=lambda name: name != "config.json"):
            (self.root / name).unlink()
        _remove_empty_folders(self.root)
        sync_directory(self.root)

    def check_card(self, card: bytes) -> None:
        """A directory takes every card."""

    def copy(self, files: Iterable[FileInfo], source: SourceId) -> dict[str, Written]:
        """Every file has to be read."""
        return {}

    def cancel(self) -> None:
        """Nobody waits for a disk for ever."""

    def finished(self) -> dict[str, Written]:
        """What the journal lists and the directory still holds unchanged."""
        assert self._journal is not None
        with self._accessible("read"):
            return {
                name: Written(entry["size"], entry["sha256"])
                for name, entry in self._journal.entries.items()
                if _stamp(self.root / name) == entry["stamp"] and not behind_link(self.root, name)
            }

    def put(self, name: str, data: bytes) -> Written:
        """Write a small file whole, as durable as a large one."""
        with LocalBench(self._state).shard(name, len(data), digest=True) as writer:
            writer.write(memoryview(data))
            made = writer.finish()
        return self.commit_file(name, made)

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Write the last files in order, drop the state; old content is gone since `begin`."""
        with io_errors(self.identity):
            _remove_empty_folders(self.root)
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
            os.replace(new, self.root / name)
            sync_directory(self.root)

    def commit_file(self, name: str, made: Made) -> Written:
        """Rename a synced temporary file to its own name, sync the directory, note it.

        Raises:
            RewriteError: it has not the size that it was made with.
        """
        assert self._journal is not None
        target, temporary = self.root / name, self._state / made.at
        try:
            if behind_link(self.root, name):
                raise DestinationError(
                    f"{target.parent}: is behind a link, and nothing is written through it",
                    hint="Remove the link and run the same command again; it resumes.",
                )
            if temporary.stat().st_size != made.written.size:
                raise RewriteError(f"{name}: has another size here than where it was written")
            make_directory(target.parent)
            os.replace(temporary, target)
        finally:  # other attempts too: a worker may have died, or only have been believed dead
            for attempt in self._state.glob(f"{_stem(name)}.*.tmp"):
                with contextlib.suppress(OSError):
                    attempt.unlink()
        sync_directory(target.parent)
        self._journal.add(name, made.written, _stamp(target))
        return made.written

    def _temporary(self, name: str) -> Path:
        return self._state / f"{_stem(name)}.tmp"

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


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turn what the system says about a source into an error that names the place."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{error.filename or root}: cannot be read: {error.strerror}") from None


def make_directory(path: Path) -> None:
    """Make a directory and those above it, each with a durable entry in the one above."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


def _stamp(path: Path) -> list[int] | None:
    """What changes when the file does: size, time of last change, of content and of entry."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _names(root: Path, skip: frozenset[str], prefix: str = "") -> Iterator[str]:
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
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


def _hub_cache_snapshot(root: Path) -> tuple[str | None, str | None]:
    """Repo id and commit of a ``models--org--name/snapshots/<commit>`` folder of the Hub cache."""
    repo = root.parent.parent
    if root.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return None, None
    return repo.name.removeprefix("models--").replace("--", "/"), root.name
