"""A repo on the Hub as a destination: its branch changes once, at the end, to the whole model.

During a run, finished shards are committed to a working branch, together with the journal that
lists them, so that the same command resumes on any machine. The last commit adds all files to the
destination branch, by the digests of the uploaded content; then the working branch is removed. A
new destination branch is created from another branch that already has the last commit, so it
appears whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moescale.checkpoint.stored_provenance import stored_provenance
from moescale.errors import (
    DestinationError,
    MoescaleError,
    RewriteError,
    TemporaryError,
    bytes_text,
)
from moescale.storage.base import FileInfo, FileRecord, PendingFile, SourceId
from moescale.storage.hub import client
from moescale.storage.hub.repo import CopyOperation, HubRepo, is_listed, unapplied
from moescale.storage.hub.source import HubSource
from moescale.storage.hub.upload import (
    UploadedFile,
    add_uploaded,
    can_commit_by_digest,
    can_stream,
    missing_client_name,
)
from moescale.storage.hub.writer import WEIGHTS, HubWriters
from moescale.storage.journal_entry import NOT_A_JOURNAL, PARSE_ERRORS, parse_entry
from moescale.storage.location import HubRef

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

JOURNAL = "moescale-journal.json"

COMMITS_AT_ONCE, SECONDS_PER_COMMIT = 40, 60.0
"""The Hub allows about 128 commits an hour; beyond these, finished shards share a commit."""

GITATTRIBUTES = ".gitattributes"
"""The file that the Hub creates in every new repo."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How the destination repo is created and its content replaced.

    Attributes:
        private: visibility of a new repo; None leaves it to the Hub.
        create_pr: whether to open a pull request instead of a commit.
        message: of the last commit; None for the default.
        overwrite: whether to replace changes made to the branch since the run began.
    """

    private: bool | None = None
    create_pr: bool = False
    message: str | None = None
    overwrite: bool = False


class HubDestination:
    """A branch of a model repo.

    Attributes:
        ref: the repo and the branch.
        branch: the name of the branch; ``main`` if the user gave none.
    """

    keeps_files = False
    remote = True
    default_jobs = 2  # for the memory

    def __init__(self, ref: HubRef, options: HubOptions | None = None) -> None:
        """Create nothing before `begin`."""
        self.ref = ref
        self.branch = ref.revision or "main"
        self.identity = str(ref)
        self.remarks: list[str] = []
        self.url: str | None = None
        self._published: str | None = None  # the revision that has the finished output
        self._options = options or HubOptions()
        self._repo = HubRepo(ref.repo, self.identity)
        name = self.branch.replace("/", "-")
        self._work_branch, self._finished_branch = (
            f"moescale-unfinished-{name}",
            f"moescale-finished-{name}",
        )
        self._job: Any = None
        self._head: str | None = None  # of the destination branch when the run began
        self._branch_changed = False  # since the first run of this job began
        self._working_head: str | None = None
        self._finished: dict[str, FileRecord] = {}
        self._small: dict[str, bytes] = {}
        self._commits = threading.Lock()  # the working branch takes one commit at a time
        self._waiting: tuple[list[Any], dict[str, FileRecord]] = [], {}  # for the next commit
        self._allowance, self._counted = float(COMMITS_AT_ONCE), time.monotonic()
        self._streams = False
        self.writers = HubWriters(ref, self._work_branch, False)
        self._sent = self._deduplicated = self._copied = 0

    # Existing content ------------------------------------------------------------------------

    def is_same_as(self, source: SourceId) -> bool:
        """Whether the source is the head of this branch."""
        return (
            source.path is None
            and (source.repo or "").lower() == self.ref.repo.lower()
            and source.revision == self._repo.head(self.branch)
        )

    def holds(self, file: Path) -> bool:
        """False: the output is not on this machine."""
        return False

    def available_bytes(self) -> None:
        """None: the Hub does not tell."""

    def may_share_blocks(self, source: SourceId) -> bool:
        """False: the output is not on this machine."""
        return False

    def check_writable(self) -> None:
        """Do nothing: only the first commit shows whether the token allows it."""

    def existing(self) -> dict[str, int]:
        """Names and sizes of the files of the branch; empty if the repo does not exist."""
        tree = self._repo.tree(self.branch)
        return {} if set(tree) <= {GITATTRIBUTES} else {name: f.size for name, f in tree.items()}

    def read_existing(self, name: str) -> bytes:
        """The content of a small file of the branch."""
        return self._repo.read(name, self.branch)

    def read_provenance(self) -> bytes | None:
        """The provenance of the existing output."""
        return stored_provenance(
            self.existing(), lambda name, *part: self._repo.read(name, self.branch, *part)
        )

    def changed_at(self, name: str) -> int:
        """When the branch was last changed, in nanoseconds."""
        info = self._repo.info(self.branch)
        return int(info.last_modified.timestamp() * 1e9) if info and info.last_modified else 0

    def unfinished_job(self) -> Any:
        """The job of the working branch; None if it does not exist."""
        journal = self._journal()
        return None if journal is None else journal.get("job", NOT_A_JOURNAL)

    def _journal(self) -> dict[str, Any] | None:
        if JOURNAL not in self._repo.tree(self._work_branch):
            return None
        try:
            content = json.loads(self._repo.read(JOURNAL, self._work_branch))
        except PARSE_ERRORS:
            return {}
        return content if isinstance(content, dict) else {}

    def check_replaceable(self) -> None:
        """Do nothing: a branch keeps its history, so it can always be replaced."""

    def check_card(self, card: bytes) -> None:
        """Ask the Hub to validate the card.

        Raises:
            DestinationError: the Hub rejects its metadata.
        """
        self.remarks += [f"the Hub warns about README.md: {m}" for m in self._repo.check_card(card)]

    # The start of a run ----------------------------------------------------------------------

    def prepare_for_workers(self) -> None:
        """Do nothing: each machine connects to the Hub itself."""

    def begin(
        self, job: Any, replace: bool, keep: Mapping[str, FileRecord] = MappingProxyType({})
    ) -> None:
        """Create the repo and the working branch, or continue with the existing one.

        `keep` is ignored: content that the Hub already has is not sent again.

        Raises:
            DestinationError: the token does not allow writing, or the branch has changed since the
                run began.
        """
        self._create_repo()
        self._job = job
        self._head = self._repo.head(self.branch)
        self._check_branch()
        base = self.branch if self._head is not None else "main"
        self._streams = can_stream(self.ref.repo, base, self.identity)
        if self._streams and (name := missing_client_name()):
            self._streams = False
            self.remarks.append(
                f"the installed client has no {name}; each shard went through a temporary file"
            )
        self.writers = HubWriters(self.ref, self._work_branch, self._streams)
        journal = self._journal()
        if journal is None or replace:
            self._start()
        elif journal.get("job") != job:
            raise DestinationError(f"{self.identity}: another run has just started here")
        else:
            self._resume(journal)

    def _create_repo(self) -> None:
        info, private = self._repo.info(), self._options.private
        if info is None:
            self._repo.create(private)
            kind = {True: "private", False: "public", None: "the Hub's default visibility"}
            self.remarks.append(f"repo {self.ref.repo} created ({kind[private]})")
        elif private is not None and info.private is not private:
            raise DestinationError(
                f"{self.identity}: exists and is {'private' if info.private else 'public'}",
                hint="--private and --public only apply to a new repo.",
            )

    def _check_branch(self) -> None:
        """Refuse early what the Hub would refuse at the end."""
        if self._head is None and self._options.create_pr:
            raise DestinationError(
                f"{self.identity}: the branch does not exist, so no pull request can be opened"
            )
        if self.branch.startswith("refs/") or (
            self._head is not None and not self._repo.is_branch(self.branch)
        ):
            raise DestinationError(
                f"{self.identity}: {self.branch} is not a branch",
                hint="Give a branch, new or existing; --create-pr opens a pull request.",
            )

    def _start(self) -> None:
        """Create the working branch; its first commit shows that the token may write."""
        self._clean_up()
        base = self._head or self._repo.head("main")
        if base is None:
            raise TemporaryError(f"{self.identity}: the Hub does not show the new repo yet")
        self._repo.create_branch(self._work_branch, base)
        self._working_head = base
        self._commit_to_work_branch([], "Start")

    def _resume(self, journal: Mapping[str, Any]) -> None:
        tree = self._repo.tree(self._work_branch)
        self._working_head = self._repo.head(self._work_branch)
        files = journal.get("files")
        for name, entry in files.items() if isinstance(files, dict) else ():
            with suppress(*PARSE_ERRORS):
                if is_listed(tree.get(name), record := parse_entry(name, entry)):
                    self._finished[name] = record
        if journal.get("head") == self._head or self._options.overwrite:
            return
        self._branch_changed = True
        weights = _weights(self._repo.tree(self.branch))
        if weights != {n: w.sha256 for n, w in self._finished.items() if n.endswith(WEIGHTS)}:
            raise self._branch_changed_error()  # otherwise an earlier run only failed to clean up

    def _branch_changed_error(self) -> DestinationError:
        return DestinationError(
            f"{self.identity}: changed since the unfinished run began",
            hint="Give --overwrite to continue and replace its content.",
        )

    def finished_files(self) -> dict[str, FileRecord]:
        """The files that the journal lists and the working branch has with the same digest."""
        return dict(self._finished)

    # Large files -----------------------------------------------------------------------------

    def copy_on_server(self, files: Iterable[FileInfo], source: SourceId) -> dict[str, FileRecord]:
        """Copy large files of another repo within the Hub; returns the copied ones.

        The Hub keeps the path of a copied file, so files from a folder of a repo cannot be copied.
        """
        if source.path is not None or source.id != source.repo:
            return {}
        large = {f.name: FileRecord(f.size, f.sha256) for f in files if f.sha256 is not None}
        large = {name: record for name, record in large.items() if name not in self._finished}
        if not large:
            return {}
        repo = None if source.id == self.ref.repo else source.id
        operations = [CopyOperation(name, w, source.revision, repo) for name, w in large.items()]
        try:
            self._commit_to_work_branch(operations, "Copy unchanged files", large)
        except (DestinationError, TemporaryError):
            return {}
        self._copied += sum(record.size for record in large.values())
        return large

    def commit_file(self, name: str, pending: PendingFile) -> FileRecord:
        """Commit an uploaded file; content in memory is kept for the last commit."""
        if isinstance(pending.handle, bytes):
            return self.write_small(name, pending.handle)
        sent: UploadedFile = pending.handle
        operation = sent.operation or add_uploaded(name, sent.size, sent.sha256)
        self._commit_to_work_branch(
            [operation], name, {name: pending.record}, can_wait=self._streams
        )
        with self._commits:
            self._sent += sent.transferred
            self._deduplicated += sent.deduplicated
        return pending.record

    def _commit_to_work_branch(
        self,
        operations: list[Any],
        message: str,
        done: Mapping[str, FileRecord] | None = None,
        *,
        can_wait: bool = False,
    ) -> None:
        """Commit finished files to the working branch, with the journal that lists them."""
        with self._commits:
            waiting, waiting_done = self._waiting
            operations, files = [*waiting, *operations], waiting_done | dict(done or {})
            if not self._may_commit() and can_wait:
                self._waiting = operations, files
                return
            files = self._finished | files
            journal = {
                "job": self._job,
                "head": self._head,
                "files": {
                    name: {"size": w.size, "sha256": w.sha256} for name, w in sorted(files.items())
                },
            }
            note = self._addition(JOURNAL, json.dumps(journal, indent=1).encode())
            commit = self._repo.commit(
                self._work_branch, [*operations, note], message, self._working_head
            )
            self._working_head, self._finished, self._waiting = commit.revision, files, ([], {})

    def _may_commit(self) -> bool:
        """Whether another commit stays within the Hub's hourly limit."""
        now = time.monotonic()
        gained = (now - self._counted) / SECONDS_PER_COMMIT
        self._allowance, self._counted = min(COMMITS_AT_ONCE, self._allowance + gained), now
        allowed = self._allowance >= 1
        self._allowance -= allowed
        return allowed

    def _flush(self) -> None:
        if self._waiting[0]:
            self._commit_to_work_branch([], "Finished shards")

    def _addition(self, name: str, content: Any) -> Any:
        """The operation that adds a file; the client sends bytes to xet on any server."""
        from huggingface_hub import CommitOperationAdd

        if isinstance(content, bytes) and not self._streams:
            content = io.BytesIO(content)
        with client.translated_errors(f"{self.identity}: {name}", DestinationError):
            return CommitOperationAdd(name, content)

    def write_small(self, name: str, data: bytes) -> FileRecord:
        """Keep a small file for the last commit."""
        self._small[name] = data
        return FileRecord(len(data), hashlib.sha256(data).hexdigest())

    # The end of a run ------------------------------------------------------------------------

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Add all files to the destination branch in one commit, and clean up.

        Raises:
            DestinationError: the branch has changed meanwhile.
            RewriteError: the Hub lists other content than was sent.
        """
        self._flush()
        self._small |= last
        large = {name: record for name, record in self._finished.items() if name in keep}
        self._check_listed(self._work_branch, large)
        message = self._options.message or "Rescale for another number of experts per token"
        if self._head is None:
            self._publish_branch(large, keep, message)
        else:
            self._publish_commit(large, keep, message)
        assert self._published is not None
        self._check_listed(self._published, large)
        self._clean_up()
        known = bytes_text(self._deduplicated)
        self.remarks.append(
            f"{bytes_text(self._sent)} of weights sent, {known} were already on the Hub"
            + (f", {bytes_text(self._copied)} copied there" if self._copied else "")
        )

    def _publish_commit(
        self, large: Mapping[str, FileRecord], keep: frozenset[str], message: str
    ) -> None:
        operations = self._operations(self.branch, large, keep)
        if not operations:  # an earlier run got this far
            self.url, self._published = self._repo.url("tree", self.branch), self._head
            return
        if self._branch_changed:
            raise self._branch_changed_error()
        send = self._repo.open_pull if self._options.create_pr else self._repo.commit
        commit = send(self.branch, operations, message, self._head)
        self.url, self._published = commit.url, commit.revision

    def _publish_branch(
        self, large: Mapping[str, FileRecord], keep: frozenset[str], message: str
    ) -> None:
        """Create the branch at a commit that already has the whole model."""
        base = self._repo.head("main")
        assert base is not None
        self._repo.delete_branch(self._finished_branch)
        self._repo.create_branch(self._finished_branch, base)
        operations = self._operations(self._finished_branch, large, keep)
        commit = self._repo.commit(self._finished_branch, operations, message, base)
        self._repo.create_branch(self.branch, commit.revision)
        self.url, self._published = self._repo.url("tree", self.branch), commit.revision

    def _operations(
        self, branch: str, large: Mapping[str, FileRecord], keep: frozenset[str]
    ) -> list[Any]:
        """The operations after which a branch holds the output and nothing else."""
        from huggingface_hub import CommitOperationDelete

        tree = self._repo.tree(branch)
        wanted = [self._operation_for(name, record) for name, record in sorted(large.items())]
        wanted += [self._addition(n, data) for n, data in sorted(self._small.items())]
        surplus = sorted(tree.keys() - keep - {GITATTRIBUTES})
        return [*unapplied(wanted, tree), *map(CommitOperationDelete, surplus)]

    def _operation_for(self, name: str, record: FileRecord) -> Any:
        """The operation that gives a name to content of the working branch."""
        if can_commit_by_digest():
            return add_uploaded(name, record.size, record.sha256 or "")
        return CopyOperation(name, record, self._work_branch)

    def _check_listed(self, revision: str, large: Mapping[str, FileRecord]) -> None:
        tree = self._repo.tree(revision)
        for name, record in large.items():
            if not is_listed(tree.get(name), record):
                raise RewriteError(
                    f"{self.identity}: {name}: the Hub does not list the content that was sent",
                    hint="Run the same command with --overwrite.",
                )

    def _clean_up(self) -> None:
        """Remove our branches, the one with the journal last, so that a rerun can finish."""
        self._repo.delete_branch(self._finished_branch)
        self._repo.delete_branch(self._work_branch)

    def replace_small(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output."""
        pull = self._published is not None and self._published.startswith("refs/")
        revision = self._published if pull and self._published else self.branch
        self._published = self._repo.commit(
            revision,
            [self._addition(name, data)],
            f"Update {name}",
            self._repo.head(revision),
        ).revision

    def open_output(self) -> HubSource:
        """The commit with the output, or the branch."""
        return HubSource(HubRef(self.ref.repo, self._published or self.branch))

    def cancel(self) -> None:
        """End the uploads for which threads may be waiting."""
        self.writers.cancel()

    def close(self) -> None:
        """Commit the finished shards that still wait, if the Hub can be reached."""
        with suppress(MoescaleError):
            self._flush()


def _weights(tree: Mapping[str, RepoFile]) -> dict[str, str | None]:
    return {n: f.lfs.sha256 if f.lfs else None for n, f in tree.items() if n.endswith(WEIGHTS)}
