"""Directories: the source on disk, and the sink on disk with its journal.

A file is written under a temporary name inside ``.moescale/`` of the destination, synced, renamed
to its own name, and its directory synced; then the journal says so. Whatever the moment of a
crash, a file under its own name is complete, and what the journal does not list is done again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescale.checkpoint.rewrite import Reader, pieces
from moescale.errors import CheckpointError, DestinationError, RewriteError, SourceError
from moescale.repos.base import (
    SMALL_FILE_BYTES,
    Arrived,
    FileInfo,
    SourceId,
    Written,
    check_name,
    io_errors,
    nobody,
)
from moescale.repos.journal import Journal, Lock, sync_directory

STATE = ".moescale"
"""The folder in an unfinished destination that holds journal, lock and temporary files."""

JOURNAL = "journal.jsonl"

NOT_CHECKPOINT = frozenset({".git", ".cache", STATE})
"""Folders at the top of a repo that are no part of the checkpoint."""

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
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class LocalSource:
    """A checkpoint in a directory, which may be a snapshot of the Hub's cache."""

    def __init__(self, root: Path, identity: SourceId | None = None) -> None:
        """`root` is an existing directory; `identity` says what it is a copy of.

        Raises:
            SourceError: it is not a directory, or an output that is not finished.
        """
        if not root.is_dir():
            raise SourceError(
                f"{root}: {'is not a directory' if root.exists() else 'does not exist'}",
                hint="Give the directory of a checkpoint; a repo on the Hub is org/name.",
            )
        if not os.access(root, os.R_OK | os.X_OK):
            raise SourceError(f"{root}: cannot be read", hint="Mend its permissions.")
        if (root / STATE / JOURNAL).exists():
            raise SourceError(
                f"{root}: holds an unfinished run of moescale ({STATE}/)",
                hint="Run the command that started it again; it resumes.",
            )
        self.root = root.resolve()
        self.received = 0
        self._files: dict[str, FileInfo] | None = None
        self._states: dict[str, list[int]] = {}
        repo, revision = _hub_cache_snapshot(self.root)
        self.identity = identity or SourceId("local", str(root), revision, repo, self.root.name)

    def files(self) -> Mapping[str, FileInfo]:
        """All regular files, by name relative to the root.

        Raises:
            CheckpointError: a link leads out of the repo or nowhere, or a file is no plain file.
        """
        if self._files is None:
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
                return file.read(size)
        except OSError as error:
            raise SourceError(f"{self.root}: {name}: {error.strerror}") from None

    @contextmanager
    def open(self, name: str) -> Iterator[LocalReader]:
        """Open a file, and check at the end that it is still what it was when planned."""
        fd = os.open(self.root / name, os.O_RDONLY | _BINARY)
        try:
            self._check_unchanged(fd, name)
            yield LocalReader(fd, name)
            self._check_unchanged(fd, name)
        finally:
            os.close(fd)

    def newest_change(self) -> int:
        """When the youngest file was last changed, in nanoseconds."""
        self.files()
        return max(mtime for _, mtime in self._states.values())

    def _check_unchanged(self, fd: int, name: str) -> None:
        info = os.fstat(fd)
        if [info.st_size, info.st_mtime_ns] != self.state(name):
            raise RewriteError(
                f"{name}: the source file changed while it was being read",
                hint="Wait until nothing writes to the source, then run the command again.",
            )

    def state(self, name: str) -> list[int]:
        """Size in bytes and time of the last change in nanoseconds."""
        self.files()
        return self._states[name]


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

    def __init__(
        self, sink: LocalSink, name: str, temporary: Path, size: int, digest: bool
    ) -> None:
        self._sink = sink
        self._size = size
        self._name = name
        self._temporary = temporary
        self._position = 0
        self._on_its_way = 0  # bytes that the system was asked to write to the disk
        self._digest = hashlib.sha256() if digest else None
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | _BINARY
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

    def finish(self) -> Written:
        """Sync, rename to the file's own name, sync the directory, note it in the journal."""
        if self._position != self._size:
            raise RewriteError(
                f"{self._name}: {self._position} bytes were written instead of {self._size}"
            )
        os.fsync(self.fd)
        self.close()
        sha256 = None if self._digest is None else self._digest.hexdigest()
        return self._sink.commit_file(self._temporary, self._name, sha256)

    def close(self) -> None:
        """Close the file; nothing is promised about it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LocalSink:
    """An output directory."""

    steps = 1

    def __init__(self, root: Path) -> None:
        """Nothing is created before `begin`."""
        self.root = root.absolute()
        self.identity = str(root)
        self.remarks: list[str] = []
        self.url: str | None = None
        self._state = self.root / STATE
        self._journal: Journal | None = None
        self._lock = Lock(self._state / "lock")

    def is_at(self, source: SourceId) -> bool:
        """Whether the source is this directory."""
        return source.kind == "local" and Path(source.id).resolve() == self.root.resolve()

    def existing(self) -> dict[str, int]:
        """Name and size of what is there now, without the state of an unfinished run.

        Raises:
            DestinationError: there is something, and it is not a directory.
        """
        if not self.root.exists():
            return {}
        if not self.root.is_dir():
            raise DestinationError(f"{self.root}: exists and is not a directory")
        return {
            name: (self.root / name).lstat().st_size for name in _names(self.root, NOT_CHECKPOINT)
        }

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
        """A small file of the output; nothing where there is something else than a file."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else b""

    def unfinished(self) -> Any:
        """The job whose unfinished run is here, or None; a text if the journal is not ours."""
        return Journal.job_of(self._state / JOURNAL)

    def changed_at(self, name: str) -> int:
        """When a file of the output was written, in nanoseconds."""
        return (self.root / name).stat().st_mtime_ns

    def check_replaceable(self) -> None:
        """Refuse to remove what is no model: a home folder, say.

        Raises:
            DestinationError: nothing in the directory looks like a checkpoint.
        """
        names = {name for name in self.existing() if "/" not in name}
        weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
        model = "moescale.json" in names or ("config.json" in names and weights)
        if not model and not any((self._state / name).exists() for name in (JOURNAL, "lock")):
            raise DestinationError(
                f"{self.root}: does not look like a model, so --overwrite does not remove it",
                hint="Remove it yourself, or give another destination.",
            )

    def begin(self, job: Any, replace: bool) -> None:
        """Take the lock; start a journal for `job`, or go on with the one that is there.

        With `replace` the old content is removed, config and index first, so that it stops to
        load at once.

        Raises:
            DestinationError: another run holds the lock, or the place cannot be written to.
        """
        try:
            make_directory(self._state)
            self._lock.acquire()
            if replace:
                (self._state / JOURNAL).unlink(missing_ok=True)
                self._remove_content()
            self._journal = Journal(self._state / JOURNAL, job)
            for leftover in self._state.glob("*.tmp"):
                leftover.unlink()
        except OSError as error:
            self._lock.release()
            raise DestinationError(
                f"{self.root}: cannot be written to: {error.strerror}",
                hint="Give another destination, or make this one writable.",
            ) from None
        except DestinationError:
            self._lock.release()
            raise

    def _remove_content(self) -> None:
        names = sorted(
            self.existing(), key=lambda name: not name.endswith(("config.json", ".index.json"))
        )
        for name in names:
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
        return {
            name: Written(entry["size"], entry["sha256"])
            for name, entry in self._journal.entries.items()
            if _stamp(self.root / name) == entry["stamp"]
        }

    @contextmanager
    def shard(
        self, name: str, size: int, digest: bool = False, arrived: Arrived = nobody
    ) -> Iterator[LocalWriter]:
        """A writer for a file of `size` bytes; leaving without `finish` discards it."""
        temporary = self._temporary(name)
        writer = LocalWriter(self, name, temporary, size, digest)
        try:
            yield writer
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)

    def put(self, name: str, data: bytes) -> Written:
        """Write a small file whole, as durable as a large one."""
        with self.shard(name, len(data), digest=True) as writer:
            writer.write(memoryview(data))
            return writer.finish()

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Write the last files in order, drop the state; old content is gone since `begin`."""
        _remove_empty_folders(self.root)
        for name, data in last.items():
            with io_errors(name):
                self.put(name, data)
        self._drop_state()

    def _drop_state(self) -> None:
        """Remove the state, the journal last: while it is there, a rerun comes here again."""
        assert self._journal is not None
        self._journal.close()
        for leftover in self._state.glob("*.tmp"):
            leftover.unlink()
        (self._state / JOURNAL).unlink()
        self._lock.release()
        shutil.rmtree(self._state, ignore_errors=True)
        sync_directory(self.root)

    def amend(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output."""
        new = self.root / f".{name}.tmp"
        try:
            with open(new, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.root / name)
        finally:
            new.unlink(missing_ok=True)
        sync_directory(self.root)

    def commit_file(self, temporary: Path, name: str, sha256: str | None) -> Written:
        """Give a synced temporary file its own name, and note it."""
        assert self._journal is not None
        target = self.root / name
        make_directory(target.parent)
        os.replace(temporary, target)
        sync_directory(target.parent)
        written = Written(target.stat().st_size, sha256)
        self._journal.add(name, written, _stamp(target))
        return written

    def _temporary(self, name: str) -> Path:
        return self._state / (hashlib.sha256(name.encode()).hexdigest()[:32] + ".tmp")

    def close(self) -> None:
        """Let go of journal and lock; the state stays for a rerun."""
        if self._journal is not None:
            self._journal.close()
        self._lock.release()


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call that starts writing to the disk without waiting for it."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin with what was written, so that the sync at the end has little to wait for.

    A hint: what it cannot do, the sync does.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, size, 2)  # SYNC_FILE_RANGE_WRITE


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
