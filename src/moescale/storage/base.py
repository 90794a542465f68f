"""The interfaces of sources and destinations, and the records that they exchange."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from moescale.checkpoint.rewrite import Reader, Writer
from moescale.checkpoint.rounding import Rounding
from moescale.errors import CheckpointError, RewriteError
from moescale.storage.gguf_set import GgufSet

SMALL_FILE_BYTES = 128 << 20
"""Configs, indexes and cards are read whole; a larger one is refused."""

_RESERVED = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|^[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class SourceId:
    """Where a checkpoint comes from.

    Attributes:
        id: the path as the user gave it, or the repo with its folder.
        path: the path; None for a repo on the Hub.
        revision: the commit; None for a directory outside the Hub's cache.
        repo: the Hub repo, if known.
        folder: the name of a directory, without its parents.
    """

    id: str
    path: Path | None = None
    revision: str | None = None
    repo: str | None = None
    folder: str | None = None

    @property
    def kind(self) -> Literal["local", "hub"]:
        """The kind of source, as plans and records state it."""
        return "hub" if self.path is None else "local"

    @property
    def where(self) -> str:
        """The kind of source, in words, with the commit of a repo."""
        return f"Hub, commit {self.revision}" if self.path is None else "local"

    @property
    def model_id(self) -> str | None:
        """The argument for ``from_pretrained`` and engines; they cannot load a folder of a repo."""
        whole = self.path is not None or self.repo in (None, self.id)
        return self.id if whole else None

    @property
    def name(self) -> str:
        """The name, without any path of this machine."""
        name = self.id if self.path is None else self.repo or self.folder or self.id
        return name.encode(errors="backslashreplace").decode()


class FileInfo(NamedTuple):
    """A file of a source.

    Attributes:
        name: its path in the repo, with forward slashes.
        size: in bytes.
        sha256: the digest, if the repo states it.
    """

    name: str
    size: int
    sha256: str | None = None


class Source(Protocol):
    """A checkpoint to read from. It is never written to."""

    received: int
    """Bytes received over the network."""
    remarks: list[str]
    """Notes on its files for the user; complete once `files` has run."""
    gguf_set: GgufSet | None
    """The names of its files, if they are one GGUF model in a folder with others."""
    remote: bool
    """Whether every read is a request over the network."""
    parallel_reads: int
    """How many small reads are worth doing in parallel."""

    @property
    def links(self) -> Mapping[str, Path]:
        """The files that are links out of the source, with their targets."""

    @property
    def identity(self) -> SourceId:
        """Where the checkpoint comes from."""

    def files(self) -> Mapping[str, FileInfo]:
        """All files that belong to the checkpoint, by name."""

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Part of a file, by default all of it; for small reads."""

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """Open a large file for reading."""

    def local_folder(self, names: Sequence[str]) -> Path:
        """A local folder with these files, for libraries that load a checkpoint themselves."""

    def last_changed(self) -> int:
        """When the newest file was last changed, in nanoseconds; 0 for a commit."""

    def fingerprint(self, name: str) -> Any:
        """A JSON value that changes when the file changes; a resumed run compares it."""

    def subset(self, names: Iterable[str]) -> Source:
        """The same source limited to these files; it can be sent to another machine."""

    def check_reachable(self) -> None:
        """Check that this machine sees the files as they were when planned."""


class FileRecord(NamedTuple):
    """A finished file of the output.

    Attributes:
        size: in bytes.
        sha256: the digest, if it is known without reading the file again.
    """

    size: int
    sha256: str | None = None


OnSent = Callable[[int], None]
"""Called with the number of bytes sent since the last call, from any thread."""


def ignore(*_: object) -> None:
    """Ignore progress; the default of every callback."""


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A large file that is complete and durable, but does not have its final name yet.

    Attributes:
        record: its size and digest.
        handle: how its destination finds it.
        rounding: the effect of rounding block scales, by tensor.
    """

    record: FileRecord
    handle: Any = None
    rounding: Mapping[str, Rounding] = field(default_factory=dict)


class ShardWriter(Writer, Protocol):
    """Writes a file without a name; `Destination.commit_file` names it."""

    def finish(self) -> PendingFile:
        """Make the file complete and durable."""


class Writers(Protocol):
    """Opens writers for the large files of an output; it can be sent to another machine."""

    @property
    def steps(self) -> int:
        """How often each byte is counted: 1 if written in place, 2 if written and then sent."""

    def check_reachable(self) -> None:
        """Check that this machine can reach the output."""

    def open(
        self, name: str, size: int, digest: bool, on_sent: OnSent
    ) -> AbstractContextManager[ShardWriter]:
        """Start a large file of `size` bytes; leaving the context without `finish` discards it.

        `digest` asks for the SHA-256, which rules out copies inside the kernel. `on_sent` is
        called only if there are two steps.
        """


class Destination(Protocol):
    """A checkpoint to write to. A file under its final name is always complete."""

    remarks: list[str]
    """Notes for the user at the end of the run."""
    url: str | None
    """The address of the output, if it has one."""
    keeps_files: bool
    """Whether some files of a finished output can stay while others are rewritten."""
    remote: bool
    """Whether every look at the existing files is a request over the network."""
    default_jobs: int
    """How many large files are written in parallel, given enough cores."""

    @property
    def identity(self) -> str:
        """The destination as the user gave it."""

    @property
    def writers(self) -> Writers:
        """The writers of its large files."""

    def prepare_for_workers(self) -> None:
        """Prepare the writers for other machines, so that each can check that it sees this one."""

    def is_same_as(self, source: SourceId) -> bool:
        """Whether the source is read from this very location."""

    def holds(self, file: Path) -> bool:
        """Whether a path of this machine, existing or not, belongs to the output."""

    def available_bytes(self) -> int | None:
        """Bytes that the output may take; None if unknown."""

    def may_share_blocks(self, source: SourceId) -> bool:
        """Whether the source may be on the same disk, where cloned blocks take no space."""

    def check_writable(self) -> None:
        """Refuse early what `begin` would refuse."""

    def existing(self) -> Mapping[str, int]:
        """Names and sizes of the existing files, without the state of an unfinished run."""

    def read_existing(self, name: str) -> bytes:
        """The content of a small existing file."""

    def read_provenance(self) -> bytes | None:
        """The provenance of the existing output; None if it has none."""

    def changed_at(self, name: str) -> int:
        """When an existing file was written, in nanoseconds."""

    def unfinished_job(self) -> Any:
        """The job of the unfinished run here; None if there is no such run."""

    def check_replaceable(self) -> None:
        """Refuse to remove files that are not a model."""

    def begin(self, job: Any, replace: bool, keep: Mapping[str, FileRecord] = ...) -> None:
        """Start a run of `job`, or continue the unfinished one, and lock out all other runs.

        `replace` removes the old content, except the files of `keep` if `keeps_files` is set.
        """

    def finished_files(self) -> Mapping[str, FileRecord]:
        """The large files that an earlier run of the same job has finished."""

    def check_card(self, card: bytes) -> None:
        """Refuse a card that the destination would not accept."""

    def copy_on_server(
        self, files: Iterable[FileInfo], source: SourceId
    ) -> Mapping[str, FileRecord]:
        """Copy files of the source without moving their bytes; returns the copied ones."""

    def commit_file(self, name: str, pending: PendingFile) -> FileRecord:
        """Give a large file its name, and note it for a rerun."""

    def write_small(self, name: str, data: bytes) -> FileRecord:
        """Write a small file in one piece."""

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Write the files that make the output load, in order; remove all files not in `keep`."""

    def replace_small(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output."""

    def open_output(self) -> Source:
        """The output, for reading."""

    def cancel(self) -> None:
        """Wake up threads that wait for the destination; the run ends."""

    def close(self) -> None:
        """Release the destination; an unfinished run can be continued."""


Progress = Callable[[str, int], None]
"""Called with a file's name and the number of bytes done since the last call."""

Phase = Callable[[str, Mapping[str, int]], None]
"""Called at the start of ``writing`` and ``verifying``, with the size of each file in it."""


def check_name(name: str, where: str) -> str:
    """Refuse a file name that could leave the repo or the destination.

    Raises:
        CheckpointError: the name is absolute, empty, has ``..`` or characters of other systems'
            paths.
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
    """Turn an error of the operating system into one that names the file.

    Raises:
        RewriteError: with a hint about what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, hint = "the disk is full", "Free some space and run the same command again"
        else:
            why, hint = error.strerror or str(error), "Fix the cause and run the command again"
        raise RewriteError(f"{name}: {why}", hint=f"{hint}; it resumes.") from error
