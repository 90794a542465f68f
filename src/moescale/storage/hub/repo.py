"""A repo on the Hub: what its branches have, and commits that are looked up before a repeat."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moescale.errors import DestinationError, TemporaryError
from moescale.storage.base import Written
from moescale.storage.hub import client
from moescale.storage.hub.client import ATTEMPTS

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import CommitInfo, RepoFile

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit: the revision that has it, and its address."""

    revision: str
    url: str


@dataclass(frozen=True, slots=True)
class Copied:
    """The operation that brings a large file from another revision, of this repo or another."""

    path_in_repo: str
    written: Written
    revision: str | None
    repo: str | None = None

    def operation(self) -> Any:
        """The same for the client."""
        from huggingface_hub import CommitOperationCopy

        return CommitOperationCopy(
            self.path_in_repo,
            self.path_in_repo,
            src_revision=self.revision,
            src_repo_id=self.repo,
            src_repo_type=self.repo and "model",
        )


class HubRepo:
    """A model repo and its branches."""

    def __init__(self, repo: str, name: str) -> None:
        """`name` is how the user calls it."""
        self.id = repo
        self.name = name

    def url(self, *parts: str) -> str:
        """The address of a page of the repo."""
        return "/".join((client.api().endpoint, self.id, *parts))

    # What is there ---------------------------------------------------------------------------

    def info(self, revision: str | None = None) -> ModelInfo | None:
        """What the Hub says about a revision; None if there is no such repo or revision."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def fetch() -> ModelInfo | None:
            try:
                return client.api().model_info(self.id, revision=revision)
            except RevisionNotFoundError:
                return None
            except RepositoryNotFoundError as error:
                _check_hidden(error)
                return None

        return self._ask(fetch)

    def head(self, branch: str) -> str | None:
        """The commit of a branch, None if there is no such branch."""
        info = self.info(branch)
        return None if info is None else info.sha

    def tree(self, branch: str) -> dict[str, RepoFile]:
        """The files of a branch, none if there is no such branch."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def fetch() -> dict[str, RepoFile]:
            try:
                entries = client.api().list_repo_tree(self.id, recursive=True, revision=branch)
                return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            except RevisionNotFoundError:
                return {}
            except RepositoryNotFoundError as error:
                _check_hidden(error)
                return {}

        return self._ask(fetch)

    def is_branch(self, name: str) -> bool:
        """Whether there is a branch of this name; a tag or a commit is none."""
        refs = self._ask(lambda: client.api().list_repo_refs(self.id))
        return any(branch.name == name for branch in refs.branches)

    def read(self, name: str, branch: str, start: int = 0, size: int | None = None) -> bytes:
        """A small file of a branch, or a stretch of a large one."""
        from huggingface_hub import hf_hub_url, hf_raise_for_status

        url = hf_hub_url(self.id, name, revision=branch, endpoint=client.api().endpoint)
        wanted = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}

        def fetch() -> bytes:
            response = client.session().get(url, headers={**client.headers(), **wanted})
            hf_raise_for_status(response)
            return bytes(response.content)

        return self._ask(fetch)

    # Repo and branches -----------------------------------------------------------------------

    def create(self, private: bool | None) -> None:
        """Create the repo; None is the Hub's own choice of who may see it."""
        self._ask(lambda: client.api().create_repo(self.id, private=private, exist_ok=True))

    def create_branch(self, branch: str, commit: str) -> None:
        """Create a branch at a commit.

        Raises:
            DestinationError: somebody else has just made another branch of this name.
        """

        def create() -> str:
            client.api().create_branch(self.id, branch=branch, revision=commit, exist_ok=True)
            head = self.head(branch)
            if head is None:
                raise client.BusyError(f"the Hub does not show the new branch {branch}")
            return head

        if self._ask(create) != commit:
            raise DestinationError(
                f"{self.name}: somebody else has just created the branch {branch}",
                hint="Is another run writing there? Wait for it, or give another destination.",
            )

    def delete_branch(self, branch: str) -> None:
        """Delete a branch if it is there."""
        from huggingface_hub.errors import HfHubHTTPError

        def delete() -> None:
            try:
                client.api().delete_branch(self.id, branch=branch)
            except HfHubHTTPError as error:
                if error.response.status_code != 404:
                    raise

        self._ask(delete)

    # Commits ---------------------------------------------------------------------------------

    def upload(self, branch: str, operation: Any) -> Any:
        """Send the content of a large file.

        Returns the operation that brings it to a branch; None if the Hub calls the file small:
        then it was not sent, and belongs into a commit.
        """

        def send() -> Any:
            addition = _fresh(operation)
            client.api().preupload_lfs_files(
                self.id, additions=[addition], revision=branch, gitignore_content=""
            )
            return addition if addition.path_or_fileobj == b"" else None  # what is sent is freed

        return self._ask(send)

    def commit(
        self, branch: str, operations: Sequence[Any], message: str, parent: str | None
    ) -> Commit:
        """Commit on top of `parent`.

        Raises:
            DestinationError: the branch is not at `parent`, or the Hub refuses the commit.
        """

        def arrived() -> Commit | None:
            head = self.head(branch)
            if head is None or head == parent or missing(operations, self.tree(branch)):
                return None
            return Commit(head, self.url("commit", head))

        def send() -> Commit:
            info = self._create_commit(branch, operations, message, parent)
            return Commit(info.oid, info.commit_url)

        return self._once(send, arrived)

    def open_pull(
        self, branch: str, operations: Sequence[Any], message: str, parent: str | None
    ) -> Commit:
        """Open a pull request, unless there is one that brings the same."""
        found = self._find_pull(operations, message)

        def send() -> Commit:
            info = self._create_commit(branch, operations, message, parent, create_pr=True)
            return Commit(info.pr_revision or info.oid, info.pr_url or info.commit_url)

        return found or self._once(send, lambda: self._find_pull(operations, message))

    def _find_pull(self, operations: Sequence[Any], message: str) -> Commit | None:
        pulls = self._ask(
            lambda: list(
                client.api().get_repo_discussions(
                    self.id, discussion_type="pull_request", discussion_status="open"
                )
            )
        )
        for pull in pulls:
            revision = f"refs/pr/{pull.num}"
            if pull.status == "open" and pull.is_pull_request and pull.title == message:  # noqa: SIM102
                if not missing(operations, self.tree(revision)):
                    return Commit(revision, self.url("discussions", str(pull.num)))
        return None

    def _create_commit(
        self,
        branch: str,
        operations: Sequence[Any],
        message: str,
        parent: str | None,
        *,
        create_pr: bool = False,
    ) -> CommitInfo:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the card, which was validated before
            return client.api().create_commit(
                self.id,
                [_fresh(operation) for operation in operations],
                commit_message=message,
                revision=branch,
                parent_commit=parent,
                create_pr=create_pr,
            )

    def _once(self, send: Callable[[], Commit], arrived: Callable[[], Commit | None]) -> Commit:
        """Send a commit; one that fails is looked for before it is sent again."""
        for attempt in range(ATTEMPTS):
            try:
                with client.in_our_words(f"{self.name}: commit", DestinationError):
                    return send()
            except (TemporaryError, DestinationError) as error:
                if (found := arrived()) is not None:
                    return found
                if isinstance(error, DestinationError) or attempt == ATTEMPTS - 1:
                    raise
                client.pause(attempt, error)
        raise AssertionError("unreachable")

    def check_card(self, card: bytes) -> list[str]:
        """Ask the Hub whether it takes a card; returns what it remarks.

        Raises:
            DestinationError: the card's metadata is refused.
        """
        from huggingface_hub import hf_raise_for_status

        def fetch() -> dict[str, Any]:
            response = client.session().post(
                f"{client.api().endpoint}/api/validate-yaml",
                json={"content": card.decode(), "repoType": "model"},
                headers=client.headers(),
            )
            if response.status_code != 400:
                hf_raise_for_status(response)
            return dict(json.loads(response.content))

        answer = self._ask(fetch)
        if errors := [str(entry.get("message")) for entry in answer.get("errors", [])]:
            raise DestinationError(
                f"{self.name}: the Hub refuses the metadata of README.md: {errors[0]}",
                hint="Download the source, mend its README.md, and give that directory as SRC.",
            )
        return [str(entry.get("message")) for entry in answer.get("warnings", [])]

    def _ask(self, call: Callable[[], _T]) -> _T:
        return client.retried(call, self.name, DestinationError)


def _check_hidden(error: Any) -> None:
    """A repo that is not found is not there, unless an expired token hides it."""
    if error.response.status_code == 401 and client.has_token():
        raise error


def _fresh(operation: Any) -> Any:
    """An operation for one attempt; the client does not take one twice, nor rewinds its file."""
    if isinstance(operation, Copied):
        return operation.operation()
    content = getattr(operation, "path_or_fileobj", None)
    if isinstance(content, io.BufferedIOBase):
        content.seek(0)
    return copy(operation)


def missing(operations: Sequence[Any], tree: dict[str, RepoFile]) -> list[Any]:
    """The operations that are not yet done in a tree."""
    return [operation for operation in operations if not _is_done(operation, tree)]


def _is_done(operation: Any, tree: dict[str, RepoFile]) -> bool:
    from huggingface_hub import CommitOperationDelete

    there = tree.get(operation.path_in_repo)
    if isinstance(operation, CommitOperationDelete) or there is None:
        return isinstance(operation, CommitOperationDelete) and there is None
    if isinstance(operation, Copied):
        return is_listed(there, operation.written)
    if there.lfs is not None:
        return bool(there.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as file:
        return bool(there.blob_id == _git_digest(file.read()))


def _git_digest(content: bytes) -> str:
    """What git calls a file with this content."""
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def is_listed(there: RepoFile | None, written: Written) -> bool:
    """Whether a listed file is a large one with this size and digest."""
    return (
        there is not None
        and there.lfs is not None
        and (there.size, there.lfs.sha256) == (written.size, written.sha256)
    )
