"""What a place to read from and a place to write to have to offer."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from moescale.checkpoint.rewrite import Reader, Writer
from moescale.checkpoint.rounding import Rounding
from moescale.errors import CheckpointError, RewriteError
from moescale.storage.shelf import Shelf

SMALL_FILE_BYTES = 128 << 20
"""Configs, indexes and cards are read whole; a larger one is refused."""

_RESERVED = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|^[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class SourceId:
    """Where a checkpoint comes from; `revision` is a commit, None for a directory."""

    kind: Literal["local", "hub"]
    id: str
    revision: str | None = None
    repo: str | None = None  # the Hub repo, where it is known
    folder: str | None = None  # the name of a directory, without the way to it

    @property
    def name(self) -> str:
        """The name without the place on this machine."""
        name = self.id if self.kind == "hub" else self.repo or self.folder or self.id
        return name.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a repo: its name with forward slashes, its size in bytes."""

    name: str
    size: int
    sha256: str | None = None  # where the repo states it


class Source(Protocol):
    """A repo to read from. Never written to."""

    received: int
    """Bytes that have come over the network."""
    remarks: list[str]
    """What the user should know of its files, once they are known."""
    shelf: Shelf | None
    """What its files are called, where they are one model of a folder that has others."""
    remote: bool
    """Whether its bytes come over a network, where each stretch is a request."""
    parallel_reads: int
    """Small reads that are worth doing at once."""

    @property
    def linked(self) -> Mapping[str, Path]:
        """Where those of its files lie that are links to somewhere else."""

    @property
    def identity(self) -> SourceId:
        """Where this is."""

    def files(self) -> Mapping[str, FileInfo]:
        """All files that belong to the checkpoint, by name."""

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A stretch of one file, the whole file by default; for small reads."""

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """Open a large file for reading."""

    def on_disk(self, names: Sequence[str]) -> Path:
        """The folder that has these files, for programs that read a checkpoint by themselves."""

    def newest_change(self) -> int:
        """When the youngest file was last changed, in nanoseconds; 0 for a commit."""

    def state(self, name: str) -> Any:
        """What changes when the file changes (JSON); compared between the runs of one job."""

    def only(self, names: Iterable[str]) -> Source:
        """The same source with no more than these files; it can be sent to another machine."""

    def check(self) -> None:
        """Refuse to work where these files cannot be seen as they were when planned."""


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file of the output."""

    size: int
    sha256: str | None = None  # where it is known without a second read


Arrived = Callable[[int], None]
"""Called with the number of bytes that have arrived since the last call, from any thread."""


def no_progress(count: int) -> None:
    """Nobody wants to know how many bytes arrive."""


@dataclass(frozen=True, slots=True)
class Made:
    """A large file that is complete and durable, but has not got its name yet.

    `at` says where it lies, to the destination that gives it its name; `rounding`, what the
    rounding of scales did to its tensors.
    """

    written: Written
    at: Any = None
    rounding: Mapping[str, Rounding] = field(default_factory=dict)


class ShardWriter(Writer, Protocol):
    """A file without its name; the destination gives it in `commit_file`."""

    def finish(self) -> Made:
        """Make the file complete and durable."""


class Writers(Protocol):
    """Opens writers for the large files of an output; it can be sent to another machine."""

    @property
    def steps(self) -> int:
        """Of a byte on its way: 1 if it is there once it is written, 2 if it is sent from there."""

    def check(self) -> None:
        """Refuse to work where the output cannot be reached."""

    def open(
        self, name: str, size: int, digest: bool, arrived: Arrived
    ) -> AbstractContextManager[ShardWriter]:
        """Start a large file of `size` bytes; leaving the context without `finish` discards it.

        With `digest` its SHA-256 is wanted, although that keeps bytes from the kernel's copy.
        `arrived` is told of the bytes that have been sent, where there are two steps.
        """


class Destination(Protocol):
    """A repo to write to. Nothing under a final name is ever incomplete."""

    remarks: list[str]
    """What the user should hear at the end."""
    url: str | None
    """Where the output can be looked at, if it has an address."""
    keeps_files: bool
    """Whether single files of a finished output can stay while others are written again."""
    remote: bool
    """Whether each look at what is there is a request."""
    default_jobs: int
    """Large files that are written at once, where there are as many cores."""

    @property
    def identity(self) -> str:
        """How the user calls this place."""

    @property
    def writers(self) -> Writers:
        """What writes its large files."""

    def share(self) -> None:
        """Let the writers be used on other machines, which then check that they see the same."""

    def is_at(self, source: SourceId) -> bool:
        """Whether this place is where the source is read from."""

    def holds(self, file: Path) -> bool:
        """Whether a file of this machine, which need not be there, is one of the output."""

    def room(self) -> int | None:
        """Bytes that an output may have here; None where nobody knows."""

    def may_share(self, source: SourceId) -> bool:
        """Whether the source may be on the same disk, so that a copy of blocks needs no room."""

    def check_writable(self) -> None:
        """Say beforehand what `begin` would find."""

    def existing(self) -> Mapping[str, int]:
        """Name and size of what is there, without the state of an unfinished run."""

    def read(self, name: str) -> bytes:
        """A small file of what is there."""

    def recorded(self) -> bytes | None:
        """What the output that is there says of itself; None where nothing does."""

    def changed_at(self, name: str) -> int:
        """When a file of what is there was written, in nanoseconds."""

    def unfinished(self) -> Any:
        """The job of which an unfinished run is here; None if there is none."""

    def check_replaceable(self) -> None:
        """Refuse to remove what is no model."""

    def begin(self, job: Any, replace: bool, keep: Mapping[str, Written] = ...) -> None:
        """Start a run of `job`, or go on with the unfinished one; let nobody else in.

        With `replace` the old content goes, but for the files of `keep` where `keeps_files` is set.
        """

    def finished(self) -> Mapping[str, Written]:
        """The large files that an earlier run of the same job has finished."""

    def check_card(self, card: bytes) -> None:
        """Refuse a card that the place would not take."""

    def copy(self, files: Iterable[FileInfo], source: SourceId) -> Mapping[str, Written]:
        """Copy files of the source without moving their bytes; those that this place can."""

    def commit_file(self, name: str, made: Made) -> Written:
        """Give a large file its name, where a rerun finds it."""

    def put(self, name: str, data: bytes) -> Written:
        """Write a small file whole."""

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Write the files that make the output load, in order, and remove what is not in `keep`."""

    def amend(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output."""

    def output(self) -> Source:
        """What was written, for reading."""

    def cancel(self) -> None:
        """Wake up the threads that wait for this place; the run ends."""

    def close(self) -> None:
        """Let go of the place; an unfinished run can be continued."""


Progress = Callable[[str, int], None]
"""Called with a file's name and the number of bytes done since the last call."""

Phase = Callable[[str, Mapping[str, int]], None]
"""Called with ``writing`` or ``verifying`` when that begins, and the size of each file in it."""


def check_name(name: str, where: str) -> str:
    """Refuse a file name that could leave the repo or the destination.

    Raises:
        CheckpointError: absolute, upwards, empty or with characters of another system's paths.
    """
    parts = name.split("/")
    if not name or _RESERVED.search(name) or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(
            f"{where}: the file name {name!r} is not a plain path inside the repo",
            hint="Such a name could write outside the destination; the repo is broken or hostile.",
        )
    return name


@contextmanager
def io_errors(name: str) -> Iterator[None]:
    """Turn what the operating system says about a file into an error that names the file.

    Raises:
        RewriteError: with what to do about it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, hint = "the disk is full", "Free some space and run the same command again"
        else:
            why, hint = error.strerror or str(error), "Mend the cause and run the command again"
        raise RewriteError(f"{name}: {why}", hint=f"{hint}; it resumes.") from error
