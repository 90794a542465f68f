"""A small git-like store behind the loopback Hub: repos, refs, commits and contents on disk."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

PIECE = 1 << 20
MAIN = "refs/heads/main"
SHA = re.compile(r"[0-9a-f]{40}")
LFS_NAMES = re.compile(
    r"\.(safetensors|bin|gguf|h5|onnx|pt|pth|ckpt|msgpack|model|npz|npy|zip|gz|tar)$", re.IGNORECASE
)
LFS_SIZE = 10 << 20
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
MISSING_OBJECT = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
    "Offending file: - "
)


class HubError(Exception):
    """An answer other than success, with the Hub's error code and message."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that starts with `head`; its stated SHA-256 is made up.

    For repos that are too large to hash. Zeros follow the head, and take no space on disk.
    """

    head: bytes
    size: int

    @property
    def sha256(self) -> str:
        """The made-up digest, the same for equal head and size."""
        return hashlib.sha256(b"sparse %d " % self.size + self.head).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One version of a file: digest, size, and how the Hub keeps it."""

    sha256: str
    size: int
    lfs: bool
    oid: str
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        """The ETag of the Hub: the SHA-256 of LFS files, otherwise the git oid."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with its whole tree."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    tree: Mapping[str, Blob]


@dataclass
class Pull:
    """A pull request or a discussion."""

    num: int
    title: str
    author: str
    base: str
    base_commit: str
    is_pull: bool = True
    status: str = "open"
    merge_commit: str | None = None


@dataclass
class Repo:
    """A repo with its refs, commits and the LFS objects that it may refer to."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Blob] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    def ref(self, revision: str) -> str | None:
        """Find the full name of a branch, tag or pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        """Find the commit of a branch, tag, pull request or full SHA."""
        name = self.ref(revision)
        if name is None:
            return self.commits.get(revision) if SHA.fullmatch(revision) else None
        return self.commits[self.refs[name]]

    def resolve(self, revision: str) -> Commit:
        """Find the commit of a revision, or answer as the Hub does if there is none."""
        if (commit := self.find(revision)) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, revision: str) -> list[Commit]:
        """List the commits of a revision, newest first."""
        commit: Commit | None = self.resolve(revision)
        found = []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found

    def add_commit(
        self,
        ref: str,
        tree: Mapping[str, Blob],
        title: str,
        message: str = "",
        author: str = "system",
        parent: str | None = None,
    ) -> Commit:
        """Add a commit on top of `parent` and move the ref to it."""
        number = len(self.commits)
        seed = repr((self.id, number, parent, title, sorted((p, b.oid) for p, b in tree.items())))
        date = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
        name = hashlib.sha1(seed.encode()).hexdigest()
        commit = Commit(name, parent, title, message, author, date, dict(sorted(tree.items())))
        self.commits[name] = commit
        self.refs[ref] = name
        return commit


def stamp(date: datetime) -> str:
    """Write a date as the Hub's JSON does."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes to LFS, as the Hub's preupload decides."""
    return size > 0 and (size > LFS_SIZE or bool(LFS_NAMES.search(path)))


def pointer(sha256: str, size: int) -> bytes:
    """Write the text of a git LFS pointer file."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
        sha256.encode(),
        size,
    )


def git_oid(size: int, pieces: Iterable[bytes]) -> str:
    """Compute a git blob id."""
    digest = hashlib.sha1(b"blob %d\0" % size)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def pieces_of(path: Path) -> Iterable[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file without holding it in memory."""
    digest = hashlib.sha256()
    for piece in pieces_of(path):
        digest.update(piece)
    return digest.hexdigest()


class Store:
    """All repos of a Hub and the contents of their files, in one folder."""

    def __init__(self, root: Path, restore: Callable[[str, Path], bool] | None = None) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self._contents: dict[str, Path] = {}
        self._restore = restore
        self._names = 0
        root.mkdir(parents=True, exist_ok=True)

    def repo(self, kind: str, name: str) -> Repo:
        """Find a repo."""
        return self.repos[kind, name]

    def new_file(self) -> Path:
        """A path for a new file whose content is not known yet."""
        with self.lock:
            self._names += 1
            return self.root / f"incoming-{self._names}"

    def keep(self, path: Path, sha256: str) -> None:
        """Move a finished file of the store under its digest."""
        target = self.root / sha256
        path.replace(target)
        self._contents[sha256] = target

    def put(self, content: bytes | Path | Sparse) -> tuple[str, int]:
        """Store a content; a path is kept by reference, not copied."""
        if isinstance(content, bytes):
            path = self.new_file()
            path.write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            self.keep(path, sha256)
            return sha256, len(content)
        if isinstance(content, Sparse):
            path = self.new_file()
            path.write_bytes(content.head)
            os.truncate(path, content.size)
            self.keep(path, content.sha256)
            return content.sha256, content.size
        sha256 = sha256_of(content)
        self._contents[sha256] = content
        return sha256, content.stat().st_size

    def blob(self, path: str, content: bytes | Path | Sparse, lfs: bool | None = None) -> Blob:
        """Store a file and describe it."""
        sha256, size = self.put(content)
        if is_lfs(path, size) if lfs is None else lfs:
            return lfs_blob(sha256, size)
        return Blob(sha256, size, False, git_oid(size, pieces_of(self.path(sha256))))

    def path(self, sha256: str) -> Path:
        """Find the plain file of a content; restore it if it is only in xet storage."""
        with self.lock:
            if sha256 not in self._contents:
                path = self.new_file()
                if self._restore is None or not self._restore(sha256, path):
                    raise KeyError(sha256)
                if (found := sha256_of(path)) != sha256:
                    raise AssertionError(f"xet storage holds {found} under the name {sha256}")
                self.keep(path, sha256)
            return self._contents[sha256]

    def create(self, kind: str, name: str, private: bool, author: str) -> Repo:
        """Create a repo with the Hub's first commit, which has only `.gitattributes`."""
        repo = Repo(kind, name, private)
        tree = {".gitattributes": self.blob(".gitattributes", GITATTRIBUTES)}
        repo.add_commit(MAIN, tree, "initial commit", author=author)
        self.repos[kind, name] = repo
        return repo

    def target(self, repo: Repo, revision: str) -> str:
        """Find the ref that a commit to this revision moves."""
        name = repo.ref(revision)
        if name is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if name.startswith("refs/tags/"):
            raise HubError(400, "Cannot commit to a tag")
        return name

    def known(self, repo: Repo, sha256: str, size: int | None) -> Blob | None:
        """Find an LFS object that this repo may refer to."""
        blob = repo.objects.get(sha256)
        return blob if blob is None or size in (None, blob.size) else None

    def edited(
        self, repo: Repo, tree: Mapping[str, Blob], lines: list[dict[str, Any]]
    ) -> dict[str, Blob]:
        """Apply the lines of a commit to a tree: deletions first, as the Hub does."""
        new = dict(tree)
        for line in lines:
            path = checked_path(line["value"]["path"])
            if line["key"] == "deletedFile":
                if path not in new:
                    raise HubError(
                        404, f"A file with this name doesn't exist: {path}", "EntryNotFound"
                    )
                del new[path]
            elif line["key"] == "deletedFolder":
                inside = [name for name in new if name.startswith(path.rstrip("/") + "/")]
                if not inside:
                    raise HubError(
                        404, f"A folder with this name doesn't exist: {path}", "EntryNotFound"
                    )
                for name in inside:
                    del new[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[checked_path(value["path"])] = self.blob(value["path"], value["bytes"], False)
            elif line["key"] == "lfsFile":
                blob = self.known(repo, value["oid"], value.get("size"))
                if blob is None:
                    raise HubError(400, MISSING_OBJECT + value["path"])
                new[checked_path(value["path"])] = blob
            elif line["key"] not in ("deletedFile", "deletedFolder"):
                raise HubError(400, f"Unknown operation {line['key']!r}")
        return new


def lfs_blob(sha256: str, size: int, xet_hash: str | None = None) -> Blob:
    """Describe an LFS file; if it was not uploaded by xet, its xet hash is made up."""
    xet = xet_hash or hashlib.sha256(b"xet " + sha256.encode()).hexdigest()
    text = pointer(sha256, size)
    return Blob(sha256, size, True, git_oid(len(text), [text]), xet)


def checked_path(path: str) -> str:
    """Refuse a path that leaves the repo, as the Hub does."""
    parts = path.rstrip("/").split("/")
    if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(400, f"Invalid path: {path}")
    return path
