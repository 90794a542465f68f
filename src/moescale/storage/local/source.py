"""A checkpoint in a directory: what is read must stay what it was when it was planned."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

from moescale.checkpoint.safetensors.header import LENGTH_BYTES, header_length, parse_header
from moescale.checkpoint.safetensors.index import SUFFIX
from moescale.errors import CheckpointError, RewriteError, SourceError
from moescale.storage.base import SMALL_FILE_BYTES, FileInfo, SourceId, check_name
from moescale.storage.local.filesystem import BINARY
from moescale.storage.local.journal import JOURNAL, NOT_CHECKPOINT, STATE
from moescale.storage.reader import FileReader
from moescale.storage.shelf import Shelf

SHARE_HINT = "Give a place that all machines share under the same path."


class LocalSource:
    """A checkpoint in a directory, which may be a snapshot of the Hub's cache."""

    remote = False
    parallel_reads = 1

    def __init__(
        self,
        root: Path,
        identity: SourceId | None = None,
        follow_links: bool = True,
        links_of_shards: bool = True,
        shelf: Shelf | None = None,
    ) -> None:
        """`root` is an existing directory; `identity` says what it is a copy of.

        Without `follow_links` only shards may be links out of it, since what a link leads to is
        published with the output; without `links_of_shards` not even those. With a `shelf` its
        files are all that there is.

        Raises:
            SourceError: it is not a directory, or an output that is not finished.
        """
        with _readable(root):
            if not root.is_dir():
                raise SourceError(
                    f"{root}: {'is not a directory' if root.exists() else 'does not exist'}",
                    hint="Give the directory of a checkpoint; a repo on the Hub is org/name,"
                    " a revision of it hf://org/name@rev, or org/name with --revision.",
                )
            if not os.access(root, os.R_OK | os.X_OK):
                raise SourceError(f"{root}: cannot be read", hint="Mend its permissions.")
            state = shelf.state if shelf else STATE
            unfinished = (root / state / JOURNAL).exists()
        if unfinished:
            raise SourceError(
                f"{root}: holds an unfinished run of moescale ({state}/)",
                hint="Run the command that started it again; it resumes.",
            )
        self.root = root.resolve()
        self.received = 0
        self.remarks: list[str] = []
        self.linked: dict[str, Path] = {}
        """Where the links out of the directory lead."""
        self.shelf = shelf
        self._follow, self._shards_too = follow_links, links_of_shards
        self._files: dict[str, FileInfo] | None = None
        self._states: dict[str, list[int]] = {}
        self._entry_times: dict[str, int] = {}
        repo, revision = _hub_cache_snapshot(self.root)
        self.identity = identity or SourceId("local", str(root), revision, repo, self.root.name)

    def files(self) -> Mapping[str, FileInfo]:
        """All regular files, by name relative to the root.

        Raises:
            CheckpointError: a link that the model needs leads nowhere, one leads out of the repo
                and may not be followed, or a file is no plain file.
            SourceError: the system does not let us look.
        """
        if self._files is None:
            with _readable(self.root):
                self._files = dict(sorted(self._walk(self.root, "", (self.root,))))
        return self._files

    def _walk(
        self, folder: Path, prefix: str, above: tuple[Path, ...]
    ) -> Iterator[tuple[str, FileInfo]]:
        """The files of a folder; `above` are the real folders that it lies in, and its own."""
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name in NOT_CHECKPOINT and not prefix:
                continue
            planned = self.shelf.planned(entry.name) if self.shelf else prefix + entry.name
            if planned is None:
                continue
            name = check_name(planned, str(self.root))
            real = above[-1] / entry.name
            if entry.is_symlink():
                target = _target(Path(entry.path))
                if target is None or target in above:
                    self._check_needless(name, target)
                    continue
                self._check_link(name, target)
                real = target
            self._check_readable(entry, name)
            if entry.is_dir() and self.shelf is None:
                yield from self._walk(Path(entry.path), name + "/", (*above, real))
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

    def _check_needless(self, name: str, target: Path | None) -> None:
        """Pass by a link that leads nowhere, or round in a circle, where no loader reads it."""
        where = "nowhere" if target is None else "round in a circle"
        if self.shelf or _NEEDED.search(name.rpartition("/")[2]):
            raise CheckpointError(
                f"{self.root}: {name!r} is a link that leads {where}",
                hint="Put the file there, or remove the link if it is no part of the model.",
            )
        self.remarks.append(f"{name}: is a link that leads {where}; it is left out")

    def _check_link(self, name: str, target: Path) -> None:
        """Note where a link out of the directory leads, and refuse it where that is not wanted."""
        blobs = (self.root.parent.parent / "blobs").resolve()
        in_cache = self.root.parent.name == "snapshots" and target.is_relative_to(blobs)
        if in_cache or target.is_relative_to(self.root):
            return
        self.linked[name] = target
        if self._follow:
            return
        if self._shards_too and (self.shelf or (name.endswith(SUFFIX) and _is_sound(target))):
            return
        if not self._shards_too:
            raise CheckpointError(f"{self.root}: {name!r} is a link out of the directory", hint="")
        raise CheckpointError(
            f"{self.root}: {name!r} is a link out of the directory, and what it leads to would be"
            " published",
            hint="Put the file itself there, or say --follow-links.",
        )

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A stretch of one file; the whole file, if it is a small one, by default."""
        if size is None:
            size = self.files()[name].size - start
            if size > SMALL_FILE_BYTES:
                raise CheckpointError(f"{name}: {size} bytes are too many for a file of this kind")
        try:
            with open(self.at(name), "rb") as file:
                self._check_unchanged(file.fileno(), name)
                file.seek(start)
                data = file.read(size)
                self._check_unchanged(file.fileno(), name)
                return data
        except OSError as error:
            raise SourceError(f"{self.root}: {name}: {error.strerror}") from None

    @contextmanager
    def open(self, name: str) -> Iterator[FileReader]:
        """Open a file, and check at the end that it is still what it was when planned."""
        fd = os.open(self.at(name), os.O_RDONLY | BINARY)
        try:
            self._check_unchanged(fd, name)
            yield FileReader(fd, name)
            self._check_unchanged(fd, name)
        finally:
            os.close(fd)

    def at(self, name: str) -> Path:
        """Where a file is."""
        return self.root / (self.shelf.there(name) if self.shelf else name)

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
                hint="Wait until nothing writes to the source, then run the command again; it needs"
                " --overwrite if it had begun to write.",
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
            path = self.at(name)
            try:
                info = path.stat()
            except OSError as error:
                raise SourceError(
                    f"{path}: cannot be seen: {error.strerror}", hint=SHARE_HINT
                ) from None
            if [info.st_size, info.st_mtime_ns] != self._states[name]:
                raise SourceError(f"{path}: is another file here", hint=SHARE_HINT)


_NEEDED = re.compile(
    r"^(?!\.).*\.(?:safetensors|json|model|py|jinja|tiktoken|bin|pt|pth)$|^(?:vocab|merges)\b"
)
"""File names that a loader may read."""


def _target(link: Path) -> Path | None:
    """What a link leads to in the end; None for nothing."""
    try:
        return link.resolve(strict=True)
    except PermissionError:
        raise
    except (OSError, RuntimeError):  # nothing is there, or it leads to itself
        return None


def _is_sound(shard: Path) -> bool:
    """Whether a file is a safetensors file."""
    size = shard.stat().st_size
    try:
        with open(shard, "rb") as file:
            length = header_length(file.read(LENGTH_BYTES), size, shard.name)
            parse_header(file.read(length), size, shard.name)
    except CheckpointError:
        return False
    return True


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turn what the system says about a source into an error that names the place."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{error.filename or root}: cannot be read: {error.strerror}") from None


def _hub_cache_snapshot(root: Path) -> tuple[str | None, str | None]:
    """Repo id and commit of a ``models--org--name/snapshots/<commit>`` folder of the Hub cache."""
    repo = root.parent.parent
    if root.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return None, None
    return repo.name.removeprefix("models--").replace("--", "/"), root.name
