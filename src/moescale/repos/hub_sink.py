"""A repo on the Hub as a sink: the destination branch changes once, at the end, to the whole model.

While a run lasts, finished shards are committed to a working branch of the destination, together
with the journal that lists them, so that the same command resumes on any machine. The last commit
brings everything to the destination branch, by the digests of what is already there; then the
working branch is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moescale.checkpoint.rewrite import Reader, pieces
from moescale.errors import DestinationError, RewriteError, TemporaryError
from moescale.repos import hub
from moescale.repos.base import FileInfo, SourceId, Written
from moescale.repos.hub import ATTEMPTS, HubPlace
from moescale.repos.hub_upload import StreamUpload, can_stream, uploaded

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

JOURNAL = "moescale-journal.json"
SMALL_BYTES = 8 << 20
"""Files up to this size that are no weights go into the last commit from memory."""

_T = TypeVar("_T")

ATTRIBUTES = ".gitattributes"
"""The file that every repo on the Hub is born with."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How the destination repo is made and what its commit says."""

    private: bool | None = None
    create_pr: bool = False
    message: str | None = None


class HubSink:
    """A branch of a model repo."""

    def __init__(self, place: HubPlace, options: HubOptions | None = None) -> None:
        """Nothing is created before `begin`."""
        self.place = place
        self.branch = place.revision or "main"
        self.identity = str(place)
        self.remarks: list[str] = []
        self.url: str | None = None
        self.published: str | None = None  # the revision that has the finished output
        self._options = options or HubOptions()
        self._working = f"moescale-unfinished-{self.branch.replace('/', '-')}"
        self._job: Any = None
        self._head: str | None = None  # of the destination branch when the run began
        self._working_head: str | None = None
        self._done: dict[str, Written] = {}
        self._small: dict[str, bytes] = {}
        self._commits = threading.Lock()  # one commit at a time on the working branch
        self._one_on_disk = threading.Lock()
        self._streams = False
        self._uploads: set[StreamUpload] = set()
        self._sent = self._deduplicated = 0

    # What is there ---------------------------------------------------------------------------

    def is_at(self, source: SourceId) -> bool:
        """Whether the source is the head of this branch."""
        return (
            source.kind == "hub"
            and source.id == self.place.repo
            and source.revision == self._head_of(self.branch)
        )

    def existing(self) -> dict[str, int]:
        """Name and size of what the branch has; a repo that is not there is empty."""
        tree = self._tree(self.branch)
        return {} if set(tree) <= {ATTRIBUTES} else {name: f.size for name, f in tree.items()}

    def _tree(self, branch: str) -> dict[str, RepoFile]:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def fetch() -> dict[str, RepoFile]:
            try:
                entries = hub.api().list_repo_tree(self.place.repo, recursive=True, revision=branch)
                return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            except RevisionNotFoundError:
                return {}
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401 and _has_token():
                    raise
                return {}

        return self._ask(fetch)

    def _head_of(self, branch: str) -> str | None:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def fetch() -> str | None:
            try:
                return hub.api().model_info(self.place.repo, revision=branch, timeout=30.0).sha
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return self._ask(fetch)

    def read(self, name: str) -> bytes:
        """A small file of the branch."""
        return self._read(name, self.branch)

    def _read(self, name: str, branch: str) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils._http import hf_raise_for_status

        url = hf_hub_url(self.place.repo, name, revision=branch, endpoint=hub.api().endpoint)

        def fetch() -> bytes:
            response = get_session().get(url, headers=hub.headers(), timeout=30.0)
            hf_raise_for_status(response)
            return bytes(response.content)

        return self._ask(fetch)

    def changed_at(self, name: str) -> int:
        """When the branch was last changed, in nanoseconds."""
        info = self._ask(
            lambda: hub.api().model_info(self.place.repo, revision=self.branch, timeout=30.0)
        )
        return int(info.last_modified.timestamp() * 1e9) if info.last_modified else 0

    def unfinished(self) -> Any:
        """The job of the working branch; None if there is no such branch."""
        journal = self._journal()
        return None if journal is None else journal.get("job", "not a journal of moescale")

    def _journal(self) -> dict[str, Any] | None:
        if JOURNAL not in self._tree(self._working):
            return None
        try:
            content = json.loads(self._read(JOURNAL, self._working))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def check_replaceable(self) -> None:
        """A branch keeps its history; it can always be replaced."""

    def check_card(self, card: bytes) -> None:
        """Ask the Hub whether it will take the card.

        Raises:
            DestinationError: its metadata is refused.
        """
        from huggingface_hub import ModelCard

        try:
            hub.retried(
                lambda: ModelCard(card.decode(), ignore_metadata_errors=True).validate(),
                f"{self.identity}: README.md",
                DestinationError,
            )
        except ValueError as error:
            raise DestinationError(f"{self.identity}: the Hub refuses the card: {error}") from None

    # The run -----------------------------------------------------------------------------------

    def begin(self, job: Any, replace: bool) -> None:
        """Create the repo and the working branch, or go on with the one that is there.

        Raises:
            DestinationError: no right to write, or the branch changed since the run began.
        """
        self._create_repo()
        self._head = self._head_of(self.branch)
        journal = self._journal()
        if journal is None or replace or journal.get("job") != job:
            self._delete_working_branch()
            journal = None
        self._job = job
        self._streams = can_stream(self.place.repo, self._working_base())
        if journal is None:
            self._start_working_branch()
        else:
            self._resume(journal)

    def _create_repo(self) -> None:
        private = self._options.private
        before = self._head_of("main")
        self._ask(lambda: hub.api().create_repo(self.place.repo, private=private, exist_ok=True))
        if before is None:
            kind = {True: "private", False: "public", None: "the Hub's default visibility"}
            self.remarks.append(f"repo {self.place.repo} created ({kind[private]})")

    def _working_base(self) -> str:
        return self.branch if self._head is not None else "main"

    def _start_working_branch(self) -> None:
        base = self._working_base()
        self._ask(
            lambda: hub.api().create_branch(
                self.place.repo, branch=self._working, revision=base, exist_ok=True
            )
        )
        self._working_head = self._head_of(self._working)
        self._commit(self._working, [self._journal_operation()], "Start")

    def _resume(self, journal: Mapping[str, Any]) -> None:
        if journal.get("head") != self._head:
            raise DestinationError(
                f"{self.identity}: changed since the unfinished run began",
                hint="--overwrite starts again and replaces what is there now.",
            )
        tree = self._tree(self._working)
        self._working_head = self._head_of(self._working)
        for name, entry in journal.get("files", {}).items():
            written = Written(entry["size"], entry["sha256"])
            there = tree.get(name)
            if there is not None and _is_listed(there, written):
                self._done[name] = written

    def finished(self) -> dict[str, Written]:
        """What the journal lists and the working branch has with the same digest."""
        return dict(self._done)

    def copy(self, files: Iterable[FileInfo], source: SourceId) -> dict[str, Written]:
        """Copy large files of another repo inside the Hub; returns what could be copied so."""
        from huggingface_hub import CommitOperationCopy

        large = {f.name: Written(f.size, f.sha256) for f in files if f.sha256 is not None}
        large = {name: written for name, written in large.items() if name not in self._done}
        if not large:
            return {}
        operations = [
            CommitOperationCopy(
                name,
                name,
                src_revision=source.revision,
                src_repo_id=source.id,
                src_repo_type="model",
            )
            for name in large
        ]
        self._done |= large
        try:
            self._commit(
                self._working, [*operations, self._journal_operation()], "Copy unchanged files"
            )
        except (DestinationError, TemporaryError):
            for name in large:
                del self._done[name]
            return {}
        return large

    def shard(self, name: str, size: int, digest: bool = True) -> AbstractContextManager[HubWriter]:
        """A writer for a file of `size` bytes; leaving without `finish` discards it."""
        if size <= SMALL_BYTES and not name.endswith(".safetensors"):
            return self._in_memory(name)
        return self._streamed(name) if self._streams else self._on_disk(name, size)

    @contextmanager
    def _in_memory(self, name: str) -> Iterator[HubWriter]:
        data = io.BytesIO()

        def finish() -> Written:
            return self.put(name, data.getvalue())

        yield HubWriter(data.write, finish)

    @contextmanager
    def _streamed(self, name: str) -> Iterator[HubWriter]:
        with hub.in_our_words(f"{self.identity}: {name}", DestinationError):
            upload = StreamUpload(self.place.repo, self._working)

        def write(data: memoryview) -> None:
            with hub.in_our_words(f"{self.identity}: {name}", DestinationError):
                upload.write(bytes(data))

        def finish() -> Written:
            with hub.in_our_words(f"{self.identity}: {name}", DestinationError):
                size, sha256, new = upload.finish()
            with self._commits:
                self._sent += new
                self._deduplicated += size - new
            return self._shard_done(name, Written(size, sha256), uploaded(name, size, sha256))

        self._uploads.add(upload)
        try:
            yield HubWriter(write, finish)
        finally:
            self._uploads.discard(upload)
            upload.abort()

    @contextmanager
    def _on_disk(self, name: str, size: int) -> Iterator[HubWriter]:
        """Without xet: one shard at a time through a temporary file."""
        from huggingface_hub import CommitOperationAdd

        with self._one_on_disk:
            folder = tempfile.gettempdir()
            if shutil.disk_usage(folder).free < size:
                raise RewriteError(
                    f"{name}: {folder} has no room for {size} bytes",
                    hint="Free some space, or set TMPDIR; the same command resumes.",
                )
            with tempfile.NamedTemporaryFile(prefix="moescale-") as file:
                digest = hashlib.sha256()

                def write(data: memoryview) -> None:
                    file.write(data)
                    digest.update(data)

                def finish() -> Written:
                    file.flush()
                    operation = CommitOperationAdd(name, file.name)
                    written = Written(size, digest.hexdigest())
                    self._sent += size
                    return self._shard_done(name, written, operation)

                yield HubWriter(write, finish)

    def _shard_done(self, name: str, written: Written, operation: Any) -> Written:
        """Commit a finished shard to the working branch, with the journal that says so."""
        with self._commits:
            self._done[name] = written
            try:
                self._commit(self._working, [operation, self._journal_operation()], name)
            except BaseException:
                del self._done[name]
                raise
        return written

    def put(self, name: str, data: bytes) -> Written:
        """Keep a small file for the last commit."""
        self._small[name] = data
        return Written(len(data), hashlib.sha256(data).hexdigest())

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Bring everything to the destination branch in one commit, and clean up.

        Raises:
            DestinationError: the branch changed meanwhile.
            RewriteError: the Hub lists something else than was sent.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self._small |= last
        large = {name: written for name, written in self._done.items() if name in keep}
        operations: list[Any] = [
            uploaded(name, w.size, w.sha256 or "") for name, w in sorted(large.items())
        ]
        operations += [CommitOperationAdd(name, data) for name, data in sorted(self._small.items())]
        message = self._options.message or "Rescale the experts for another number of them"
        target = self.branch if self._head is not None else self._working
        operations += [
            CommitOperationDelete(name)
            for name in self._tree(target)
            if name not in keep and name != ATTRIBUTES
        ]
        if self._head is None:
            self._commit(self._working, operations, message)
            self._check_listed(self._working, large)
            self._ask(
                lambda: hub.api().create_branch(
                    self.place.repo, branch=self.branch, revision=self._working, exist_ok=True
                )
            )
            self.url = f"{hub.api().endpoint}/{self.place.repo}/tree/{self.branch}"
            self.published = self._working_head
        else:
            self.url = self._commit(self.branch, operations, message, final=True)
            if not self._options.create_pr:
                self._check_listed(self.branch, large)
        self._delete_working_branch()
        self.remarks.append(
            f"{self._sent:,} bytes of shards sent, {self._deduplicated:,} already on the Hub"
        )

    def amend(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output."""
        from huggingface_hub import CommitOperationAdd

        self._head = self._head_of(self.branch)
        self._commit(self.branch, [CommitOperationAdd(name, data)], f"Update {name}", final=True)

    def cancel(self) -> None:
        """End the uploads that threads may be waiting in."""
        for upload in list(self._uploads):
            upload.abort()

    def close(self) -> None:
        """Nothing is held."""

    # Commits -------------------------------------------------------------------------------

    def _journal_operation(self) -> Any:
        from huggingface_hub import CommitOperationAdd

        content = {
            "job": self._job,
            "head": self._head,
            "files": {
                name: {"size": w.size, "sha256": w.sha256} for name, w in sorted(self._done.items())
            },
        }
        return CommitOperationAdd(JOURNAL, json.dumps(content, indent=1).encode())

    def _commit(
        self, branch: str, operations: list[Any], message: str, *, final: bool = False
    ) -> str:
        """Commit, and look whether a commit whose answer was lost has arrived.

        Returns:
            The address of the commit or of the pull request.
        """
        parent = self._head if final else self._working_head
        for attempt in range(ATTEMPTS):
            try:
                with hub.in_our_words(f"{self.identity}: commit", DestinationError):
                    info = hub.api().create_commit(
                        self.place.repo,
                        [_fresh(operation) for operation in operations],
                        commit_message=message,
                        revision=branch,
                        parent_commit=parent,
                        create_pr=final and self._options.create_pr,
                    )
                break
            except (TemporaryError, DestinationError) as error:
                arrived = self._arrived(branch, parent, operations)
                if arrived is not None:
                    self._remember(arrived, final)
                    return f"{hub.api().endpoint}/{self.place.repo}/commit/{arrived}"
                if isinstance(error, DestinationError) or attempt == ATTEMPTS - 1:
                    raise
                hub.sleep(hub.wait_seconds(attempt))
        self._remember(info.pr_revision or info.oid, final)
        return info.pr_url or info.commit_url

    def _remember(self, commit: str, final: bool) -> None:
        if final:
            self._head = self.published = commit
        else:
            self._working_head = commit

    def _arrived(self, branch: str, parent: str | None, operations: list[Any]) -> str | None:
        """The head of the branch, if it has moved and has all that the operations bring."""
        from huggingface_hub import CommitOperationDelete

        head = self._head_of(branch)
        if head is None or head == parent:
            return None
        tree = self._tree(branch)
        for operation in operations:
            there = tree.get(operation.path_in_repo)
            if isinstance(operation, CommitOperationDelete):
                if there is not None:
                    return None
            elif there is None or not _same(there, operation):
                return None
        return head

    def _check_listed(self, branch: str, large: Mapping[str, Written]) -> None:
        tree = self._tree(branch)
        for name, written in large.items():
            there = tree.get(name)
            if there is None or not _is_listed(there, written):
                raise RewriteError(
                    f"{self.identity}: {name}: the Hub does not list what was sent",
                    hint="Run the same command with --overwrite.",
                )

    def _delete_working_branch(self) -> None:
        if self._head_of(self._working) is not None:
            self._ask(lambda: hub.api().delete_branch(self.place.repo, branch=self._working))

    def _ask(self, call: Callable[[], _T]) -> _T:
        return hub.retried(call, self.identity, DestinationError)


class HubWriter:
    """A file on its way to the Hub."""

    def __init__(
        self, write: Callable[[memoryview], object], finish: Callable[[], Written]
    ) -> None:
        self._write = write
        self._finish = finish

    def write(self, data: memoryview) -> None:
        """Append the bytes."""
        self._write(data)

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append a stretch of another file, through memory."""
        for piece in pieces(reader, start, stop):
            self._write(piece)
            yield len(piece)

    def finish(self) -> Written:
        """Make the file complete where a rerun finds it."""
        return self._finish()


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _fresh(operation: Any) -> Any:
    """An operation for one attempt; the client does not take one twice."""
    from copy import copy

    return copy(operation)


def _is_listed(there: RepoFile, written: Written) -> bool:
    """Whether a listed file is a large one with this size and digest."""
    return there.lfs is not None and (there.size, there.lfs.sha256) == (
        written.size,
        written.sha256,
    )


def _same(there: RepoFile, operation: Any) -> bool:
    """Whether a listed file is what an operation would have put there."""
    from huggingface_hub.utils.sha import git_hash

    info = getattr(operation, "upload_info", None)
    if info is None:  # a copy of a large file: the journal beside it has its digest
        return there.lfs is not None
    if there.lfs is not None:
        return bool(there.lfs.sha256 == info.sha256.hex())
    with operation.as_file() as file:
        return bool(there.blob_id == git_hash(file.read()))
