"""Uploads to the Hub's xet storage as a stream: chunked, deduplicated, never whole anywhere."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

from moescale.errors import DestinationError
from moescale.repos import hub

LIMITS = {
    "client.ac_max_upload_concurrency": 1,
    "client.ac_initial_upload_concurrency": 1,
    "data.session_xorb_metadata_flush_max_count": 1,
    "data.session_xorb_metadata_flush_interval": "5s",
}
"""One block of 64 MB on its way at a time and upload, and what has arrived is noted at once, so
that a rerun does not send it again. A user's own ``HF_XET_*`` settings win."""


def can_stream(repo: str, branch: str, what: str) -> bool:
    """Whether xet is switched on here and on the server.

    Raises:
        DestinationError: the token may not write to the repo.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._http import hf_raise_for_status
    from huggingface_hub.utils._runtime import is_xet_available

    if constants.HF_HUB_DISABLE_XET or not is_xet_available():
        return False

    def ask() -> bool:
        response = get_session().get(_token_url(repo, branch), headers=hub.headers())
        if response.status_code == 404:
            return False
        hf_raise_for_status(response)
        return True

    return hub.retried(ask, what, DestinationError)


def _token_url(repo: str, branch: str) -> str:
    from huggingface_hub.utils._xet import XetTokenType, xet_connection_info_refresh_url

    return xet_connection_info_refresh_url(
        token_type=XetTokenType.WRITE,
        repo_id=repo,
        repo_type="model",
        revision=branch,
        endpoint=hub.api().endpoint,
    )


@functools.cache
def _session() -> Any:
    import hf_xet

    config = hf_xet.XetConfig()
    wanted = {key: value for key, value in LIMITS.items() if not _set_by_user(key)}
    return hf_xet.XetSession(config.with_config(wanted))


def _set_by_user(key: str) -> bool:
    names = {"HF_XET_" + key.replace(".", "_").upper()}
    if "upload_concurrency" in key:
        names |= {"HF_XET_FIXED_UPLOAD_CONCURRENCY", "HF_XET_HIGH_PERFORMANCE"}
    return any(name in os.environ for name in names)


@dataclass(frozen=True, slots=True)
class Sent:
    """A file that has arrived: what it is, and how many of its bytes went over the line."""

    size: int
    sha256: str
    transferred: int
    deduplicated: int


class StreamUpload:
    """One file on its way; hf_xet splits it into chunks and sends those that are new."""

    def __init__(self, repo: str, branch: str) -> None:
        from huggingface_hub.utils._xet import xet_headers_without_auth

        headers = hub.headers()
        self._commit = _session().new_upload_commit(
            token_refresh_url=_token_url(repo, branch),
            token_refresh_headers=headers,
            custom_headers=xet_headers_without_auth(headers),
        )
        self._stream = self._commit.start_upload_stream(name="shard")
        self._finished = False

    def write(self, data: bytes) -> None:
        """Append bytes; waits while too many are on their way."""
        self._stream.write(data)

    def finish(self) -> Sent:
        """Wait until everything has arrived."""
        info = self._stream.finish().xet_info
        counts = self._commit.wait_to_finish().dedup_metrics
        self._finished = True
        return Sent(info.file_size, info.sha256, counts.total_bytes_uploaded, counts.deduped_bytes)

    def abort(self) -> None:
        """Give up what is not finished."""
        if not self._finished:
            self._finished = True
            self._commit.abort()


def uploaded(name: str, size: int, sha256: str) -> Any:
    """The operation that puts contents which are already on the Hub under a name."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(name, b"")
    operation.upload_info = UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
    # The client has no public way to say so; these two fields are what its own upload sets.
    operation._upload_mode = "lfs"
    operation._is_uploaded = True
    return operation
