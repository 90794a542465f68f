"""Uploads to the Hub's xet storage as a stream: in chunks, deduplicated, never stored whole."""

from __future__ import annotations

import ctypes
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any
from urllib.parse import quote

from moescale.checkpoint.rewrite import Reader, pieces
from moescale.errors import DestinationError, InterruptedRun
from moescale.storage.base import OnSent, PendingFile, ignore
from moescale.storage.hub import client

STREAM_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "huggingface_hub": {"CommitOperationAdd": ("_upload_mode", "_is_uploaded")},
    "hf_xet": {
        "XetConfig": ("with_config",),
        "XetSession": ("new_upload_commit",),
        "XetUploadCommit": ("start_upload_stream", "progress", "wait_to_finish", "abort"),
        "XetStreamUpload": ("write", "finish"),
        "XetFileMetadata": ("xet_info",),
        "XetFileInfo": ("file_size", "sha256"),
        "XetCommitReport": ("dedup_metrics",),
        "DeduplicationMetrics": ("total_bytes_uploaded", "deduped_bytes"),
        "GroupProgressReport": (
            "total_bytes_completed",
            "total_transfer_bytes",
            "total_transfer_bytes_completed",
        ),
    },
}
"""Undocumented names that a stream needs, by module and class. If the client lacks one, shards go
through a temporary file, with the public API alone."""

XET_SETTINGS = {
    "client.ac_max_upload_concurrency": 1,
    "client.ac_initial_upload_concurrency": 1,
    "data.session_xorb_metadata_flush_max_count": 1,
    "data.session_xorb_metadata_flush_interval": "5s",
}
"""Each upload sends one block of 64 MB at a time and registers it at once, so that a rerun does not
send it again. The user's ``HF_XET_*`` settings take precedence."""

BLOCK_BYTES = 2 << 20
"""The bytes of one call of hf_xet. It cuts a block into chunks of about 64 kB, keeps new ones as
slices of the block, and copies a chunk that spans two blocks: blocks of 256 kB took 1.5 times the
memory."""

POLL_SECONDS = 0.01
TRANSFER_WAIT_SECONDS = 20.0
"""After this time without progress, a block has failed or waits; the next call shows which."""

_M_TRIM_THRESHOLD = -1
WATCH_SECONDS = 0.5
STALL_SECONDS = 600.0
"""After this time without progress, an upload is given up."""


def can_stream(repo: str, branch: str, what: str) -> bool:
    """Whether xet is available here and on the server.

    Raises:
        DestinationError: the token does not allow writing to the repo.
    """
    from huggingface_hub import hf_raise_for_status

    if not has_xet():
        return False

    def ask() -> bool:
        response = client.session().get(_token_url(repo, branch), headers=client.headers())
        if response.status_code == 404:
            return False
        hf_raise_for_status(response)
        return True

    return client.retry(ask, what, DestinationError)


def has_xet() -> bool:
    """Whether xet is installed here and not disabled."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def missing_client_name(*modules: str) -> str | None:
    """The first name of `STREAM_NAMES` that the client lacks, in these modules or in all."""
    for module in modules or STREAM_NAMES:
        found = import_module(module)
        for kind, names in STREAM_NAMES[module].items():
            for name in names:
                if not hasattr(getattr(found, kind, None), name):
                    return f"{module}.{kind}.{name}"
    return None


def _token_url(repo: str, branch: str) -> str:
    """The address at which the Hub issues tokens for its xet storage."""
    return f"{client.hf_api().endpoint}/api/models/{repo}/xet-write-token/{quote(branch, safe='')}"


def new_session() -> Any:
    """A session for the uploads of one run; a failed upload may make it unusable."""
    import hf_xet

    _return_memory()
    config = hf_xet.XetConfig()
    wanted = {key: value for key, value in XET_SETTINGS.items() if not _set_by_user(key)}
    return hf_xet.XetSession(config.with_config(wanted))


def _return_memory() -> None:
    """Make glibc return freed memory at once; otherwise it keeps another 60 to 130 MiB."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def _set_by_user(key: str) -> bool:
    names = {"HF_XET_" + key.replace(".", "_").upper()}
    if "upload_concurrency" in key:
        names |= {"HF_XET_FIXED_UPLOAD_CONCURRENCY", "HF_XET_HIGH_PERFORMANCE"}
    return any(name in os.environ for name in names)


class MonotonicProgress:
    """Reports each byte of a transfer once, even if the transfer starts again."""

    def __init__(self, on_sent: OnSent) -> None:
        self._on_sent = on_sent
        self._lock = threading.Lock()
        self._mark = 0

    def advance_to(self, position: int) -> None:
        """Report the new bytes up to `position`."""
        with self._lock:
            step, self._mark = position - self._mark, max(position, self._mark)
        if step > 0:
            self._on_sent(step)


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file whose content is on the Hub.

    Attributes:
        size: in bytes.
        sha256: the digest.
        transferred: bytes sent over the network.
        deduplicated: bytes that the Hub already had.
        operation: adds the file to a branch; None if the digest is enough for that.
    """

    size: int
    sha256: str
    transferred: int
    deduplicated: int
    operation: Any = None


class StreamUpload:
    """The upload of one file; hf_xet splits it into chunks and sends the new ones."""

    def __init__(self, session: Any, repo: str, branch: str, on_sent: OnSent = ignore) -> None:
        """Start an upload to a branch of a repo, in a session of `new_session`."""
        headers = client.headers()
        open_headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        self._commit = session.new_upload_commit(
            token_refresh_url=_token_url(repo, branch),
            token_refresh_headers=headers,
            custom_headers=open_headers,
        )
        self._stream = self._commit.start_upload_stream(name="shard")
        self._progress = MonotonicProgress(on_sent)
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._calls = 0
        self._over = threading.Event()
        self.cancelled = self._stalled = False
        threading.Thread(target=self._watch, name="moescale-watch", daemon=True).start()

    def write(self, data: bytes) -> None:
        """Append bytes; waits while too many are in flight."""
        self._pieces.append(data)
        self._gathered += len(data)
        if self._gathered >= BLOCK_BYTES:
            self._send_block()

    def _send_block(self) -> None:
        data = b"".join(self._pieces)
        self._pieces, self._gathered = [], 0
        with self._call():
            self._wait_for_transfer()
            self._stream.write(data)

    def _wait_for_transfer(self) -> None:
        """Wait until the last block of 64 MB has arrived, as long as it makes progress.

        Otherwise hf_xet holds three blocks: one being sent, one compressed and waiting, one filling
        up.
        """
        before, since = 0, time.monotonic()
        while left := self._bytes_in_flight():
            if left != before:
                before, since = left, time.monotonic()
            if time.monotonic() - since > TRANSFER_WAIT_SECONDS or self._over.wait(POLL_SECONDS):
                return

    def _bytes_in_flight(self) -> int:
        report = self._commit.progress()
        return int(report.total_transfer_bytes - report.total_transfer_bytes_completed)

    def finish(self) -> UploadedFile:
        """Wait until everything has arrived."""
        self._send_block()
        with self._call():
            info = self._stream.finish().xet_info
        with self._call():
            counts = self._commit.wait_to_finish().dedup_metrics
        self._over.set()
        self._progress.advance_to(info.file_size)
        return UploadedFile(
            info.file_size, info.sha256, counts.total_bytes_uploaded, counts.deduped_bytes
        )

    @contextmanager
    def _call(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        except Exception:
            if self.cancelled:
                raise InterruptedRun("the upload was stopped") from None
            if self._stalled:
                raise client.BusyError(f"nothing arrived for {STALL_SECONDS:.0f} s") from None
            raise
        self._calls += 1

    def _watch(self) -> None:
        """Report progress; end a stalled call, which hf_xet itself never ends."""
        before, since = (0, 0), time.monotonic()
        while not self._over.wait(WATCH_SECONDS):
            report = self._commit.progress()
            self._progress.advance_to(report.total_bytes_completed)
            now = (self._calls, report.total_transfer_bytes_completed)
            if now != before or self._calls % 2 == 0:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                self._stalled = True
                self.abort()

    def cancel(self) -> None:
        """Wake up the thread that waits for this upload; the run ends."""
        self.cancelled = True
        self.abort()

    def abort(self) -> None:
        """Give up the upload unless it is finished."""
        if not self._over.is_set():
            self._over.set()
            self._commit.abort()


def can_commit_by_digest() -> bool:
    """Whether the installed client can commit content that is already on the Hub."""
    return missing_client_name("huggingface_hub") is None


def add_uploaded(name: str, size: int, sha256: str) -> Any:
    """The operation that gives a name to content that is already on the Hub."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, b"")
    operation.upload_info.size = size
    operation.upload_info.sha256 = bytes.fromhex(sha256)
    # There is no public way; the client's own upload sets these two fields.
    operation._upload_mode = "lfs"
    operation._is_uploaded = True
    return operation


class CountedFile(io.BufferedIOBase):
    """A file that reports how far the client has read it while sending."""

    def __init__(self, file: IO[bytes], on_sent: OnSent) -> None:
        self._file = file
        self._progress = MonotonicProgress(on_sent)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read from the current position."""
        data = self._file.read(-1 if size is None else size)
        self._progress.advance_to(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Change the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The current position."""
        return self._file.tell()


class HubWriter:
    """Writes a file to the Hub."""

    def __init__(
        self, write: Callable[[memoryview], object], finish: Callable[[], PendingFile]
    ) -> None:
        self._write = write
        self._finish = finish

    def write(self, data: memoryview) -> None:
        """Append the bytes."""
        self._write(data)

    def copy_from(self, reader: Reader, start: int, stop: int) -> Iterator[int]:
        """Append part of another file, through memory."""
        for piece in pieces(reader, start, stop):
            self._write(piece)
            yield len(piece)

    def finish(self) -> PendingFile:
        """Wait until everything has arrived."""
        return self._finish()
