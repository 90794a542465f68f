"""A checkpoint in a directory; its files must not change after planning."""

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
from moescale.storage.gguf_set import GgufSet
from moescale.storage.local.filesystem import BINARY
from moescale.storage.local.journal import IGNORED_FOLDERS, JOURNAL, STATE
from moescale.storage.reader import FileReader

SHARE_HINT = "Give a folder that all machines share under the same path."


class LocalSource:
    """A checkpoint in a directory, which may be a snapshot of the Hub's cache."""

    remote = False
    parallel_reads = 1

    def __init__(
        self,
        root: Path,
        identity: SourceId | None = None,
        follow_links: bool = True,
        follow_shard_links: bool = True,
        gguf_set: GgufSet | None = None,
    ) -> None:
        """Open an existing directory.

        Args:
            root: the directory.
            identity: the origin of a copy; by default the directory itself.
            follow_links: whether files may be links out of the directory; the output publishes
                their targets.
            follow_shard_links: whether shards may be such links even without `follow_links`.
            gguf_set: the files to read, if the directory has others.

        Raises:
            SourceError: the path is not a directory, or is an unfinished output.
        """
        with _os_errors(root):
            if not root.is_dir():
                raise SourceError(
                    f"{root}: {'is not a directory' if root.exists() else 'does not exist'}",
                    hint="Give the directory of a checkpoint; a repo on the Hub is org/name,"
                    " a revision of it hf://org/name@rev, or org/name with --revision.",
                )
            if not os.access(root, os.R_OK | os.X_OK):
                raise SourceError(f"{root}: cannot be read", hint="Change its permissions.")
            state = gguf_set.state if gguf_set else STATE
            unfinished = (root / state / JOURNAL).exists()
        if unfinished:
            raise SourceError(
                f"{root}: holds an unfinished run of moescale ({state}/)",
                hint="Run the command that started it again; it resumes.",
            )
        self.root = root.resolve()
        self.received = 0
        self.remarks: list[str] = []
        self.links: dict[str, Path] = {}
        """The targets of links out of the directory."""
        self.gguf_set = gguf_set
        self._follow_links, self._follow_shard_links = follow_links, follow_shard_links
        self._files: dict[str, FileInfo] | None = None
        self._states: dict[str, list[int]] = {}
        self._entry_times: dict[str, int] = {}
        repo, revision = _hub_cache_snapshot(self.root)
        self.identity = identity or SourceId(str(root), root, revision, repo, self.root.name)

    def files(self) -> Mapping[str, FileInfo]:
        """All regular files, by name relative to the root.

        Raises:
            CheckpointError: a link that the model needs is broken, a link leads out of the
                directory and may not be followed, or an entry is not a regular file.
            SourceError: the system denies access.
        """
        if self._files is None:
            with _os_errors(self.root):
                self._files = dict(sorted(self._walk(self.root, "", (self.root,))))
        return self._files

    def _walk(
        self, folder: Path, prefix: str, above: tuple[Path, ...]
    ) -> Iterator[tuple[str, FileInfo]]:
        """The files of a folder; `above` has the resolved path of the folder and its parents."""
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name in IGNORED_FOLDERS and not prefix:
                continue
            planned = (
                self.gguf_set.name_in_plan(entry.name) if self.gguf_set else prefix + entry.name
            )
            if planned is None:
                continue
            name = check_name(planned, str(self.root))
            real = above[-1] / entry.name
            if entry.is_symlink():
                target = _link_target(Path(entry.path))
                if target is None or target in above:
                    self._skip_broken_link(name, target)
                    continue
                self._check_link(name, target)
                real = target
            self._check_readable(entry, name)
            if entry.is_dir() and self.gguf_set is None:
                yield from self._walk(Path(entry.path), name + "/", (*above, real))
                continue
            info = entry.stat()
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{self.root}: {name!r} is not a regular file")
            self._states[name] = [info.st_size, info.st_mtime_ns]
            self._entry_times[name] = info.st_ctime_ns
            yield name, FileInfo(name, info.st_size)

    def _check_readable(self, entry: os.DirEntry[str], name: str) -> None:
        """Refuse an unreadable file now, rather than after the first hundred gigabytes."""
        mode = os.R_OK | os.X_OK if entry.is_dir() else os.R_OK
        if not os.access(entry.path, mode):
            hint = "Change its permissions."
            raise SourceError(f"{self.root}: {name!r} cannot be read", hint=hint)

    def _skip_broken_link(self, name: str, target: Path | None) -> None:
        """Leave out a link that leads nowhere or in a circle, unless a loader may read it."""
        where = "nowhere" if target is None else "in a circle"
        if self.gguf_set or _LOADABLE.search(name.rpartition("/")[2]):
            raise CheckpointError(
                f"{self.root}: {name!r} is a link that leads {where}",
                hint="Put the file there, or remove the link if the model does not need it.",
            )
        self.remarks.append(f"{name}: left out, since it is a link that leads {where}")

    def _check_link(self, name: str, target: Path) -> None:
        """Note the target of a link out of the directory; refuse it if it may not be followed."""
        blobs = (self.root.parent.parent / "blobs").resolve()
        in_cache = self.root.parent.name == "snapshots" and target.is_relative_to(blobs)
        if in_cache or target.is_relative_to(self.root):
            return
        self.links[name] = target
        if self._follow_links:
            return
        if self._follow_shard_links and (
            self.gguf_set or (name.endswith(SUFFIX) and _is_safetensors(target))
        ):
            return
        if not self._follow_shard_links:
            raise CheckpointError(f"{self.root}: {name!r} is a link out of the directory", hint="")
        raise CheckpointError(
            f"{self.root}: {name!r} is a link out of the directory, and its target would be"
            " published",
            hint="Put the file itself there, or give --follow-links.",
        )

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Part of a file, by default all of it; the whole of a large file is refused."""
        if size is None:
            size = self.files()[name].size - start
            if size > SMALL_FILE_BYTES:
                raise CheckpointError(f"{name}: {size} bytes are too many for this kind of file")
        try:
            with open(self.path_of(name), "rb") as file:
                self._check_unchanged(file.fileno(), name)
                file.seek(start)
                data = file.read(size)
                self._check_unchanged(file.fileno(), name)
                return data
        except OSError as error:
            raise SourceError(f"{self.root}: {name}: {error.strerror}") from None

    @contextmanager
    def open(self, name: str) -> Iterator[FileReader]:
        """Open a file, and check at the end that it has not changed since planning."""
        fd = os.open(self.path_of(name), os.O_RDONLY | BINARY)
        try:
            self._check_unchanged(fd, name)
            yield FileReader(fd, name)
            self._check_unchanged(fd, name)
        finally:
            os.close(fd)

    def path_of(self, name: str) -> Path:
        """The path of a file."""
        return self.root / (self.gguf_set.name_in_folder(name) if self.gguf_set else name)

    def local_folder(self, names: Sequence[str]) -> Path:
        """The directory itself."""
        return self.root

    def last_changed(self) -> int:
        """When the newest file was last changed, in nanoseconds."""
        self.files()
        return max(mtime for _, mtime in self._states.values())

    def _check_unchanged(self, fd: int, name: str) -> None:
        info = os.fstat(fd)
        self.files()
        if [info.st_size, info.st_mtime_ns] != self._states[name]:
            raise RewriteError(
                f"{name}: the source file changed while it was being read",
                hint="Wait until nothing writes to the source, then run the command again, with"
                " --overwrite if it has already written files.",
            )

    def fingerprint(self, name: str) -> list[int]:
        """Size in bytes, and when content and entry were last changed, in nanoseconds.

        The last one reveals a file that was replaced between two runs with its old time restored.
        """
        self.files()
        return [*self._states[name], self._entry_times[name]]

    def subset(self, names: Iterable[str]) -> LocalSource:
        """The same directory limited to these files, with their current state."""
        part = copy(self)
        part._files = {name: self.files()[name] for name in names}
        part._states = {name: self._states[name] for name in part._files}
        part._entry_times = {name: self._entry_times[name] for name in part._files}
        return part

    def check_reachable(self) -> None:
        """Check that every file exists and has not changed.

        Raises:
            SourceError: a file is missing, or is a different one.
        """
        for name in self.files():
            path = self.path_of(name)
            try:
                info = path.stat()
            except OSError as error:
                raise SourceError(
                    f"{path}: cannot be reached: {error.strerror}", hint=SHARE_HINT
                ) from None
            if [info.st_size, info.st_mtime_ns] != self._states[name]:
                raise SourceError(f"{path}: is a different file here", hint=SHARE_HINT)


_LOADABLE = re.compile(
    r"^(?!\.).*\.(?:safetensors|json|model|py|jinja|tiktoken|bin|pt|pth)$|^(?:vocab|merges)\b"
)
"""File names that a loader may read."""


def _link_target(link: Path) -> Path | None:
    """The final target of a link; None if there is none."""
    try:
        return link.resolve(strict=True)
    except PermissionError:
        raise
    except (OSError, RuntimeError):  # the target is missing, or the link itself
        return None


def _is_safetensors(shard: Path) -> bool:
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
def _os_errors(root: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that names the path."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{error.filename or root}: cannot be read: {error.strerror}") from None


def _hub_cache_snapshot(root: Path) -> tuple[str | None, str | None]:
    """Repo and commit of a ``models--org--name/snapshots/<commit>`` folder of the Hub cache."""
    repo = root.parent.parent
    if root.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return None, None
    return repo.name.removeprefix("models--").replace("--", "/"), root.name
