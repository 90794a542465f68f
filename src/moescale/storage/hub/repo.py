"""A repo on the Hub: its branches, and commits that are looked up before they are repeated."""

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
from moescale.storage.base import FileRecord
from moescale.storage.hub import client
from moescale.storage.hub.client import ATTEMPTS

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import CommitInfo, RepoFile

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, or a pull request.

    Attributes:
        revision: the commit, or the reference of the pull request.
        url: the address of its page.
    """

    revision: str
    url: str


@dataclass(frozen=True, slots=True)
class CopyOperation:
    """A commit operation that copies a large file from another revision or repo.

    Attributes:
        path_in_repo: its path, which stays the same.
        record: its size and digest.
        revision: the revision to copy from.
        repo: the repo to copy from; None for the same one.
    """

    path_in_repo: str
    record: FileRecord
    revision: str | None
    repo: str | None = None

    def operation(self) -> Any:
        """The client's operation."""
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
        """`name` is the repo as the user gave it, for messages."""
        self.id = repo
        self.name = name

    def url(self, *parts: str) -> str:
        """The address of a page of the repo."""
        return "/".join((client.hf_api().endpoint, self.id, *parts))

    # Content ---------------------------------------------------------------------------------

    def info(self, revision: str | None = None) -> ModelInfo | None:
        """The Hub's description of a revision; None if the repo or the revision does not exist."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def fetch() -> ModelInfo | None:
            try:
                return client.hf_api().model_info(self.id, revision=revision)
            except RevisionNotFoundError:
                return None
            except RepositoryNotFoundError as error:
                _raise_if_unauthorized(error)
                return None

        return self._retry(fetch)

    def head(self, branch: str) -> str | None:
        """The commit of a branch; None if it does not exist."""
        info = self.info(branch)
        return None if info is None else info.sha

    def tree(self, branch: str) -> dict[str, RepoFile]:
        """The files of a branch; empty if it does not exist."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def fetch() -> dict[str, RepoFile]:
            try:
                entries = client.hf_api().list_repo_tree(self.id, recursive=True, revision=branch)
                return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            except RevisionNotFoundError:
                return {}
            except RepositoryNotFoundError as error:
                _raise_if_unauthorized(error)
                return {}

        return self._retry(fetch)

    def is_branch(self, name: str) -> bool:
        """Whether the name is that of a branch, not of a tag or a commit."""
        refs = self._retry(lambda: client.hf_api().list_repo_refs(self.id))
        return any(branch.name == name for branch in refs.branches)

    def read(self, name: str, branch: str, start: int = 0, size: int | None = None) -> bytes:
        """A small file of a branch, or part of a large one."""
        from huggingface_hub import hf_hub_url, hf_raise_for_status

        url = hf_hub_url(self.id, name, revision=branch, endpoint=client.hf_api().endpoint)
        wanted = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}

        def fetch() -> bytes:
            response = client.session().get(url, headers={**client.headers(), **wanted})
            hf_raise_for_status(response)
            return bytes(response.content)

        return self._retry(fetch)

    # Repo and branches -----------------------------------------------------------------------

    def create(self, private: bool | None) -> None:
        """Create the repo; None leaves its visibility to the Hub."""
        self._retry(lambda: client.hf_api().create_repo(self.id, private=private, exist_ok=True))

    def create_branch(self, branch: str, commit: str) -> None:
        """Create a branch at a commit.

        Raises:
            DestinationError: someone else has just created a branch of this name.
        """

        def create() -> str:
            client.hf_api().create_branch(self.id, branch=branch, revision=commit, exist_ok=True)
            head = self.head(branch)
            if head is None:
                raise client.BusyError(f"the Hub does not show the new branch {branch}")
            return head

        if self._retry(create) != commit:
            raise DestinationError(
                f"{self.name}: someone else has just created the branch {branch}",
                hint="Is another run writing there? Wait for it, or give another destination.",
            )

    def delete_branch(self, branch: str) -> None:
        """Delete a branch if it exists."""
        from huggingface_hub.errors import HfHubHTTPError

        def delete() -> None:
            try:
                client.hf_api().delete_branch(self.id, branch=branch)
            except HfHubHTTPError as error:
                if error.response.status_code != 404:
                    raise

        self._retry(delete)

    # Commits ---------------------------------------------------------------------------------

    def upload(self, branch: str, operation: Any) -> Any:
        """Upload the content of a large file.

        Returns the operation that adds it to a branch; None if the Hub treats the file as small:
        then it was not uploaded, and must be part of a commit.
        """

        def send() -> Any:
            addition = _copy_for_attempt(operation)
            client.hf_api().preupload_lfs_files(
                self.id, additions=[addition], revision=branch, gitignore_content=""
            )
            # The client frees the content that it has sent.
            return addition if addition.path_or_fileobj == b"" else None

        return self._retry(send)

    def commit(
        self, branch: str, operations: Sequence[Any], message: str, parent: str | None
    ) -> Commit:
        """Commit on top of `parent`.

        Raises:
            DestinationError: the branch is not at `parent`, or the Hub rejects the commit.
        """

        def arrived() -> Commit | None:
            head = self.head(branch)
            if head is None or head == parent or unapplied(operations, self.tree(branch)):
                return None
            return Commit(head, self.url("commit", head))

        def send() -> Commit:
            info = self._create_commit(branch, operations, message, parent)
            return Commit(info.oid, info.commit_url)

        return self._send_once(send, arrived)

    def open_pull(
        self, branch: str, operations: Sequence[Any], message: str, parent: str | None
    ) -> Commit:
        """Open a pull request, unless an open one has the same content."""
        found = self._find_pull(operations, message)

        def send() -> Commit:
            info = self._create_commit(branch, operations, message, parent, create_pr=True)
            return Commit(info.pr_revision or info.oid, info.pr_url or info.commit_url)

        return found or self._send_once(send, lambda: self._find_pull(operations, message))

    def _find_pull(self, operations: Sequence[Any], message: str) -> Commit | None:
        pulls = self._retry(
            lambda: list(
                client.hf_api().get_repo_discussions(
                    self.id, discussion_type="pull_request", discussion_status="open"
                )
            )
        )
        for pull in pulls:
            revision = f"refs/pr/{pull.num}"
            meant = pull.status == "open" and pull.is_pull_request and pull.title == message
            if meant and not unapplied(operations, self.tree(revision)):
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
            warnings.simplefilter("ignore")  # about the card, which `check_card` validated
            return client.hf_api().create_commit(
                self.id,
                [_copy_for_attempt(operation) for operation in operations],
                commit_message=message,
                revision=branch,
                parent_commit=parent,
                create_pr=create_pr,
            )

    def _send_once(
        self, send: Callable[[], Commit], arrived: Callable[[], Commit | None]
    ) -> Commit:
        """Send a commit; if it fails, look for it on the Hub before sending it again."""
        for attempt in range(ATTEMPTS):
            try:
                with client.translated_errors(f"{self.name}: commit", DestinationError):
                    return send()
            except (TemporaryError, DestinationError) as error:
                if (found := arrived()) is not None:
                    return found
                if isinstance(error, DestinationError) or attempt == ATTEMPTS - 1:
                    raise
                client.wait_before_retry(attempt, error)
        raise AssertionError("unreachable")

    def check_card(self, card: bytes) -> list[str]:
        """Ask the Hub to validate a card; returns its warnings.

        Raises:
            DestinationError: the Hub rejects the card's metadata.
        """
        from huggingface_hub import hf_raise_for_status

        def fetch() -> dict[str, Any]:
            response = client.session().post(
                f"{client.hf_api().endpoint}/api/validate-yaml",
                json={"content": card.decode(), "repoType": "model"},
                headers=client.headers(),
            )
            if response.status_code != 400:
                hf_raise_for_status(response)
            return dict(json.loads(response.content))

        answer = self._retry(fetch)
        if errors := [str(entry.get("message")) for entry in answer.get("errors", [])]:
            raise DestinationError(
                f"{self.name}: the Hub rejects the metadata of README.md: {errors[0]}",
                hint="Download the source, fix its README.md, and give that directory as SRC.",
            )
        return [str(entry.get("message")) for entry in answer.get("warnings", [])]

    def _retry(self, call: Callable[[], _T]) -> _T:
        return client.retry(call, self.name, DestinationError)


def _raise_if_unauthorized(error: Any) -> None:
    """Raise the error of a repo that was not found if an expired token may be hiding it."""
    if error.response.status_code == 401 and client.has_token():
        raise error


def _copy_for_attempt(operation: Any) -> Any:
    """A copy of an operation for one attempt: the client cannot reuse it, or rewind its file."""
    if isinstance(operation, CopyOperation):
        return operation.operation()
    content = getattr(operation, "path_or_fileobj", None)
    if isinstance(content, io.BufferedIOBase):
        content.seek(0)
    return copy(operation)


def unapplied(operations: Sequence[Any], tree: dict[str, RepoFile]) -> list[Any]:
    """The operations that a tree does not have yet."""
    return [operation for operation in operations if not _is_applied(operation, tree)]


def _is_applied(operation: Any, tree: dict[str, RepoFile]) -> bool:
    from huggingface_hub import CommitOperationDelete

    listed = tree.get(operation.path_in_repo)
    if isinstance(operation, CommitOperationDelete) or listed is None:
        return isinstance(operation, CommitOperationDelete) and listed is None
    if isinstance(operation, CopyOperation):
        return is_listed(listed, operation.record)
    if listed.lfs is not None:
        return bool(listed.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as file:
        return bool(listed.blob_id == _git_digest(file.read()))


def _git_digest(content: bytes) -> str:
    """The digest that git gives a file with this content."""
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def is_listed(listed: RepoFile | None, record: FileRecord) -> bool:
    """Whether the Hub lists a large file with this size and digest."""
    return (
        listed is not None
        and listed.lfs is not None
        and (listed.size, listed.lfs.sha256) == (record.size, record.sha256)
    )
