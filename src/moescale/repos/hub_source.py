"""A repo on the Hub as a source: pinned to one commit, read by ranges, never stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescale.checkpoint.rewrite import PIECE, Reader
from moescale.errors import CheckpointError, RewriteError, SourceError, TemporaryError
from moescale.repos import hub
from moescale.repos.base import SMALL_FILE_BYTES, FileInfo, SourceId, check_name
from moescale.repos.hub import ATTEMPTS, TRANSIENT_STATUS, HubPlace
from moescale.repos.local import LocalReader, LocalSource

if TYPE_CHECKING:
    import httpx2

_HEAD = 32 << 10
"""Bytes of a shard that are asked for first; most headers are in them."""


def open_hub_source(place: HubPlace) -> HubSource | LocalSource:
    """The repo on the Hub; with ``HF_HUB_OFFLINE`` the snapshot of it in the cache.

    Raises:
        SourceError: there is no such repo or revision, or it is not in the cache.
    """
    from huggingface_hub import constants

    return cached_snapshot(place) if constants.HF_HUB_OFFLINE else HubSource(place)


def cached_snapshot(place: HubPlace) -> LocalSource:
    """What the Hub cache has of a repo, without asking the Hub.

    Raises:
        SourceError: nothing of this revision is in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(place.repo, revision=place.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{place}: is not in the Hub cache, and HF_HUB_OFFLINE is set",
            hint="Unset HF_HUB_OFFLINE, or download the model first.",
        ) from None
    commit = Path(folder).name
    return LocalSource(Path(folder), SourceId("hub", place.repo, commit, place.repo))


class HubSource:
    """One commit of a model repo."""

    def __init__(self, place: HubPlace) -> None:
        """Resolve the revision to a commit; everything is read at that commit.

        Raises:
            SourceError: there is no such repo or revision, or no access to it.
            TemporaryError: the Hub cannot be reached.
        """
        info = hub.retried(
            lambda: hub.api().model_info(place.repo, revision=place.revision, timeout=30.0),
            str(place),
        )
        if info.sha is None:
            raise SourceError(f"{place}: the Hub does not say at which commit it is")
        self.identity = SourceId("hub", place.repo, info.sha, place.repo)
        self._commit = info.sha
        self._files: dict[str, FileInfo] | None = None
        self._states: dict[str, Any] = {}
        self._heads: dict[str, bytes] = {}

    def files(self) -> Mapping[str, FileInfo]:
        """All files of the commit.

        Raises:
            CheckpointError: a name leads out of the repo.
        """
        if self._files is None:
            from huggingface_hub.hf_api import RepoFolder

            entries = hub.retried(
                lambda: list(
                    hub.api().list_repo_tree(
                        self.identity.id, recursive=True, revision=self._commit
                    )
                ),
                self.identity.id,
            )
            self._files = {}
            for entry in entries:
                if isinstance(entry, RepoFolder) or entry.path.startswith((".cache/", ".git/")):
                    continue
                name = check_name(entry.path, self.identity.id)
                sha256 = entry.lfs.sha256 if entry.lfs else None
                self._files[name] = FileInfo(name, entry.size, sha256)
                self._states[name] = [entry.size, sha256 or entry.blob_id]
        return self._files

    def state(self, name: str) -> Any:
        """Size and digest; a commit does not change."""
        self.files()
        return self._states[name]

    def newest_change(self) -> int:
        """A commit does not change."""
        return 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A stretch of one file; the whole file, if it is a small one, by default.

        The first bytes of a shard, asked for to learn the length of its header, are kept for
        the second call that asks for the header.
        """
        total = self.files()[name].size
        if size is None:
            size = total - start
            if size > SMALL_FILE_BYTES:
                raise CheckpointError(f"{name}: {size} bytes are too many for a file of this kind")
        if start == 0 and size < _HEAD < total:
            self._heads[name] = self._fetch(name, 0, _HEAD)
        head = self._heads.get(name, b"")
        if start + size > len(head):
            self._heads.pop(name, None)
            return head[start:] + self._fetch(name, max(start, len(head)), start + size)
        return head[start : start + size]

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        with self._reader(name) as reader:
            reader.read_into(memoryview(buffer), start, stop)
        return bytes(buffer)

    @contextmanager
    def open(self, name: str) -> Iterator[Reader]:
        """Open a file as a stream; at its end the bytes are compared with the Hub's SHA-256."""
        cached = self._cached(name)
        if cached is not None:
            with cached as reader:
                yield reader
            return
        with self._reader(name) as reader:
            yield reader
            reader.check()

    @contextmanager
    def _reader(self, name: str) -> Iterator[HubReader]:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.identity.id, name, revision=self._commit, endpoint=hub.api().endpoint)
        reader = HubReader(url, self.files()[name])
        with ExitStack() as stack:
            stack.callback(reader.close)
            yield reader

    @contextmanager
    def _open_cached(self, path: str, name: str) -> Iterator[LocalReader]:
        with open(path, "rb") as file:
            yield LocalReader(file.fileno(), name)

    def _cached(self, name: str) -> Any:
        """The file in the Hub cache at this commit, if it is there in its full size."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.identity.id, name, revision=self._commit)
        if not isinstance(path, str) or Path(path).stat().st_size != self.files()[name].size:
            return None
        return self._open_cached(path, name)


class HubReader:
    """A file of the Hub, read forwards as one stream that is taken up again where it breaks."""

    def __init__(self, url: str, info: FileInfo) -> None:
        self._url = url
        self._info = info
        self._response: httpx2.Response | None = None
        self._context: Any = None
        self._pieces: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        self._position = 0
        self._failures = 0
        self._digest = hashlib.sha256()
        self._digested = 0

    def read_into(self, buffer: memoryview, offset: int, stop: int | None = None) -> None:
        """Fill the whole buffer from `offset` on; `stop` is where the stream need not go on.

        Raises:
            SourceError: the file is gone, or may not be read any more.
            TemporaryError: the Hub does not answer as it should, again and again.
        """
        if offset != self._position:
            self.close()
            self._position = offset
        done = 0
        while done < len(buffer):
            if not self._rest:
                self._next_piece(stop)
                continue
            size = min(len(self._rest), len(buffer) - done)
            buffer[done : done + size] = self._rest[:size]
            self._rest = self._rest[size:]
            self._position += size
            done += size
        if offset == self._digested:
            self._digest.update(buffer)
            self._digested += len(buffer)

    def _next_piece(self, stop: int | None) -> None:
        """Get more bytes, on the stream that is open or on a new one."""
        import httpx2

        problem = ""
        try:
            if self._response is None:
                problem = self._open(stop)
            if not problem:
                self._rest = memoryview(next(self._pieces))
                self._failures = 0
                return
        except StopIteration:
            problem = "it ended early"
        except (httpx2.HTTPError, OSError) as error:
            problem = str(error) or type(error).__name__
        self.close()
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise TemporaryError(
                f"{self._info.name}: the download broke {ATTEMPTS} times at byte"
                f" {self._position}: {problem}",
                hint="Run the same command again; it resumes.",
            )
        hub.sleep(hub.wait_seconds(self._failures - 1, self._retry_after))

    _retry_after: str | None = None

    def _open(self, stop: int | None) -> str:
        """Ask for the bytes from here on; returns what is wrong with the answer, if anything."""
        from huggingface_hub import constants, get_session

        first, last = self._position, (stop or self._info.size) - 1
        request = {
            **hub.headers(),
            "accept-encoding": "identity",
            "range": f"bytes={first}-{last}",
        }
        timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self._context = get_session().stream("GET", self._url, headers=request, timeout=timeout)
        response = self._context.__enter__()
        self._response = response
        self._retry_after = response.headers.get("retry-after")
        status = response.status_code
        if status in (401, 403, 404, 416):
            self._refused(status)
        if status == 206:
            wanted = f"bytes {first}-{last}/{self._info.size}"
            if response.headers.get("content-range") != wanted:
                return f"asked for {wanted}, got {response.headers.get('content-range')}"
        elif status != 200:
            return f"the Hub answered {status}" + (
                "" if status in TRANSIENT_STATUS else ", which it should not"
            )
        elif first or response.headers.get("content-length") != str(self._info.size):
            return "the server ignored the range, or sent something else"
        self._pieces = response.iter_raw(PIECE)
        return ""

    def _refused(self, status: int) -> None:
        why = {401: "the token is missing or expired", 403: "the token does not allow it"}
        raise SourceError(
            f"{self._info.name}: {why.get(status, 'it is not there any more')} ({status})",
            hint="Log in with `hf auth login` or set HF_TOKEN; the same command resumes.",
        )

    def check(self) -> None:
        """Compare what was read with the SHA-256 that the Hub states.

        Raises:
            TemporaryError: other bytes arrived.
        """
        stated = self._info.sha256
        if self._digested != self._info.size:
            raise RewriteError(f"{self._info.name}: was not read to its end")
        if stated is not None and self._digest.hexdigest() != stated:
            raise TemporaryError(
                f"{self._info.name}: what arrived is not what the Hub has (its SHA-256 differs)",
                hint="Run the same command again; the file is fetched anew.",
            )

    def close(self) -> None:
        """Let go of the stream."""
        context, self._context, self._response = self._context, None, None
        self._rest, self._pieces = memoryview(b""), iter(())
        if context is not None:
            context.__exit__(None, None, None)
