"""Writes the large files of a Hub repo: streamed into xet, or through a temporary file.

Uploaded content is invisible until a commit of the destination names it. All of it can be done on
any machine, with that machine's own token.
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
from moescale.storage.base import Arrived, Made, Written, no_progress
from moescale.storage.hub import client
from moescale.storage.hub.repo import HubRepo
from moescale.storage.hub.upload import (
    CountedFile,
    HubWriter,
    Sent,
    StreamUpload,
    can_stream,
    has_xet,
    lacking,
    new_session,
)
from moescale.storage.location import HubRef

SMALL_BYTES = 8 << 20
"""Files up to this size that are no weights go into the last commit from memory."""

WEIGHTS = (".safetensors", ".gguf")

_ONE_ON_DISK = threading.Lock()


class HubWriters:
    """Opens writers for a branch of a model repo; what is sent of it are names."""

    steps = 2

    def __init__(
        self, place: HubRef, branch: str, streams: bool, access: client.Access | None = None
    ) -> None:
        """`branch` is the working branch; `access` is that of the machine that commits."""
        self._place = place
        self._branch = branch
        self._streams = streams
        self._access = access
        self._repo = HubRepo(place.repo, str(place))
        self._starting = threading.Lock()
        self._session: Any = None
        self._uploads: set[StreamUpload] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        access = self._access or client.Access.here()
        return HubWriters, (self._place, self._branch, self._streams, access)

    def check(self) -> None:
        """Look whether this machine may write to the repo, if that is there already.

        Raises:
            DestinationError: it may not, or it is another Hub.
        """
        if self._access is not None:
            self._access.check(str(self._place), DestinationError)
        if self._repo.info() is not None:
            can_stream(self._place.repo, "main", str(self._place))

    def open(
        self, name: str, size: int, digest: bool = True, arrived: Arrived = no_progress
    ) -> AbstractContextManager[HubWriter]:
        """A writer for a file of `size` bytes; leaving without `finish` discards it."""
        if size <= SMALL_BYTES and not name.endswith(WEIGHTS):
            return self._in_memory(name, arrived)
        streams = self._streams and has_xet() and lacking() is None
        return (self._streamed if streams else self._on_disk)(name, size, arrived)

    @contextmanager
    def _in_memory(self, name: str, arrived: Arrived) -> Iterator[HubWriter]:
        self._addition(name, io.BytesIO())  # a name that the Hub refuses is refused now
        data, digest = io.BytesIO(), hashlib.sha256()

        def write(piece: memoryview) -> None:
            data.write(piece)
            digest.update(piece)

        def finish() -> Made:
            content = data.getvalue()
            arrived(len(content))
            return Made(Written(len(content), digest.hexdigest()), content)

        yield HubWriter(write, finish)

    @contextmanager
    def _streamed(self, name: str, size: int, arrived: Arrived) -> Iterator[HubWriter]:
        what = f"{self._place}: {name}"
        with client.in_our_words(what, DestinationError):
            upload = StreamUpload(self._new_session(), self._place.repo, self._branch, arrived)

        def write(data: memoryview) -> None:
            with client.in_our_words(what, DestinationError):
                upload.write(bytes(data))

        def finish() -> Made:
            with client.in_our_words(what, DestinationError):
                sent = upload.finish()
            return Made(Written(sent.size, sent.sha256), sent)

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
    def _on_disk(self, name: str, size: int, arrived: Arrived) -> Iterator[HubWriter]:
        """Without xet: one file at a time through a temporary one, which has no name."""
        with _ONE_ON_DISK:
            folder = tempfile.gettempdir()
            if shutil.disk_usage(folder).free < size:
                raise RewriteError(
                    f"{name}: {folder} has no room for {bytes_text(size)}",
                    hint="Free some space, or set TMPDIR; the same command resumes.",
                )
            with tempfile.TemporaryFile() as file:
                content: Any = getattr(file, "file", file)  # Windows wraps it
                digest = hashlib.sha256()

                def write(data: memoryview) -> None:
                    file.write(data)
                    digest.update(data)

                def finish() -> Made:
                    file.flush()
                    sha256 = digest.hexdigest()
                    operation = self._addition(name, content)  # reads it all, for the digest
                    operation.path_or_fileobj = counted = CountedFile(content, arrived)
                    sent = self._repo.upload(self._branch, operation)
                    if sent is None:
                        counted.seek(0)
                        return Made(Written(size, sha256), counted.read())
                    return Made(Written(size, sha256), Sent(size, sha256, size, 0, sent))

                yield HubWriter(write, finish)

    def _addition(self, name: str, content: Any) -> Any:
        from huggingface_hub import CommitOperationAdd

        with client.in_our_words(f"{self._place}: {name}", DestinationError):
            return CommitOperationAdd(name, content)

    def cancel(self) -> None:
        """End the uploads that threads may be waiting in."""
        for upload in list(self._uploads):
            upload.cancel()
