"""A loopback Hub for the real `huggingface_hub`, made with the standard library only.

    with Hub(tmp_path) as hub:
        commit = hub.add_repo("org/name", {"config.json": b"{}", "model.safetensors": path})
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        hub.fault("cdn", truncate(1000))        # the next answer of the CDN breaks off

Three servers on loopback stand for the Hub's hosts: `api` (127.0.0.1), `cdn` (localhost, where LFS
files come from) and `cas` (xet storage over HTTP, with `xet="http"` only).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from support import hub_writes  # noqa: F401  (registers its routes)
from support.hub_faults import (
    Action,
    Fault,
    FileSlice,
    Log,
    Match,
    Request,
    Response,
    json_response,
)
from support.hub_routes import Token, dispatch
from support.hub_storage import Uploads, serve_cas, serve_cdn
from support.hub_store import MAIN, PIECE, Blob, HubError, Repo, Sparse, Store, lfs_blob
from support.hub_xet import Cas

Content = bytes | Path | Sparse
OWNED = frozenset({"me", "org"})
NORMAL = Action()
UNIT = 64 << 10


class ResetConnection(Exception):  # noqa: N818
    """The connection must be reset now."""


class RequestBody:
    """The body of a request, read and counted piece by piece."""

    def __init__(self, handler: Handler, request: Request, limit: int | None) -> None:
        self._file = handler.rfile
        self._request = request
        self._limit = limit
        self._pieces = self._chunked() if self._is_chunked() else self._plain()

    def _is_chunked(self) -> bool:
        return "chunked" in self._request.headers.get("transfer-encoding", "")

    def _take(self, length: int) -> Iterator[bytes]:
        while length:
            room = None if self._limit is None else self._limit - self._request.received
            if room is not None and room <= 0:
                raise ResetConnection
            piece = self._file.read(min(x for x in (length, PIECE, room) if x is not None))
            if not piece:
                raise ConnectionError("the client left in the middle of its request")
            self._request.received += len(piece)
            length -= len(piece)
            yield piece

    def _plain(self) -> Iterator[bytes]:
        yield from self._take(int(self._request.headers.get("content-length", 0)))

    def _chunked(self) -> Iterator[bytes]:
        while length := int(self._file.readline().split(b";")[0] or b"0", 16):
            yield from self._take(length)
            self._file.readline()
        self._file.readline()

    def pieces(self) -> Iterator[bytes]:
        """Yield the unread pieces."""
        return self._pieces

    def read(self) -> bytes:
        """Read the rest."""
        return b"".join(self._pieces)

    def skip(self) -> None:
        """Read the rest and discard it."""
        for _ in self._pieces:
            pass


Serve = Callable[["Hub", Request, RequestBody], Response]


class Handler(BaseHTTPRequestHandler):
    """Reads the requests of one connection, and sends the answers of the Hub."""

    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"
    disable_nagle_algorithm = True
    server: Server

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.host, self.command, self.path, headers)
        fault = self.server.hub.log.add(request)
        action = fault.action if fault else NORMAL
        body = RequestBody(self, request, action.upload_cut)
        try:
            response = self._respond(request, body, action)
            self._deliver(request, response, fault, action)
        except ResetConnection:
            self._reset()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            if fault:
                fault.reached.set()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep the standard error clean."""

    def _respond(self, request: Request, body: RequestBody, action: Action) -> Response:
        if action.before and (early := action.before(request)) is not None:
            body.skip()
            return early
        try:
            response = self.server.serve(self.server.hub, request, body)
        except HubError as error:
            response = error_response(error, request.host)
        except (ConnectionError, ResetConnection):
            raise
        except Exception:
            self.server.hub.errors.append(f"{request}\n{traceback.format_exc()}")
            response = json_response({"error": "bug in the loopback Hub"}, 500)
        body.skip()
        return action.after(response) if action.after else response

    def _deliver(
        self, request: Request, response: Response, fault: Fault | None, action: Action
    ) -> None:
        if action.cut == -1:
            self._end(fault, action)
        request.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(response.length))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        if action.cut is not None and 0 <= action.cut < response.length:
            sent = self._send(request, response, 0, action.cut, action)
            self._end(fault, action)
        self._send(request, response, sent, response.length, action)

    def _end(self, fault: Fault | None, action: Action) -> None:
        """End the answer as the fault says; this returns only after a released stall."""
        if action.ending == "reset":
            raise ResetConnection
        if action.ending == "stall" and fault:
            fault.reached.set()
            self.server.hub.wait(fault)
            return
        raise ConnectionError("the fault ends the connection")

    def _send(
        self, request: Request, response: Response, start: int, end: int, action: Action
    ) -> int:
        at = start
        while at < end:
            length = min(end - at, UNIT if action.rate else PIECE)
            count = self._send_piece(response.body, at, length, action.corrupt)
            at += count
            request.sent += count
            if action.rate and self.server.hub.closing.wait(count / action.rate):
                raise ConnectionError("the Hub closes")
        return end

    def _send_piece(
        self, body: bytes | FileSlice, at: int, length: int, corrupt: int | None
    ) -> int:
        spoiled = corrupt is not None and at <= corrupt < at + length
        if isinstance(body, FileSlice):
            with body.path.open("rb") as file:
                if not spoiled:
                    count = os.sendfile(
                        self.connection.fileno(), file.fileno(), body.offset + at, length
                    )
                    if not count:
                        raise ConnectionError("the file is shorter than it was")
                    return count
                piece = os.pread(file.fileno(), length, body.offset + at)
        else:
            piece = body[at : at + length]
        if spoiled and corrupt is not None:
            where = corrupt - at
            piece = piece[:where] + bytes([piece[where] ^ 0xFF]) + piece[where + 1 :]
        self.connection.sendall(piece)
        return len(piece)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def error_response(error: HubError, host: str) -> Response:
    """Answer an error as the Hub does, or as an object store does."""
    headers = {"X-Request-Id": "Root=loopback"} | error.headers
    if host == "cdn":
        text = f'<?xml version="1.0"?><Error><Message>{error.message}</Message></Error>'
        return Response(error.status, headers | {"Content-Type": "application/xml"}, text.encode())
    headers["X-Error-Message"] = error.message
    if error.code:
        headers["X-Error-Code"] = error.code
    return json_response({"error": error.message}, error.status, **headers)


class Server(ThreadingHTTPServer):
    """One host of the Hub, in its own thread."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: Hub, host: str, serve: Serve) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.host, self.serve = hub, host, serve
        self._sockets: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=host)
        self._thread.start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection; `close` knows it while it lasts."""
        self._sockets.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self._sockets.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors, since a client may leave at any time."""

    def close(self) -> None:
        """Stop listening and end every connection."""
        self.shutdown()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        self._thread.join()


class Hub:
    """The loopback Hub.

    `xet` is True for a `local://` folder as xet storage, "http" for storage behind the `cas` host
    (counted, and open to faults), False for a server without one.
    LFS uploads larger than `part_size` come in parts. `page_size` is the page size of lists.
    `resolve_cache` redirects small files within the host, `gzip` compresses them, as the Hub does.
    """

    def __init__(
        self,
        root: Path,
        *,
        xet: bool | str = True,
        part_size: int = 8 << 20,
        page_size: int = 1000,
        resolve_cache: bool = True,
        gzip: bool = False,
        xet_lifetime: int = 3600,
    ) -> None:
        root = root.resolve()
        self.part_size, self.page_size, self.xet_lifetime = part_size, page_size, xet_lifetime
        self.resolve_cache, self.gzip, self.xet = resolve_cache, gzip, bool(xet)
        self.log = Log()
        self.errors: list[str] = []
        self.closing = threading.Event()
        self.cas = Cas(root / "cas", xet == "http") if xet else None
        self.store = Store(root / "contents", self.cas.restore if self.cas else None)
        self.uploads = Uploads(self)
        self.tokens: dict[str, Token] = {}
        self.token = self.add_token("hf_loopbackwrite", role="write")
        self.read_token = self.add_token("hf_loopbackread", role="read")
        self._servers = [
            Server(self, "api", lambda hub, request, body: dispatch(hub, request, body.read())),
            Server(self, "cdn", serve_cdn),
        ]
        if xet == "http":
            self._servers.append(Server(self, "cas", serve_cas))
        ports = {server.host: server.server_port for server in self._servers}
        self.endpoint = f"http://127.0.0.1:{ports['api']}"
        self.cdn = f"http://localhost:{ports['cdn']}"
        self.cas_url = f"local://{root / 'cas'}"
        if xet == "http":
            self.cas_url = f"http://127.0.0.1:{ports['cas']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None and self.errors:
            raise AssertionError("\n".join(self.errors))

    def close(self) -> None:
        """End stalls, connections and servers."""
        self.closing.set()
        for fault in self.log.faults:
            fault.release()
        for server in self._servers:
            server.close()

    def wait(self, fault: Fault) -> None:
        """Hold a stalled answer until it is released; drop it if the Hub closes."""
        fault.released.wait()
        if self.closing.is_set():
            raise ConnectionError("the Hub closes")

    # What tests add and inspect

    def add_token(
        self, value: str, role: str = "write", namespaces: frozenset[str] | None = OWNED
    ) -> str:
        """Add a token of the user `me`, who may write under `namespaces` (None: everywhere)."""
        self.tokens[value] = Token(value, "me", role, namespaces)
        return value

    def expire(self, token: str | None = None) -> None:
        """Let a token expire."""
        self.tokens[token or self.token].expired = True

    def add_repo(
        self,
        name: str,
        files: Mapping[str, Content],
        *,
        private: bool = False,
        gated: bool = False,
        lfs: bool | None = None,
        kind: str = "model",
    ) -> str:
        """Add a repo with exactly these files and return its commit."""
        repo = Repo(kind, name, private, gated)
        repo.add_commit(MAIN, self._blobs(repo, files, lfs), "initial commit")
        self.store.repos[kind, name] = repo
        return repo.refs[MAIN]

    def _blobs(self, repo: Repo, files: Mapping[str, Content], lfs: bool | None) -> dict[str, Blob]:
        blobs = {path: self.store.blob(path, content, lfs) for path, content in files.items()}
        repo.objects.update({blob.sha256: blob for blob in blobs.values() if blob.lfs})
        return blobs

    def commit(
        self,
        name: str,
        files: Mapping[str, Content],
        delete: tuple[str, ...] = (),
        branch: str = "main",
        kind: str = "model",
    ) -> str:
        """Commit to a branch, created if missing, without the API, as another user would."""
        repo, ref = self.repo(name, kind), f"refs/heads/{branch}"
        with self.store.lock:
            head = repo.find(branch) or repo.resolve("main")
            kept = {path: blob for path, blob in head.tree.items() if path not in delete}
            tree = kept | self._blobs(repo, files, None)
            return repo.add_commit(ref, tree, "a rival's commit", parent=head.id).id

    def repo(self, name: str, kind: str = "model") -> Repo:
        """Find a repo, with its refs, commits and pull requests."""
        return self.store.repo(kind, name)

    def has(self, name: str, kind: str = "model") -> bool:
        """Say whether a repo exists."""
        return (kind, name) in self.store.repos

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, Blob]:
        """List the files of a revision, each with its `sha256` and `size`."""
        return dict(self.repo(name, kind).resolve(revision).tree)

    def path(self, name: str, path: str, revision: str = "main", kind: str = "model") -> Path:
        """Find the plain file with a content."""
        return self.store.path(self.files(name, revision, kind)[path].sha256)

    def read(self, name: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        """Read the content of a file."""
        return self.path(name, path, revision, kind).read_bytes()

    def branches(self, name: str, kind: str = "model") -> dict[str, str]:
        """List the branches of a repo with their commits."""
        start = "refs/heads/"
        refs = self.repo(name, kind).refs.items()
        return {ref.removeprefix(start): commit for ref, commit in refs if ref.startswith(start)}

    def url(self, kind: str, name: str) -> str:
        """The address of a repo."""
        return f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"

    def link(self, blob: Blob) -> str:
        """A signed address of a content on the CDN."""
        return self.uploads.link(blob.sha256)

    def expire_links(self) -> None:
        """Let all signed addresses on the CDN expire."""
        self.uploads.links.clear()

    def finished(self, repo: Repo, sha256: str, size: int) -> None:
        """Record that an LFS upload has arrived."""
        repo.objects[sha256] = lfs_blob(sha256, size)

    # Faults and the log

    @property
    def requests(self) -> list[Request]:
        """The requests so far."""
        return self.log.requests

    def fault(self, match: Match, action: Action, nth: int = 1, times: int | None = 1) -> Fault:
        """Apply an action to `times` requests (None: all), from the `nth` match on.

        A match is a regex on `host path?query`, a method with such a regex, or a function.
        """
        return self.log.fault(match, action, nth, times)

    def find(self, match: Match) -> list[Request]:
        """List the logged requests that match."""
        return self.log.find(match)

    def traffic(self, match: Match = "") -> tuple[int, int]:
        """The body bytes that the Hub (received, sent) in the matching requests."""
        found = self.find(match)
        return sum(item.received for item in found), sum(item.sent for item in found)

    def leaks(self) -> list[Request]:
        """List the requests that carried a Hub token to another host."""
        return [
            request
            for request in list(self.requests)
            if request.host != "api"
            and any(token in f"{request.path} {request.headers}" for token in self.tokens)
        ]

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a child process that uses only this Hub."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and not name.upper().endswith("_PROXY")
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
