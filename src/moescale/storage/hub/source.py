"""A repo on the Hub as a source: one commit, read in ranges, never stored on disk."""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moescale.checkpoint.gguf.names import is_beside, is_gguf, part_name, parts_of
from moescale.checkpoint.rewrite import Reader
from moescale.checkpoint.safetensors.header import LENGTH_BYTES
from moescale.errors import CheckpointError, RewriteError, SourceError, TemporaryError, bytes_text
from moescale.storage.base import SMALL_FILE_BYTES, FileInfo, SourceId, check_name
from moescale.storage.gguf_set import GgufSet
from moescale.storage.hub import client
from moescale.storage.hub.client import ATTEMPTS
from moescale.storage.location import HubRef
from moescale.storage.reader import FileReader

if TYPE_CHECKING:
    import httpx2

_HEAD = 32 << 10
"""How many bytes of a shard the first request asks for; most headers fit."""

_SHA256, _GIT_DIGEST = 64, 40
"""Lengths of the digests that the Hub states for large files, and for files in git."""

_LOG_IN = "Log in with `hf auth login` or set HF_TOKEN; the same command resumes."
_REFUSED = {
    401: ("the token is missing or expired", _LOG_IN),
    403: (
        "the token does not allow it",
        "Ask for access on the repo's page, or use a token that has it.",
    ),
    404: ("it no longer exists", None),
    416: ("it is shorter than it was", None),
}


class HubSource:
    """One commit of a model repo.

    A file is read from the Hub cache if that has it at this commit; with ``HF_HUB_OFFLINE`` the
    cache must have all files.
    """

    remote = True
    parallel_reads = 8
    links: Mapping[str, Path] = MappingProxyType({})

    def __init__(self, ref: HubRef) -> None:
        """Resolve the revision to a commit; all reads use that commit.

        Raises:
            SourceError: the repo or the revision does not exist or is not accessible.
            TemporaryError: the Hub cannot be reached.
        """
        from huggingface_hub import constants

        self._offline = constants.HF_HUB_OFFLINE
        ref, self._commit = _resolve(ref, self._offline)
        self._file, folder = (ref.folder, "") if is_gguf(ref.folder) else ("", ref.folder)
        self._repo, self._folder = ref.repo, f"{folder}/" if folder else ""
        named = HubRef(ref.repo, folder=folder)
        self._name = str(named)
        self.identity = SourceId(named.model_id, None, self._commit, ref.repo)
        self.received = 0
        self.remarks: list[str] = []
        self.gguf_set: GgufSet | None = None
        self._counting = threading.Lock()
        self._files: dict[str, FileInfo] | None = None
        self._stated: dict[str, str | None] = {}
        self._heads: dict[str, bytes] = {}
        self._planned: dict[str, tuple[int, bytes]] = {}
        self._access: client.Access | None = None  # of the machine that runs the command

    def __getstate__(self) -> dict[str, Any]:
        access = self._access or client.Access.here()
        return {**self.__dict__, "_counting": None, "_access": access}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _counting=threading.Lock(), received=0)

    def files(self) -> Mapping[str, FileInfo]:
        """All files of the commit.

        Raises:
            CheckpointError: a name leads out of the repo.
        """
        if self._files is None:
            self._files = {}
            for path, size, sha256, oid in self._list_files():
                name = path.removeprefix(self._folder)
                if name.startswith((".cache/", ".git/")) or not path.startswith(self._folder):
                    continue
                check_name(name, self._name)
                self._files[name] = FileInfo(name, size, sha256)
                self._stated[name] = sha256 or oid
            if self._folder and not self._files:
                raise SourceError(
                    f"{self._name}: the repo has no such folder, or the folder is empty",
                    hint="The repo's page lists its folders.",
                )
        return self._files

    def _list_files(self) -> Iterable[tuple[str, int, str | None, str | None]]:
        """Name, size, SHA-256 (large files), git's digest (small files)."""
        from huggingface_hub.hf_api import RepoFile

        if self._offline:
            return _cached_files(self._repo, self._folder, self._commit)

        def fetch() -> list[tuple[str, int, str | None, str | None]]:
            entries = client.hf_api().list_repo_tree(
                self._repo, recursive=True, revision=self._commit
            )
            return [
                (e.path, e.size, e.lfs.sha256 if e.lfs else None, e.blob_id)
                for e in entries
                if isinstance(e, RepoFile)
            ]

        return client.retry(fetch, self._name)

    def fingerprint(self, name: str) -> Any:
        """Size and digest; a commit does not change."""
        return [self.files()[name].size, self._stated[name]]

    def local_folder(self, names: Sequence[str]) -> Path:
        """Download the files into the Hub's cache, where all later reads find them.

        Raises:
            SourceError: the disk of the cache is too small.
            TemporaryError: the Hub does not answer.
        """
        from huggingface_hub import constants

        missing = sum(self.files()[name].size for name in names if self._cached(name) is None)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(cache).free) < missing:
            raise SourceError(
                f"{self._name}: measuring needs a download of {bytes_text(missing)}, but"
                f" {bytes_text(free)} are free in {cache}",
                hint="Free some space, or set HF_HOME to a folder on a larger disk.",
            )

        def fetch() -> Path:
            patterns = [glob.escape(self._folder + name) for name in names]
            root = client.hf_api().snapshot_download(
                self._repo, revision=self._commit, allow_patterns=patterns
            )
            return Path(root) / self._folder

        folder = client.retry(fetch, self._name)
        self.received += missing
        return folder

    def subset(self, names: Iterable[str]) -> HubSource:
        """The same commit limited to these files, with what is known of them."""
        part = copy(self)
        part._files = {name: self.files()[name] for name in names}
        part._stated = {name: self._stated[name] for name in part._files}
        part._planned = {n: v for n, v in self._planned.items() if n in part._files}
        part._heads, part.received = {}, 0
        return part

    def gguf(self, quant: str) -> HubSource:
        """The same commit limited to one GGUF model: the file that was given, or `quant`.

        Raises:
            SourceError: the repo has no such model.
        """
        models = [name for name in self.files() if is_gguf(name) and not is_beside(name)]
        first = self._file or _by_quant(models, quant)
        if first not in models:
            names = [name for name in models if part_name(name).number == 1]
            hint = f"It has {', '.join(names[:8])}." if names else "It has no GGUF model."
            raise SourceError(f"{self._name}: has no {self._file or quant}", hint=hint)
        names = parts_of(first, models)
        part, model = part_name(names[0]), self.subset(names)
        model.gguf_set = GgufSet(part.stem, part.stem.rpartition("/")[2], part.count)
        name = f"{self._repo}/{self._folder}{names[0]}"
        model.identity = SourceId(name, None, self._commit, self._repo)
        return model

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file was given."""
        return bool(self._file)

    def check_reachable(self) -> None:
        """Check that this machine can read the commit or, offline, that it has the files.

        Raises:
            SourceError: it cannot, or does not.
        """
        if self._access is not None:
            self._access.check_here(self._name, SourceError)
        if not self._offline:
            _commit(HubRef(self._repo, self._commit))
        for name in self.files() if self._offline else ():
            if self._cached(name) is None:
                raise self._not_cached(name)

    def _not_cached(self, name: str) -> SourceError:
        return SourceError(
            f"{self._name}: {name}: is not in the Hub cache, and HF_HUB_OFFLINE is set",
            hint="Unset HF_HUB_OFFLINE, or download the model first.",
        )

    def last_changed(self) -> int:
        """0, since a commit does not change."""
        return 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Part of a file, by default all of it; the whole of a large file is refused.

        A first read, for the length of a header, fetches more and keeps it for the second read,
        which wants the header.
        """
        total = self.files()[name].size
        if size is None:
            size = total - start
            if size > SMALL_FILE_BYTES:
                raise CheckpointError(f"{name}: {size} bytes are too many for this kind of file")
            return self._fetch(name, start, start + size)
        if start > LENGTH_BYTES:  # not a header
            return self._fetch(name, start, start + size)
        head, stop = self._heads.pop(name, b""), start + size
        if start == 0 and stop < _HEAD < total:
            self._heads[name] = head = self._fetch(name, 0, _HEAD)
        elif stop > len(head):
            head += self._fetch(name, len(head), stop)
        self._planned[name] = (stop, hashlib.sha256(memoryview(head)[:stop]).digest())
        return head[start:stop]

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        cached = self._cached(name)
        if cached is not None:
            with open(cached, "rb") as file:
                FileReader(file.fileno(), name).read_into(memoryview(buffer), start)
            return bytes(buffer)
        with self._hub_reader(name) as reader:
            reader.read_into(memoryview(buffer), start, stop)
            if stop - start == self.files()[name].size:
                reader.check_digest()
        return bytes(buffer)

    @contextmanager
    def open(self, name: str) -> Iterator[Reader]:
        """Open a file as a stream; at the end, compare its bytes with the Hub's digest."""
        cached = self._cached(name)
        if cached is not None:
            with open(cached, "rb") as file:
                yield FileReader(file.fileno(), name)
            return
        with self._hub_reader(name) as reader:
            yield reader
            reader.check_digest()

    @contextmanager
    def _hub_reader(self, name: str) -> Iterator[HubReader]:
        from huggingface_hub import hf_hub_url

        if self._offline:
            raise self._not_cached(name)
        url = hf_hub_url(
            self._repo,
            self._folder + name,
            revision=self._commit,
            endpoint=client.hf_api().endpoint,
        )
        info, planned = self.files()[name], self._planned.get(name, (0, b""))
        with closing(HubReader(url, info, self._stated[name], planned)) as reader:
            yield reader
        with self._counting:
            self.received += reader.received

    def _cached(self, name: str) -> str | None:
        """The path of the file in the Hub cache, if it is complete at this commit."""
        path = _cached_path(self._repo, self._folder + name, self._commit)
        return path if path and Path(path).stat().st_size == self.files()[name].size else None


def _by_quant(names: Iterable[str], quant: str) -> str:
    """The first file that ``llama-cli -hf org/name:QUANT`` would take; "" if there is none."""
    wanted = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
    firsts = (name for name in sorted(names) if part_name(name).number == 1)
    return next((name for name in firsts if wanted.search(name)), "")


def _resolve(ref: HubRef, offline: bool) -> tuple[HubRef, str]:
    """The first interpretation of a reference that exists, and its commit.

    Raises:
        SourceError: none exists; the error is that of the first.
    """
    error: SourceError | None = None
    for reading in ref.interpretations():
        try:
            return reading, _cached_commit(reading) if offline else _commit(reading)
        except SourceError as failed:
            error = error or failed
    assert error is not None
    raise error


def _commit(ref: HubRef) -> str:
    """The commit of a revision.

    Raises:
        SourceError: the repo or the revision does not exist or is not accessible.
    """
    info = client.retry(
        lambda: client.hf_api().model_info(ref.repo, revision=ref.revision),
        str(HubRef(ref.repo, ref.revision)),
    )
    if info.sha is None:
        raise SourceError(f"{ref}: the Hub does not name its commit")
    return info.sha


# The Hub cache ------------------------------------------------------------------------------


def _cached_path(repo: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    with client.translated_errors(repo):
        path = try_to_load_from_cache(repo, name, revision=revision)
    return path if isinstance(path, str) else None


def _cached_commit(ref: HubRef) -> str:
    """The commit that a revision had when the cache was filled.

    Raises:
        SourceError: the cache has no file of this revision.
    """
    config = f"{ref.folder}/config.json".lstrip("/")
    name = ref.folder if is_gguf(ref.folder) else config
    path = _cached_path(ref.repo, name, ref.revision)
    if path is None:
        raise SourceError(
            f"{ref}: is not in the Hub cache, and HF_HUB_OFFLINE is set",
            hint="Unset HF_HUB_OFFLINE, or download the model first.",
        )
    return Path(path).parents[name.count("/")].name


def _cached_files(
    repo: str, folder_in_repo: str, commit: str
) -> Iterator[tuple[str, int, str | None, str | None]]:
    """The files of the repo, from the cache's list of them, or else from the cached files.

    A cached file is a link to one that is named after its digest.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    config = f"{folder_in_repo}config.json"
    folder = Path(_cached_path(repo, config, commit) or "").parents[config.count("/")]
    try:
        sizes = {f.path: f.size for f in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        paths = (path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    for name, size in sizes.items():
        blob = (folder / name).resolve().name
        sha256, oid = (blob if len(blob) == digits else None for digits in (_SHA256, _GIT_DIGEST))
        yield name, size, sha256, oid


class HubReader:
    """Reads a file of the Hub forwards, as one stream that resumes where it breaks."""

    def __init__(
        self,
        url: str,
        info: FileInfo,
        stated: str | None = None,
        planned: tuple[int, bytes] = (0, b""),
    ) -> None:
        """Open no connection yet.

        Args:
            url: the address of the file.
            info: its name and size.
            stated: the digest that the Hub states.
            planned: length and SHA-256 of its first bytes, if they were read while planning.
        """
        self._url = url
        self._info = info
        self._stated = stated
        self._planned = planned
        self._context: Any = None
        self._pieces: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        self._position = 0
        self._failures = 0
        self._digested = 0
        self._header, self._digest = hashlib.sha256(), hashlib.sha256()
        if stated is not None and len(stated) == _GIT_DIGEST:
            self._digest = hashlib.sha1(b"blob %d\0" % info.size, usedforsecurity=False)
        self.received = 0

    def read_into(self, buffer: memoryview, offset: int, stop: int | None = None) -> None:
        """Fill the whole buffer from `offset` on; the stream may end at `stop`.

        Raises:
            SourceError: the file no longer exists, or is no longer accessible.
            TemporaryError: the Hub fails again and again.
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
            self._hash_and_check_header(buffer)

    def _hash_and_check_header(self, data: memoryview) -> None:
        self._digest.update(data)
        length, wanted = self._planned
        if self._digested < length:
            self._header.update(data[: length - self._digested])
            if self._digested + len(data) >= length and self._header.digest() != wanted:
                raise self._differs("its header differs from the planned one")
        self._digested += len(data)

    def _next_piece(self, stop: int | None) -> None:
        """Get more bytes, from the open stream or a new one."""
        import httpx2

        busy: client.BusyError | None = None
        try:
            problem = self._open(stop) if self._context is None else ""
            if not problem:
                self._rest = memoryview(next(self._pieces))
                self.received += len(self._rest)
                self._failures = 0
                return
        except StopIteration:
            problem = "it ended early"
        except client.BusyError as error:
            busy, problem = error, error.message.removeprefix(f"{self._info.name}: ")
        except (httpx2.HTTPError, OSError, RuntimeError) as error:
            problem = str(error) or type(error).__name__
        self.close()
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise TemporaryError(
                f"{self._info.name}: the download broke {ATTEMPTS} times at byte"
                f" {self._position}: {problem}",
                hint=client.RESUMES,
            )
        client.wait_before_retry(self._failures - 1, busy)

    def _open(self, stop: int | None) -> str:
        """Request the remaining bytes; returns what is wrong with the answer, if anything."""
        from huggingface_hub import constants

        first, last = self._position, (stop or self._info.size) - 1
        request = {
            **client.headers(),
            "accept-encoding": "identity",
            "range": f"bytes={first}-{last}",
        }
        timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with client.translated_errors(self._info.name):
            context = client.session().stream(
                "GET", self._url, headers=request, timeout=timeout, follow_redirects=True
            )
            response = context.__enter__()
        self._context = context
        self._pieces = response.iter_raw()  # unbuffered: a retry asks only for missing bytes
        return self._problem(response, first, last)

    def _problem(self, response: httpx2.Response, first: int, last: int) -> str:
        status, found = response.status_code, response.headers
        if status in _REFUSED and (page := client.gated_page(response)):
            name = self._info.name
            raise SourceError(
                f"{name}: the repo is gated ({status})", hint=client.accept_terms_hint(page)
            )
        if status in _REFUSED and not response.history:
            why, hint = _REFUSED[status]
            raise SourceError(f"{self._info.name}: {why} ({status})", hint=hint)
        if status == 206:
            wanted = f"bytes {first}-{last}/{self._info.size}"
            range_ = found.get("content-range")
            return "" if range_ == wanted else f"asked for {wanted}, got {range_}"
        if status != 200:  # for example a redirect to a storage address that has expired
            return f"the Hub's storage answered {status}"
        if first or found.get("content-length") != str(self._info.size):
            return "the server ignored the range, or sent another length"
        return ""

    def check_digest(self) -> None:
        """Compare the bytes with the digest that the Hub states.

        Raises:
            TemporaryError: the digest differs.
        """
        if self._digested != self._info.size:
            raise RewriteError(f"{self._info.name}: was not read to the end")
        if self._stated is not None and self._digest.hexdigest() != self._stated:
            raise self._differs("its digest differs")

    def _differs(self, why: str) -> TemporaryError:
        return TemporaryError(
            f"{self._info.name}: received other bytes than the Hub has: {why}",
            hint="Run the same command again; it downloads the file again.",
        )

    def close(self) -> None:
        """Close the stream."""
        context, self._context = self._context, None
        self._rest, self._pieces = memoryview(b""), iter(())
        if context is not None:
            context.__exit__(None, None, None)
