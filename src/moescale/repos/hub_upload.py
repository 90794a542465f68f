"""Uploads to the Hub's xet storage as a stream: chunked, deduplicated, never whole anywhere."""

from __future__ import annotations

import functools
import os
from typing import Any

from moescale.repos import hub

LIMITS = {
    "client.ac_max_upload_concurrency": 1,
    "client.ac_initial_upload_concurrency": 1,
    "data.session_xorb_metadata_flush_max_count": 1,
    "data.session_xorb_metadata_flush_interval": "5s",
}
"""One block of 64 MB on its way at a time and upload, and what has arrived is noted at once, so
that a rerun does not send it again. A user's own ``HF_XET_*`` settings win."""


def can_stream(repo: str, branch: str) -> bool:
    """Whether xet is switched on here and on the server."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._runtime import is_xet_available

    if constants.HF_HUB_DISABLE_XET or not is_xet_available():
        return False
    response = hub.retried(
        lambda: get_session().get(_token_url(repo, branch), headers=hub.headers(), timeout=30.0),
        repo,
    )
    if response.status_code not in (200, 404):
        from huggingface_hub.utils._http import hf_raise_for_status

        from moescale.errors import DestinationError

        with hub.in_our_words(f"hf://{repo}", DestinationError):
            hf_raise_for_status(response)
    return bool(response.status_code == 200)


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

    def finish(self) -> tuple[int, str, int]:
        """Wait until everything has arrived; returns size, SHA-256 and how many bytes were new."""
        info = self._stream.finish().xet_info
        report = self._commit.wait_to_finish()
        self._finished = True
        return info.file_size, info.sha256, report.dedup_metrics.new_bytes

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
