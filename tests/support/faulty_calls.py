"""System calls that fail, do a part of their work, or are the last call of a process.

`Calls` replaces the functions of `os` that reach the disk, counts the calls on anything below one
folder, and makes one of them fail. Files opened with `open` are built from the same functions. An
audit hook reports calls that it does not see.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import glob
import io
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = 9
"""Exit code of a process that ended inside a call."""

CHANGING = frozenset(
    (
        "open",
        "write",
        "copy_file_range",
        "fsync",
        "replace",
        "rename",
        "unlink",
        "remove",
        "mkdir",
        "rmdir",
        "ftruncate",
    )
)
"""Calls that may change the disk; opening to read is among them."""

READING = frozenset(
    ("read", "preadv", "lseek", "close", "flock", "scandir", "listdir", "stat", "lstat", "fstat")
)

SIZED = frozenset(("write", "copy_file_range", "read", "preadv"))
"""Calls that may do a part of their work."""

EVENTS = frozenset(
    (
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.scandir",
        "os.listdir",
        "os.truncate",
        "os.link",
        "os.symlink",
        "os.utime",
        "os.chmod",
        "os.chown",
    )
)
"""Audit events about paths."""

FLAGS: Mapping[str, int] = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}


@dataclass(frozen=True)
class Fault:
    """A fault, and the calls that it hits.

    `kind` is ``none``, ``error`` (the call is not made), ``failed`` (it is made, but reports an
    error), ``short``, ``before`` and ``after`` (the process ends there), ``cut`` and ``names``
    (the power is cut), or ``act`` (something else happens first). With `lasting` all later calls
    with these names are hit too.
    """

    kind: str = "none"
    names: frozenset[str] = frozenset()
    at: int = 0
    code: int = errno.EIO
    lasting: bool = False
    act: Callable[[], None] = lambda: None


class Raw(io.RawIOBase):
    """A raw file built from the functions of `os`."""

    def __init__(self, path: Any, mode: str, closefd: bool = True, **_: Any) -> None:
        self._mode, self._closes, self._fd = mode, closefd, -1
        given = isinstance(path, int)
        self._fd = path if given else os.open(path, FLAGS[mode] | os.O_CLOEXEC, 0o666)

    def fileno(self) -> int:
        return self._fd

    def readable(self) -> bool:
        return self._mode in ("r", "r+")

    def writable(self) -> bool:
        return self._mode != "r"

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        return os.write(self._fd, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return os.lseek(self._fd, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self._fd, size)
        return size

    def close(self) -> None:
        super().close()
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._closes:
            os.close(fd)


class Calls:
    """The calls of this process on paths below `folder`, with a fault at one of them."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.log: list[tuple[str, str]] = []
        self.unseen: list[str] = []
        self._folder = str(folder)
        self._fault = fault
        self._paths: dict[int, str] = {}
        self._hits = 0
        self._mutex = threading.Lock()
        # When the power is cut, no call of another thread is in progress or follows.
        cut = fault.kind in ("cut", "names")
        self.turn: AbstractContextManager[Any] = threading.Lock() if cut else nullcontext()
        self._inside = threading.local()
        self._disk = Disk(folder) if fault.kind in ("cut", "names") else None
        names = CHANGING | READING - {"flock"}
        self._real = {name: getattr(os, name) for name in names if hasattr(os, name)}
        self._real["flock"] = fcntl.flock
        self._open = builtins.open

    def install(self, without: frozenset[str] = frozenset()) -> None:
        """Replace the functions of `os`; remove those that the system is to lack."""
        for name, real in self._real.items():
            module = fcntl if name == "flock" else os
            setattr(module, name, self._replacement(name, real))
        _tell_glob()
        for name in without:
            delattr(os, name)
        builtins.open = io.open = self._open_file
        if self._fault.kind == "none":
            _watched.append(self)

    def remove(self) -> None:
        """Restore the functions of `os`."""
        for name, real in self._real.items():
            setattr(fcntl if name == "flock" else os, name, real)
        _tell_glob()
        builtins.open = io.open = self._open
        _watched.clear()

    def audit(self, event: str, target: Any) -> None:
        """Record an audit event that no call in `Calls` caused."""
        where = None if getattr(self._inside, "depth", 0) else self._where(target)
        if where is not None:
            self.unseen.append(f"{event} {where}")

    def _where(self, target: Any, dir_fd: int | None = None) -> str | None:
        """The path of a file below the folder, given by name or by descriptor."""
        if isinstance(target, int):
            return self._paths.get(target)
        path = os.path.join(self._paths.get(dir_fd, ""), os.fsdecode(target))
        return path if path.startswith(self._folder) else None

    def _open_file(self, file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if self._where(file) is None:
            return self._open(file, mode, *more, **options)
        text = "b" not in mode
        raw = Raw(file, mode.replace("b", "").replace("t", ""), **options)
        if raw.readable() and raw.writable():
            layer: Any = io.BufferedRandom(raw)  # type: ignore[arg-type]
        else:
            layer = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return io.TextIOWrapper(layer, options.get("encoding")) if text else layer

    def _replacement(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            target = arguments[1] if name == "copy_file_range" else (arguments or (".",))[0]
            where = self._where(target, options.get("dir_fd"))
            if where is None or getattr(self._inside, "depth", 0):
                return real(*arguments, **options)
            self._inside.depth = 1
            try:
                with self.turn:
                    result = self._hit(name, where, real, arguments, options)
            finally:
                self._inside.depth = 0
            if name == "open":
                self._paths[result] = where
            return result

        return call

    def _hit(self, name: str, where: str, real: Any, arguments: Any, options: Any) -> Any:
        with self._mutex:
            self.log.append((name, where))
            counted = name in self._fault.names
            self._hits += counted
            mine = counted and self._hits == self._fault.at + 1
            mine |= counted and self._fault.lasting and self._hits > self._fault.at
        if not mine:
            return self._done(name, where, real, arguments, options)
        kind = self._fault.kind
        if kind == "before":
            os._exit(KILLED)
        if kind == "error":
            if name == "close":
                real(*arguments)  # the descriptor is free again, even after an error
            raise OSError(self._fault.code, os.strerror(self._fault.code), where)
        if kind == "act":
            self._fault.act()
        if kind == "short" and name in SIZED:
            arguments = shortened(name, arguments)
        result = self._done(name, where, real, arguments, options)
        if kind == "failed":
            raise OSError(self._fault.code, os.strerror(self._fault.code), where)
        if kind == "after":
            os._exit(KILLED)
        if self._disk is not None:
            try:
                self._disk.lose(names=kind == "cut")
            finally:
                os._exit(KILLED)
        return result

    def _done(self, name: str, where: str, real: Any, arguments: Any, options: Any) -> Any:
        result = real(*arguments, **options)
        if name == "fsync" and self._disk is not None:
            self._disk.sync(where)
        return result


def _tell_glob() -> None:
    """Replace the references that `Path.glob` keeps in Python 3.13."""
    if sys.version_info[:2] == (3, 13):
        glob._StringGlobber.scandir = staticmethod(os.scandir)
        glob._StringGlobber.lstat = staticmethod(os.lstat)


_watched: list[Calls] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event in EVENTS:
        _watched[0].audit(event, arguments[0])


def watch() -> None:
    """Report calls that `Calls` does not see, until this process ends: hooks cannot be removed.

    Use it in a separate process. Before Python 3.12, threads that should be traced (for coverage)
    cannot start while a hook runs.
    """
    sys.addaudithook(_audit)


def shortened(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the same call with about half the bytes, at least one."""
    if name == "copy_file_range":
        source, target, count, *rest = arguments
        return source, target, max(1, count // 2), *rest
    if name == "preadv":
        fd, [buffer], *rest = arguments
        return fd, [buffer[: max(1, len(buffer) // 2)]], *rest
    fd, what = arguments
    if name == "read":
        return fd, max(1, what // 2)
    return fd, bytes(what)[: max(1, len(what) // 2)]


class Disk:
    """The durable part of a folder: the files and names that were synced.

    This is the strictest reading of POSIX: syncing a file saves its bytes but no name, syncing a
    directory saves its names, and nothing else is ever saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._data: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}  # the inode of a folder and those in it
        self._open: list[int] = []
        self._root = self._number(self._folder)
        for place, _, files in os.walk(folder):
            self._sync_names(place)
            for name in files:
                self._sync_data(os.path.join(place, name))

    def sync(self, path: str) -> None:
        """Record that a file or a directory was synced."""
        (self._sync_names if os.path.isdir(path) else self._sync_data)(path)

    def _sync_data(self, path: str) -> None:
        number = self._number(path)
        self._data[number] = os.pread(self._open[-1], 1 << 24, 0)

    def _sync_names(self, path: str) -> None:
        self._names[self._number(path)] = {e.name: e.inode() for e in os.scandir(path)}

    def _number(self, path: str) -> int:
        fd = os.open(path, os.O_RDONLY)
        self._open.append(fd)  # so that nothing else gets this inode
        return os.fstat(fd).st_ino

    def lose(self, names: bool) -> None:
        """Put the folder into its state after a power cut; without `names`, all names stay."""
        before = self._current()
        after = self._durable(self._folder, self._root) if names else before
        for path, inode in before.items():
            if after.get(path) != inode:
                os.unlink(path)
        for path, inode in after.items():
            self._restore(path, self._data.get(inode, b""))
        for place, folders, _ in os.walk(self._folder, topdown=False):
            for name in folders if names else ():
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(place, name))

    def _restore(self, path: str, data: bytes) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        if os.pread(fd, 1 << 24, 0) != data:  # otherwise times stay as they are
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
        os.close(fd)

    def _current(self) -> dict[str, int]:
        return {
            os.path.join(place, name): os.stat(os.path.join(place, name)).st_ino
            for place, _, files in os.walk(self._folder)
            for name in files
        }

    def _durable(self, folder: str, number: int) -> dict[str, int]:
        result: dict[str, int] = {}
        for name, inode in self._names.get(number, {}).items():
            path = os.path.join(folder, name)
            is_file = inode in self._data or os.path.isfile(path)
            result |= {path: inode} if is_file else self._durable(path, inode)
        return result
