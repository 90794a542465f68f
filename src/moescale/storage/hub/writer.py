"""Writes the large files of a Hub repo: streamed into xet, or through a temporary file.

Uploaded content is invisible until a commit of the destination names it. Any machine can upload,
with its own token.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from moescale.errors import DestinationError, RewriteError, bytes_text
from moescale.storage.base import FileRecord, OnSent, PendingFile, ignore
from moescale.storage.hub import client
from moescale.storage.hub.repo import HubRepo
from moescale.storage.hub.upload import (
    CountedFile,
    HubWriter,
    StreamUpload,
    UploadedFile,
    can_stream,
    has_xet,
    missing_client_name,
    new_session,
)
from moescale.storage.location import HubRef

SMALL_BYTES = 8 << 20
"""Files up to this size, other than weights, go into the last commit from memory."""

WEIGHTS = (".safetensors", ".gguf")

_ONE_ON_DISK = threading.Lock()


class HubWriters:
    """Opens writers for a branch of a model repo; pickled, it consists of names only."""

    steps = 2

    def __init__(
        self, ref: HubRef, branch: str, streams: bool, access: client.Access | None = None
    ) -> None:
        """Send no request yet.

        Args:
            ref: the repo.
            branch: the working branch.
            streams: whether the server takes streams.
            access: the access of the machine that commits; None on that machine.
        """
        self._ref = ref
        self._branch = branch
        self._streams = streams
        self._access = access
        self._repo = HubRepo(ref.repo, str(ref))
        self._starting = threading.Lock()
        self._session: Any = None
        self._uploads: set[StreamUpload] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        access = self._access or client.Access.here()
        return HubWriters, (self._ref, self._branch, self._streams, access)

    def check_reachable(self) -> None:
        """Check that this machine may write to the repo, if it exists.

        Raises:
            DestinationError: it may not, or the Hub is a different one.
        """
        if self._access is not None:
            self._access.check_here(str(self._ref), DestinationError)
        if self._repo.info() is not None:
            can_stream(self._ref.repo, "main", str(self._ref))

    def open(
        self, name: str, size: int, digest: bool = True, on_sent: OnSent = ignore
    ) -> AbstractContextManager[HubWriter]:
        """Open a writer for a file of `size` bytes; leaving without `finish` discards it."""
        if size <= SMALL_BYTES and not name.endswith(WEIGHTS):
            return self._in_memory(name, on_sent)
        streams = self._streams and has_xet() and missing_client_name() is None
        return (self._streamed if streams else self._through_temporary_file)(name, size, on_sent)

    @contextmanager
    def _in_memory(self, name: str, on_sent: OnSent) -> Iterator[HubWriter]:
        self._addition(name, io.BytesIO())  # fails now if the client refuses the name
        data, digest = io.BytesIO(), hashlib.sha256()

        def write(piece: memoryview) -> None:
            data.write(piece)
            digest.update(piece)

        def finish() -> PendingFile:
            content = data.getvalue()
            on_sent(len(content))
            return PendingFile(FileRecord(len(content), digest.hexdigest()), content)

        yield HubWriter(write, finish)

    @contextmanager
    def _streamed(self, name: str, size: int, on_sent: OnSent) -> Iterator[HubWriter]:
        what = f"{self._ref}: {name}"
        with client.translated_errors(what, DestinationError):
            upload = StreamUpload(self._new_session(), self._ref.repo, self._branch, on_sent)

        def write(data: memoryview) -> None:
            with client.translated_errors(what, DestinationError):
                upload.write(bytes(data))

        def finish() -> PendingFile:
            with client.translated_errors(what, DestinationError):
                sent = upload.finish()
            return PendingFile(FileRecord(sent.size, sent.sha256), sent)

        self._uploads.add(upload)
        try:
            yield HubWriter(write, finish)
        finally:
            self._uploads.discard(upload)
            upload.abort()

    def _new_session(self) -> Any:
        with self._starting:
            self._session = self._session or new_session()
        return self._session

    @contextmanager
    def _through_temporary_file(self, name: str, size: int, on_sent: OnSent) -> Iterator[HubWriter]:
        """Without xet: one file at a time, through an unnamed temporary file."""
        with _ONE_ON_DISK:
            folder = tempfile.gettempdir()
            if shutil.disk_usage(folder).free < size:
                raise RewriteError(
                    f"{name}: {folder} has less than {bytes_text(size)} of free space",
                    hint="Free some space, or set TMPDIR; the same command resumes.",
                )
            with tempfile.TemporaryFile() as file:
                content: Any = getattr(file, "file", file)  # Windows wraps it
                digest = hashlib.sha256()

                def write(data: memoryview) -> None:
                    file.write(data)
                    digest.update(data)

                def finish() -> PendingFile:
                    file.flush()
                    sha256 = digest.hexdigest()
                    operation = self._addition(name, content)  # reads all of it, for the digest
                    operation.path_or_fileobj = counted = CountedFile(content, on_sent)
                    sent = self._repo.upload(self._branch, operation)
                    if sent is None:
                        counted.seek(0)
                        return PendingFile(FileRecord(size, sha256), counted.read())
                    return PendingFile(
                        FileRecord(size, sha256), UploadedFile(size, sha256, size, 0, sent)
                    )

                yield HubWriter(write, finish)

    def _addition(self, name: str, content: Any) -> Any:
        from huggingface_hub import CommitOperationAdd

        with client.translated_errors(f"{self._ref}: {name}", DestinationError):
            return CommitOperationAdd(name, content)

    def cancel(self) -> None:
        """End the uploads for which threads may be waiting."""
        for upload in list(self._uploads):
            upload.cancel()
