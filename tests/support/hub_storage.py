"""The hosts beside the Hub's API: the CDN with LFS uploads and downloads, and xet storage."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, urlsplit

from support.hub_faults import Request, Response
from support.hub_routes import file_response
from support.hub_store import PIECE, HubError, Repo, sha256_of

if TYPE_CHECKING:
    from support.hub_server import Hub

XORB = re.compile(r"/v1/xorbs/default/([0-9a-f]{64})")
CHUNK = re.compile(r"/v1/chunks/default/([0-9a-f]{64})")


class Body(Protocol):
    """The body of a request, read on demand."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the body piece by piece."""

    def read(self) -> bytes:
        """Read the whole body."""


@dataclass
class Upload:
    """An LFS upload that the Hub has announced."""

    repo: Repo
    sha256: str
    size: int
    parts: dict[int, tuple[str, Path]] = field(default_factory=dict)


class Uploads:
    """Signed addresses on the CDN, and the uploads behind them."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.links: set[str] = set()
        self.open_uploads: dict[str, Upload] = {}
        self._count = 0

    def link(self, path: str) -> str:
        """Sign an address on the CDN."""
        with self._hub.store.lock:
            self._count += 1
            signature = f"s{self._count}"
            self.links.add(signature)
        return f"{self._hub.cdn}/{path}?X-Amz-Expires=3600&X-Amz-Signature={signature}"

    def check(self, request: Request) -> None:
        """Refuse a request with an unsigned address, or with both a signature and a token."""
        if "authorization" in request.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        signature = parse_qs(urlsplit(request.path).query).get("X-Amz-Signature", [""])[0]
        if signature not in self.links:
            raise HubError(403, "Request has expired")

    def open(self, repo: Repo, sha256: str, size: int, transfer: str) -> dict[str, Any]:
        """Announce an upload; return its address and its parts."""
        if transfer == "xet":
            href = f"{self._hub.endpoint}/api/{repo.kind}s/{repo.id}/xet-write-token/main"
            return {
                "href": href,
                "header": {
                    "X-Xet-Cas-Url": self._hub.cas_url,
                    "X-Xet-Access-Token": "xet-write",
                    "X-Xet-Token-Expiration": str(int(time.time()) + self._hub.xet_lifetime),
                },
            }
        name = f"u{len(self.open_uploads) + 1}"
        self.open_uploads[name] = Upload(repo, sha256, size)
        step = self._hub.part_size
        if size <= step:
            return {"href": self.link(f"upload/{name}/0")}
        count = -(-size // step)
        parts = {str(part): self.link(f"upload/{name}/{part}") for part in range(1, count + 1)}
        href = f"{self._hub.endpoint}/api/complete-multipart/{name}"
        return {"href": href, "header": {"chunk_size": str(step)} | parts}

    def receive(self, name: str, part: int, body: Body) -> Response:
        """Receive a whole file or one part of it."""
        upload = self.open_uploads[name]
        path = self._hub.store.new_file()
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for piece in body.pieces():
                digest.update(piece)
                file.write(piece)
        etag = f'"{digest.hexdigest()[:32]}"'
        if part:
            upload.parts[part] = (etag, path)
        else:
            self._finish(upload, path)
        return Response(200, {"ETag": etag})

    def complete(self, name: str, etags: list[str]) -> None:
        """Join the parts of an upload."""
        upload = self.open_uploads[name]
        if etags != [upload.parts.get(part, ("",))[0] for part in range(1, len(etags) + 1)]:
            raise HubError(400, "One or more of the specified parts could not be found")
        path = self._hub.store.new_file()
        with path.open("wb") as joined:
            for _, (_, part) in sorted(upload.parts.items()):
                with part.open("rb") as file:
                    while piece := file.read(PIECE):
                        joined.write(piece)
        self._finish(upload, path)
        for _, part in upload.parts.values():
            part.unlink()

    def _finish(self, upload: Upload, path: Path) -> None:
        if sha256_of(path) != upload.sha256 or path.stat().st_size != upload.size:
            path.unlink()
            raise HubError(400, "The content does not match the announced SHA-256")
        self._hub.store.keep(path, upload.sha256)
        self._hub.finished(upload.repo, upload.sha256, upload.size)


def serve_cdn(hub: Hub, request: Request, body: Body) -> Response:
    """Serve LFS contents and receive LFS uploads, at signed addresses only."""
    hub.uploads.check(request)
    steps = urlsplit(request.path).path.strip("/").split("/")
    if request.method == "PUT" and steps[0] == "upload":
        return hub.uploads.receive(steps[1], int(steps[2]), body)
    if request.method in ("GET", "HEAD"):
        size = hub.store.path(steps[0]).stat().st_size
        return file_response(hub, request, steps[0], size, {"ETag": f'"{steps[0]}"'})
    raise HubError(405, "The specified method is not allowed against this resource")


def serve_cas(hub: Hub, request: Request, body: Body) -> Response:
    """Speak the part of the xet storage protocol that uploads need."""
    if not request.headers.get("authorization", "").startswith("Bearer xet-"):
        raise HubError(401, "Unauthorized")
    if hub.cas is None:
        raise HubError(404, "Not found")
    path = urlsplit(request.path).path
    if request.method == "GET" and (found := CHUNK.fullmatch(path)):
        return hub.cas.query(found[1])
    if request.method == "POST" and (found := XORB.fullmatch(path)):
        target = hub.store.new_file()
        with target.open("wb") as file:
            file.writelines(body.pieces())
        return hub.cas.add_xorb(found[1], target)
    if request.method == "POST" and path == "/v1/shards":
        return hub.cas.add_shard(body.read())
    raise HubError(404, f"Not found: {path}")
