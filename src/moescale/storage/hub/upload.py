"""Uploads to the Hub's xet storage as a stream: chunked, deduplicated, never whole anywhere."""

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
from moescale.storage.base import Arrived, Made, no_progress
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
"""What a stream needs and no documentation promises: module, class, attributes. Where a client
lacks one of them, shards go through a temporary file, by the public API alone."""

LIMITS = {
    "client.ac_max_upload_concurrency": 1,
    "client.ac_initial_upload_concurrency": 1,
    "data.session_xorb_metadata_flush_max_count": 1,
    "data.session_xorb_metadata_flush_interval": "5s",
}
"""One block of 64 MB on its way at a time and upload, and what has arrived is noted at once, so
that a rerun does not send it again. A user's own ``HF_XET_*`` settings win."""

BLOCK_BYTES = 2 << 20
"""What hf_xet is given at once. It cuts a block into chunks of about 64 kB, keeps new ones as
slices of the block, and copies the chunk that two blocks share: blocks of 256 kB were half as much
memory again."""

POLL_SECONDS = 0.01
PATIENCE_SECONDS = 20.0
"""A block that has not moved for so long has failed, or waits; the next one tells which."""

_M_TRIM_THRESHOLD = -1
WATCH_SECONDS = 0.5
STALL_SECONDS = 600.0
"""An upload in which nothing has happened for so long is given up."""


def can_stream(repo: str, branch: str, what: str) -> bool:
    """Whether xet is switched on here and on the server.

    Raises:
        DestinationError: the token may not write to the repo.
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

    return client.retried(ask, what, DestinationError)


def has_xet() -> bool:
    """Whether xet is installed and switched on here."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def lacking(*modules: str) -> str | None:
    """The first name that a stream needs and the client lacks, in these modules or all."""
    for module in modules or STREAM_NAMES:
        found = import_module(module)
        for kind, names in STREAM_NAMES[module].items():
            for name in names:
                if not hasattr(getattr(found, kind, None), name):
                    return f"{module}.{kind}.{name}"
    return None


def _token_url(repo: str, branch: str) -> str:
    """Where the Hub's API gives out tokens for its xet storage."""
    return f"{client.api().endpoint}/api/models/{repo}/xet-write-token/{quote(branch, safe='')}"


def new_session() -> Any:
    """A session for the uploads of one run; a failed upload may leave it of no more use."""
    import hf_xet

    _return_memory()
    config = hf_xet.XetConfig()
    wanted = {key: value for key, value in LIMITS.items() if not _set_by_user(key)}
    return hf_xet.XetSession(config.with_config(wanted))


def _return_memory() -> None:
    """Let glibc give freed blocks back at once; kept, they were another 60 to 130 MiB."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def _set_by_user(key: str) -> bool:
    names = {"HF_XET_" + key.replace(".", "_").upper()}
    if "upload_concurrency" in key:
        names |= {"HF_XET_FIXED_UPLOAD_CONCURRENCY", "HF_XET_HIGH_PERFORMANCE"}
    return any(name in os.environ for name in names)


class HighWater:
    """Tells how far something has come, once, although it may start again."""

    def __init__(self, arrived: Arrived) -> None:
        self._arrived = arrived
        self._lock = threading.Lock()
        self._mark = 0

    def reach(self, position: int) -> None:
        """Tell what is new up to `position`."""
        with self._lock:
            step, self._mark = position - self._mark, max(position, self._mark)
        if step > 0:
            self._arrived(step)


@dataclass(frozen=True, slots=True)
class Sent:
    """A file that has arrived: what it is, and how many of its bytes went over the line.

    `operation` brings it to a branch; without one its digest does.
    """

    size: int
    sha256: str
    transferred: int
    deduplicated: int
    operation: Any = None


class StreamUpload:
    """One file on its way; hf_xet splits it into chunks and sends those that are new."""

    def __init__(
        self, session: Any, repo: str, branch: str, arrived: Arrived = no_progress
    ) -> None:
        """`session` is of `new_session`; the file is for a branch of a repo."""
        headers = client.headers()
        open_headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        self._commit = session.new_upload_commit(
            token_refresh_url=_token_url(repo, branch),
            token_refresh_headers=headers,
            custom_headers=open_headers,
        )
        self._stream = self._commit.start_upload_stream(name="shard")
        self._arrived = HighWater(arrived)
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._calls = 0
        self._over = threading.Event()
        self.cancelled = self._stalled = False
        threading.Thread(target=self._watch, name="moescale-watch", daemon=True).start()

    def write(self, data: bytes) -> None:
        """Append bytes; waits while too many are on their way."""
        self._pieces.append(data)
        self._gathered += len(data)
        if self._gathered >= BLOCK_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        data = b"".join(self._pieces)
        self._pieces, self._gathered = [], 0
        with self._call():
            self._settle()
            self._stream.write(data)

    def _settle(self) -> None:
        """Wait until the last block of 64 MB has arrived, as long as it moves.

        Otherwise hf_xet holds three of them: one that is sent, one that waits for that, compressed,
        and one that grows.
        """
        before, since = 0, time.monotonic()
        while left := self._on_its_way():
            if left != before:
                before, since = left, time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS or self._over.wait(POLL_SECONDS):
                return

    def _on_its_way(self) -> int:
        report = self._commit.progress()
        return int(report.total_transfer_bytes - report.total_transfer_bytes_completed)

    def finish(self) -> Sent:
        """Wait until everything has arrived."""
        self._hand_over()
        with self._call():
            info = self._stream.finish().xet_info
        with self._call():
            counts = self._commit.wait_to_finish().dedup_metrics
        self._over.set()
        self._arrived.reach(info.file_size)
        return Sent(info.file_size, info.sha256, counts.total_bytes_uploaded, counts.deduped_bytes)

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
        """Say what has arrived; end a call in which nothing goes on, as hf_xet never would."""
        before, since = (0, 0), time.monotonic()
        while not self._over.wait(WATCH_SECONDS):
            report = self._commit.progress()
            self._arrived.reach(report.total_bytes_completed)
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
        """Give up what is not finished."""
        if not self._over.is_set():
            self._over.set()
            self._commit.abort()


def can_name_by_digest() -> bool:
    """Whether the installed client lets us say that contents are already on the Hub."""
    return lacking("huggingface_hub") is None


def uploaded(name: str, size: int, sha256: str) -> Any:
    """The operation that puts contents which are already on the Hub under a name."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, b"")
    operation.upload_info.size = size
    operation.upload_info.sha256 = bytes.fromhex(sha256)
    # The client has no public way to say so; these two fields are what its own upload sets.
    operation._upload_mode = "lfs"
    operation._is_uploaded = True
    return operation


class CountedFile(io.BufferedIOBase):
    """A file that tells how far the client has read it, while it sends it."""

    def __init__(self, file: IO[bytes], arrived: Arrived) -> None:
        self._file = file
        self._arrived = HighWater(arrived)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read on."""
        data = self._file.read(-1 if size is None else size)
        self._arrived.reach(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go elsewhere."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Where the file is."""
        return self._file.tell()


class HubWriter:
    """A file on its way to the Hub."""

    def __init__(self, write: Callable[[memoryview], object], finish: Callable[[], Made]) -> None:
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

    def finish(self) -> Made:
        """Wait until everything has arrived."""
        return self._finish()
