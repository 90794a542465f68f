"""A repo on the Hub as a destination: its branch changes once, at the end, to the whole model.

While a run lasts, finished shards are committed to a working branch of the destination, together
with the journal that lists them, so that the same command resumes on any machine. The last commit
brings everything to the destination branch, by the digests of what is already there; then the
working branch is removed. A destination branch that is missing is made of a branch that got that
last commit, so it appears whole.
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

from moescale.checkpoint.record import recorded
from moescale.errors import (
    DestinationError,
    MoescaleError,
    RewriteError,
    TemporaryError,
    bytes_text,
)
from moescale.storage.base import FileInfo, Made, SourceId, Written
from moescale.storage.entries import NOT_OURS, UNREADABLE, listed
from moescale.storage.hub import client
from moescale.storage.hub.repo import Copied, HubRepo, is_listed, missing
from moescale.storage.hub.source import HubSource
from moescale.storage.hub.upload import Sent, can_name_by_digest, can_stream, lacking, uploaded
from moescale.storage.hub.writer import WEIGHTS, HubWriters
from moescale.storage.location import HubRef

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

JOURNAL = "moescale-journal.json"

COMMITS_AT_ONCE, SECONDS_PER_COMMIT = 40, 60.0
"""The Hub allows about 128 commits an hour; beyond these, finished shards wait for one another."""

ATTRIBUTES = ".gitattributes"
"""The file that every repo on the Hub is born with."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How the destination repo is made, and how its content is replaced."""

    private: bool | None = None
    create_pr: bool = False
    message: str | None = None
    overwrite: bool = False


class HubDestination:
    """A branch of a model repo."""

    keeps_files = False
    remote = True
    default_jobs = 2  # for the memory

    def __init__(self, place: HubRef, options: HubOptions | None = None) -> None:
        """Nothing is created before `begin`."""
        self.place = place
        self.branch = place.revision or "main"
        self.identity = str(place)
        self.remarks: list[str] = []
        self.url: str | None = None
        self._published: str | None = None  # the revision that has the finished output
        self._options = options or HubOptions()
        self._repo = HubRepo(place.repo, self.identity)
        name = self.branch.replace("/", "-")
        self._working, self._ready = f"moescale-unfinished-{name}", f"moescale-finished-{name}"
        self._job: Any = None
        self._head: str | None = None  # of the destination branch when the run began
        self._moved = False  # whether that is another one than when the first run began
        self._working_head: str | None = None
        self._done: dict[str, Written] = {}
        self._small: dict[str, bytes] = {}
        self._commits = threading.Lock()  # one commit at a time on the working branch
        self._waiting: tuple[list[Any], dict[str, Written]] = [], {}  # for the next commit
        self._allowance, self._counted = float(COMMITS_AT_ONCE), time.monotonic()
        self._streams = False
        self.writers = HubWriters(place, self._working, False)
        self._sent = self._deduplicated = self._copied = 0

    # What is there ---------------------------------------------------------------------------

    def is_at(self, source: SourceId) -> bool:
        """Whether the source is the head of this branch."""
        return (
            source.kind == "hub"
            and (source.repo or "").lower() == self.place.repo.lower()
            and source.revision == self._repo.head(self.branch)
        )

    def holds(self, file: Path) -> bool:
        """No file of this machine."""
        return False

    def room(self) -> None:
        """The Hub does not say."""

    def may_share(self, source: SourceId) -> bool:
        """Not with a file of this machine."""
        return False

    def check_writable(self) -> None:
        """Only a first commit shows that."""

    def existing(self) -> dict[str, int]:
        """Name and size of what the branch has; a repo that is not there is empty."""
        tree = self._repo.tree(self.branch)
        return {} if set(tree) <= {ATTRIBUTES} else {name: f.size for name, f in tree.items()}

    def read(self, name: str) -> bytes:
        """A small file of the branch."""
        return self._repo.read(name, self.branch)

    def recorded(self) -> bytes | None:
        """The provenance of what is there."""
        return recorded(
            self.existing(), lambda name, *part: self._repo.read(name, self.branch, *part)
        )

    def changed_at(self, name: str) -> int:
        """When the branch was last changed, in nanoseconds."""
        info = self._repo.info(self.branch)
        return int(info.last_modified.timestamp() * 1e9) if info and info.last_modified else 0

    def unfinished(self) -> Any:
        """The job of the working branch; None if there is no such branch."""
        journal = self._journal()
        return None if journal is None else journal.get("job", NOT_OURS)

    def _journal(self) -> dict[str, Any] | None:
        if JOURNAL not in self._repo.tree(self._working):
            return None
        try:
            content = json.loads(self._repo.read(JOURNAL, self._working))
        except UNREADABLE:
            return {}
        return content if isinstance(content, dict) else {}

    def check_replaceable(self) -> None:
        """A branch keeps its history; it can always be replaced."""

    def check_card(self, card: bytes) -> None:
        """Ask the Hub whether it will take the card.

        Raises:
            DestinationError: its metadata is refused.
        """
        self.remarks += [f"the Hub remarks on README.md: {m}" for m in self._repo.check_card(card)]

    # The start of a run ----------------------------------------------------------------------

    def share(self) -> None:
        """Every machine reaches the Hub by itself."""

    def begin(
        self, job: Any, replace: bool, keep: Mapping[str, Written] = MappingProxyType({})
    ) -> None:
        """Create the repo and the working branch, or go on with the one that is there.

        Nothing is kept: what the Hub has already does not move again.

        Raises:
            DestinationError: no right to write, or the branch changed since the run began.
        """
        self._create_repo()
        self._job = job
        self._head = self._repo.head(self.branch)
        self._check_branch()
        self._streams = can_stream(self.place.repo, self._base(), self.identity)
        if self._streams and (name := lacking()):
            self._streams = False
            self.remarks.append(
                f"the installed client has no {name}: each shard went through a temporary file"
            )
        self.writers = HubWriters(self.place, self._working, self._streams)
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
            self.remarks.append(f"repo {self.place.repo} created ({kind[private]})")
        elif private is not None and info.private is not private:
            raise DestinationError(
                f"{self.identity}: exists and is {'private' if info.private else 'public'}",
                hint="--private and --public are for a repo that has to be made.",
            )

    def _check_branch(self) -> None:
        """Refuse now what the Hub would refuse at the end."""
        if self._head is None and self._options.create_pr:
            raise DestinationError(
                f"{self.identity}: there is no such branch to open a pull request against"
            )
        if self.branch.startswith("refs/") or (
            self._head is not None and not self._repo.is_branch(self.branch)
        ):
            raise DestinationError(
                f"{self.identity}: {self.branch} is not a branch",
                hint="Give the name of a branch, or a new name; --create-pr opens a pull request.",
            )

    def _base(self) -> str:
        """The branch that new ones start from."""
        return self.branch if self._head is not None else "main"

    def _start(self) -> None:
        """Make a working branch; its first commit shows that the token may write."""
        self._clean_up()
        base = self._head or self._repo.head("main")
        if base is None:
            raise TemporaryError(f"{self.identity}: the Hub does not show the new repo yet")
        self._repo.create_branch(self._working, base)
        self._working_head = base
        self._commit_work([], "Start")

    def _resume(self, journal: Mapping[str, Any]) -> None:
        tree = self._repo.tree(self._working)
        self._working_head = self._repo.head(self._working)
        files = journal.get("files")
        for name, entry in files.items() if isinstance(files, dict) else ():
            with suppress(*UNREADABLE):
                if is_listed(tree.get(name), written := listed(name, entry)):
                    self._done[name] = written
        if journal.get("head") == self._head or self._options.overwrite:
            return
        self._moved = True
        weights = _weights(self._repo.tree(self.branch))
        if weights != {n: w.sha256 for n, w in self._done.items() if n.endswith(WEIGHTS)}:
            raise self._has_moved()  # else it looks as if only the cleaning up were missing

    def _has_moved(self) -> DestinationError:
        return DestinationError(
            f"{self.identity}: changed since the unfinished run began",
            hint="Give --overwrite to go on and replace what is there now.",
        )

    def finished(self) -> dict[str, Written]:
        """What the journal lists and the working branch has with the same digest."""
        return dict(self._done)

    # Large files -----------------------------------------------------------------------------

    def copy(self, files: Iterable[FileInfo], source: SourceId) -> dict[str, Written]:
        """Copy large files of another repo inside the Hub; returns what could be copied so.

        A file is copied under its own path only, which is another in a folder of a repo.
        """
        if source.kind != "hub" or source.id != source.repo:
            return {}
        large = {f.name: Written(f.size, f.sha256) for f in files if f.sha256 is not None}
        large = {name: written for name, written in large.items() if name not in self._done}
        if not large:
            return {}
        repo = None if source.id == self.place.repo else source.id
        operations = [Copied(name, w, source.revision, repo) for name, w in large.items()]
        try:
            self._commit_work(operations, "Copy unchanged files", large)
        except (DestinationError, TemporaryError):
            return {}
        self._copied += sum(written.size for written in large.values())
        return large

    def commit_file(self, name: str, made: Made) -> Written:
        """Commit a large file that has arrived; one from memory is kept for the last commit."""
        if isinstance(made.at, bytes):
            return self.put(name, made.at)
        sent: Sent = made.at
        operation = sent.operation or uploaded(name, sent.size, sent.sha256)
        self._commit_work([operation], name, {name: made.written}, can_wait=self._streams)
        with self._commits:
            self._sent += sent.transferred
            self._deduplicated += sent.deduplicated
        return made.written

    def _commit_work(
        self,
        operations: list[Any],
        message: str,
        done: Mapping[str, Written] | None = None,
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
            files = self._done | files
            journal = {
                "job": self._job,
                "head": self._head,
                "files": {
                    name: {"size": w.size, "sha256": w.sha256} for name, w in sorted(files.items())
                },
            }
            note = self._addition(JOURNAL, json.dumps(journal, indent=1).encode())
            commit = self._repo.commit(
                self._working, [*operations, note], message, self._working_head
            )
            self._working_head, self._done, self._waiting = commit.revision, files, ([], {})

    def _may_commit(self) -> bool:
        """Whether another commit keeps to what the Hub allows in an hour."""
        now = time.monotonic()
        gained = (now - self._counted) / SECONDS_PER_COMMIT
        self._allowance, self._counted = min(COMMITS_AT_ONCE, self._allowance + gained), now
        allowed = self._allowance >= 1
        self._allowance -= allowed
        return allowed

    def _flush(self) -> None:
        if self._waiting[0]:
            self._commit_work([], "Finished shards")

    def _addition(self, name: str, content: Any) -> Any:
        """The operation that adds a file; the client takes bytes to xet, whatever the server."""
        from huggingface_hub import CommitOperationAdd

        if isinstance(content, bytes) and not self._streams:
            content = io.BytesIO(content)
        with client.in_our_words(f"{self.identity}: {name}", DestinationError):
            return CommitOperationAdd(name, content)

    def put(self, name: str, data: bytes) -> Written:
        """Keep a small file for the last commit."""
        self._small[name] = data
        return Written(len(data), hashlib.sha256(data).hexdigest())

    # The end of a run ------------------------------------------------------------------------

    def publish(self, last: Mapping[str, bytes], keep: frozenset[str]) -> None:
        """Bring everything to the destination branch in one commit, and clean up.

        Raises:
            DestinationError: the branch changed meanwhile.
            RewriteError: the Hub lists something else than was sent.
        """
        self._flush()
        self._small |= last
        large = {name: written for name, written in self._done.items() if name in keep}
        self._check_listed(self._working, large)
        message = self._options.message or "Rescale the experts for another number of them"
        if self._head is None:
            self._publish_branch(large, keep, message)
        else:
            self._publish_commit(large, keep, message)
        assert self._published is not None
        self._check_listed(self._published, large)
        self._clean_up()
        known = bytes_text(self._deduplicated)
        self.remarks.append(
            f"{bytes_text(self._sent)} of weights sent, {known} were on the Hub already"
            + (f", {bytes_text(self._copied)} copied there" if self._copied else "")
        )

    def _publish_commit(
        self, large: Mapping[str, Written], keep: frozenset[str], message: str
    ) -> None:
        operations = self._operations(self.branch, large, keep)
        if not operations:  # an earlier run came so far
            self.url, self._published = self._repo.url("tree", self.branch), self._head
            return
        if self._moved:
            raise self._has_moved()
        send = self._repo.open_pull if self._options.create_pr else self._repo.commit
        commit = send(self.branch, operations, message, self._head)
        self.url, self._published = commit.url, commit.revision

    def _publish_branch(
        self, large: Mapping[str, Written], keep: frozenset[str], message: str
    ) -> None:
        """The branch appears with the whole model: it is made where the commit already is."""
        base = self._repo.head("main")
        assert base is not None
        self._repo.delete_branch(self._ready)
        self._repo.create_branch(self._ready, base)
        operations = self._operations(self._ready, large, keep)
        commit = self._repo.commit(self._ready, operations, message, base)
        self._repo.create_branch(self.branch, commit.revision)
        self.url, self._published = self._repo.url("tree", self.branch), commit.revision

    def _operations(
        self, branch: str, large: Mapping[str, Written], keep: frozenset[str]
    ) -> list[Any]:
        """What is left to do for a branch to hold the output and nothing else."""
        from huggingface_hub import CommitOperationDelete

        tree = self._repo.tree(branch)
        wanted = [self._arrived(name, written) for name, written in sorted(large.items())]
        wanted += [self._addition(n, data) for n, data in sorted(self._small.items())]
        surplus = sorted(tree.keys() - keep - {ATTRIBUTES})
        return [*missing(wanted, tree), *map(CommitOperationDelete, surplus)]

    def _arrived(self, name: str, written: Written) -> Any:
        """The operation that names contents which are on the working branch."""
        if can_name_by_digest():
            return uploaded(name, written.size, written.sha256 or "")
        return Copied(name, written, self._working)

    def _check_listed(self, revision: str, large: Mapping[str, Written]) -> None:
        tree = self._repo.tree(revision)
        for name, written in large.items():
            if not is_listed(tree.get(name), written):
                raise RewriteError(
                    f"{self.identity}: {name}: the Hub does not list what was sent",
                    hint="Run the same command with --overwrite.",
                )

    def _clean_up(self) -> None:
        """Remove our branches, last the one with the journal that brings a rerun here again."""
        self._repo.delete_branch(self._ready)
        self._repo.delete_branch(self._working)

    def amend(self, name: str, data: bytes) -> None:
        """Replace a small file of a finished output."""
        pull = self._published is not None and self._published.startswith("refs/")
        revision = self._published if pull and self._published else self.branch
        self._published = self._repo.commit(
            revision,
            [self._addition(name, data)],
            f"Update {name}",
            self._repo.head(revision),
        ).revision

    def output(self) -> HubSource:
        """The commit that has it, or the branch."""
        return HubSource(HubRef(self.place.repo, self._published or self.branch))

    def cancel(self) -> None:
        """End the uploads that threads may be waiting in."""
        self.writers.cancel()

    def close(self) -> None:
        """Note what has arrived, if the Hub can still be reached."""
        with suppress(MoescaleError):
            self._flush()


def _weights(tree: Mapping[str, RepoFile]) -> dict[str, str | None]:
    return {n: f.lfs.sha256 if f.lfs else None for n, f in tree.items() if n.endswith(WEIGHTS)}
