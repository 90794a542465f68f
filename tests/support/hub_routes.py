"""The Hub's API: handlers of requests, on top of the store."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

from support.hub_faults import FileSlice, Json, Request, Response, json_response
from support.hub_store import Blob, Commit, HubError, Repo, pointer, stamp

if TYPE_CHECKING:
    from support.hub_server import Hub

LICENSE = re.compile(r"|\[.*\]|(['\"]?)[a-z0-9.\-]+\1")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
NO_RIGHTS = "You don't have the rights to create a model under the namespace"
BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Token:
    """A user's access token."""

    value: str
    user: str
    role: str = "write"
    namespaces: frozenset[str] | None = None
    expired: bool = False

    def owns(self, name: str) -> bool:
        """Say whether the user may write under the namespace of a repo."""
        return self.namespaces is None or name.split("/")[0] in self.namespaces


@dataclass
class Call:
    """A request on its way through the API."""

    hub: Hub
    request: Request
    body: bytes
    args: dict[str, str]
    query: dict[str, list[str]]
    token: Token | None

    def json(self) -> Json:
        """Read the body as JSON."""
        data: Json = json.loads(self.body or b"{}")
        return data

    @property
    def user(self) -> str:
        """The name of the user; an error if there is none."""
        if self.token is None:
            raise HubError(401, "Invalid username or password.")
        return self.token.user

    def flag(self, name: str) -> bool:
        """Read a query parameter as a switch."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def repo(self, write: bool = False, read: bool = False) -> Repo:
        """Find the repo of this call, and check the permissions of the token."""
        return find_repo(self, self.args["kind"], self.args["id"], write, read)


Handler = Callable[[Call], Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
RESOLVE_CACHE = r"/api/resolve-cache/(?P<kind>\w+)s/(?P<id>[^/]+/[^/]+)/(?P<rev>\w+)/(?P<path>.+)"
KIND = r"/(?P<prefix>datasets/|spaces/|)(?P<id>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a handler for methods and a pattern of paths."""

    def register(handler: Handler) -> Handler:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return register


def dispatch(hub: Hub, request: Request, body: bytes) -> Response:
    """Answer a request to the API host."""
    parts = urlsplit(request.path)
    for method, pattern, handler in ROUTES:
        if method == request.method and (found := pattern.fullmatch(parts.path)):
            args = {name: unquote(value or "") for name, value in found.groupdict().items()}
            if (prefix := args.pop("prefix", None)) is not None:
                args["kind"] = prefix.rstrip("s/") or "model"
            call = Call(hub, request, body, args, parse_qs(parts.query), None)
            call.token = authenticate(call)
            with hub.store.lock:
                return handler(call)
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {parts.path}")


def authenticate(call: Call) -> Token | None:
    """Find the token of a request; refuse a bad or expired one as the Hub does."""
    header = call.request.headers.get("authorization")
    if header is None:
        return None
    token = call.hub.tokens.get(header.removeprefix("Bearer "))
    if token is None:
        raise HubError(401, BAD_TOKEN)
    if token.expired:
        # On https the client turns a 401 from a repo's URL into RepositoryNotFoundError, but not on
        # http; this error code has the same effect.
        code = "RepoNotFound" if "kind" in call.args else None
        raise HubError(401, 'User Access Token "test" is expired', code)
    return token


def find_repo(call: Call, kind: str, name: str, write: bool, read: bool) -> Repo:
    """Find a repo; `read` is for contents (gated repos), `write` for changes."""
    repo = call.hub.store.repos.get((kind, name))
    token = call.token
    if repo is None or (repo.private and not (token and token.owns(name))):
        raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
    if read and repo.gated and not (token and token.owns(name)):
        raise HubError(403 if token else 401, f"Access to model {name} is restricted", "GatedRepo")
    if write:
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if token.role != "write" or not token.owns(name):
            raise HubError(403, "You don't have the required permissions to perform this action")
    return repo


def file_response(
    hub: Hub, request: Request, sha256: str, size: int, headers: dict[str, str]
) -> Response:
    """Serve a file, a range of it, or 416."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
    path = hub.store.path(sha256)
    found = RANGE.fullmatch(request.headers.get("range", ""))
    ignored = request.fault is not None and request.fault.action.ignore_range
    if not found or found.groups() == ("", "") or ignored:
        return Response(200, headers, FileSlice(path, 0, size))
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        return Response(416, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(206, headers, FileSlice(path, start, end - start))


# Who and what


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    """Say who the token belongs to."""
    if (token := call.token) is None:
        raise HubError(401, "Invalid username or password.")
    spaces = sorted((token.namespaces or {token.user}) - {token.user})
    return json_response(
        {
            "type": "user",
            "id": "0" * 24,
            "name": token.user,
            "fullname": token.user,
            "isPro": False,
            "canPay": False,
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in spaces],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": "test", "role": token.role},
            },
        }
    )


@route("GET", "/api/agent-harnesses")
def agent_harnesses(_: Call) -> Response:
    """List no harness."""
    return json_response({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    """Check the metadata of a model card."""
    errors, warnings = card_problems(call.json()["content"])
    return json_response(
        {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        },
        400 if errors else 200,
    )


def card_problems(content: str) -> tuple[list[str], list[str]]:
    """List what the Hub would reject in a card's metadata, without a YAML parser."""
    found = re.match(r"---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors, seen = [], set()
    for line in found[1].splitlines():
        if "\t" in line[: len(line) - len(line.lstrip())]:
            errors.append(f"Invalid YAML: tab in indentation: {line!r}")
        if not line.strip() or line[0] in " #-":
            continue
        key, colon, value = line.partition(":")
        if not colon or key in seen:
            errors.append(f"Invalid YAML: {line!r}")
        if key == "license" and not LICENSE.fullmatch(value.strip()):
            errors.append('"license" must be one of the known licenses')
        seen.add(key)
    return errors, []


@route("GET", REPO)
@route("GET", REPO + "/revision/(?P<rev>[^/]+)")
def repo_info(call: Call) -> Response:
    """Describe a repo at a revision."""
    repo = call.repo()
    commit = repo.resolve(call.args.get("rev", "main"))
    blobs = call.flag("blobs")
    info = {
        "_id": "0" * 24,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": stamp(next(iter(repo.commits.values())).date),
        "lastModified": stamp(commit.date),
        "usedStorage": used_storage(repo),
        "siblings": [sibling(path, blob, blobs) for path, blob in commit.tree.items()],
    }
    if call.flag("securityStatus"):
        info["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    if expand := call.query.get("expand"):
        info = {name: value for name, value in info.items() if name in {"_id", "id", *expand}}
    return json_response(info)


def used_storage(repo: Repo) -> int:
    """Sum the sizes of all LFS objects of a repo."""
    return sum(blob.size for blob in repo.objects.values())


def sibling(path: str, blob: Blob, blobs: bool) -> Json:
    """Describe a file inside a repo's description."""
    if not blobs:
        return {"rfilename": path}
    entry = {"rfilename": path, "size": blob.size, "blobId": blob.oid}
    if blob.lfs:
        size = len(pointer(blob.sha256, blob.size))
        entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": size}
    return entry


@route("GET", REPO + "/auth-check(?P<write>/write|)")
def auth_check(call: Call) -> Response:
    """Say whether the token may read or write a repo."""
    call.repo(write=bool(call.args["write"]), read=True)
    return json_response({"success": True})


@route("PUT", REPO + "/settings")
def settings(call: Call) -> Response:
    """Change a repo's visibility."""
    repo, wanted = call.repo(write=True), call.json()
    repo.private = wanted.get("private", wanted.get("visibility", "public") == "private")
    return json_response({"private": repo.private})


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Response:
    """Create a repo with the Hub's initial commit."""
    wanted = call.json()
    if call.token is None:
        raise HubError(401, "Invalid username or password.")
    kind = wanted.get("type") or "model"
    name = f"{wanted.get('organization') or call.token.user}/{wanted['name']}"
    if call.token.role != "write" or not call.token.owns(name):
        raise HubError(403, f'{NO_RIGHTS} "{name.split("/")[0]}"')
    url = call.hub.url(kind, name)
    if (kind, name) in call.hub.store.repos:
        return json_response(
            {"error": f"You already created this {kind} repo: {name}", "url": url}, 409
        )
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    call.hub.store.create(kind, name, private, call.token.user)
    return json_response({"url": url, "name": name, "id": name, "private": private})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Response:
    """Delete a repo."""
    wanted = call.json()
    owner = wanted.get("organization") or (call.token.user if call.token else "")
    kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
    find_repo(call, kind, name, write=True, read=False)
    del call.hub.store.repos[kind, name]
    return json_response({})


# Files


def entry(path: str, blob: Blob, xet: bool) -> Json:
    """Describe a file inside a tree."""
    data = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        size = len(pointer(blob.sha256, blob.size))
        data["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
        if xet:
            data["xetHash"] = blob.xet_hash
    return data


def folder(path: str) -> Json:
    """Describe a folder inside a tree."""
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


def with_commit(entries: list[Json], commit: Commit) -> list[Json]:
    """Add what `expand` asks for."""
    last = {"id": commit.id, "title": commit.title, "date": stamp(commit.date)}
    return [item | {"lastCommit": last} for item in entries]


def listing(call: Call, items: list[Json], size: int) -> Response:
    """Answer one page of a list and link to the next."""
    start = int(call.query.get("cursor", ["0"])[0])
    response = json_response(items[start : start + size])
    if start + size < len(items):
        base, _, query = call.request.path.partition("?")
        kept = [part for part in query.split("&") if part and not part.startswith("cursor=")]
        query = "&".join([*kept, f"cursor={start + size}"])
        response.headers["Link"] = f'<{call.hub.endpoint}{base}?{query}>; rel="next"'
    return response


@route("GET", REPO + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
def tree(call: Call) -> Response:
    """List the files and folders of a revision."""
    commit = call.repo().resolve(call.args["rev"])
    inside = call.args["path"].rstrip("/") + "/" if call.args["path"] else ""
    files = {path: blob for path, blob in commit.tree.items() if path.startswith(inside)}
    if inside and not files:
        raise HubError(404, f'"{inside}" does not exist', "EntryNotFound")
    found: dict[str, Json] = {}
    for path, blob in files.items():
        steps = path[len(inside) :].split("/")
        for depth in range(1, len(steps) if call.flag("recursive") else min(len(steps), 2)):
            parent = inside + "/".join(steps[:depth])
            found.setdefault(parent, folder(parent))
        if call.flag("recursive") or len(steps) == 1:
            found[path] = entry(path, blob, call.hub.xet)
    entries = list(found.values())
    expand = call.flag("expand")
    size = min(call.hub.page_size, 50) if expand else call.hub.page_size
    return listing(call, with_commit(entries, commit) if expand else entries, size)


@route("POST", REPO + "/paths-info/(?P<rev>[^/]+)")
def paths_info(call: Call) -> Response:
    """Describe the paths that exist among those asked for."""
    commit = call.repo().resolve(call.args["rev"])
    wanted = parse_qs(call.body.decode())
    paths = wanted.get("paths", [])
    if len(paths) > 1000:
        raise HubError(413, "too many parameters")
    entries = []
    for path in paths:
        if path in commit.tree:
            entries.append(entry(path, commit.tree[path], call.hub.xet))
        elif any(name.startswith(path.rstrip("/") + "/") for name in commit.tree):
            entries.append(folder(path))
    expand = wanted.get("expand", ["false"])[0].lower() == "true"
    return json_response(with_commit(entries, commit) if expand else entries)


@route("GET HEAD", KIND + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(call: Call) -> Response:
    """Serve a small file, or send the client to the CDN for an LFS file."""
    repo = call.repo(read=True)
    commit = repo.resolve(call.args["rev"])
    headers = {"X-Repo-Commit": commit.id}
    if (blob := commit.tree.get(call.args["path"])) is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    if blob.lfs:
        headers |= {
            "X-Linked-Size": str(blob.size),
            "X-Linked-ETag": f'"{blob.sha256}"',
            "Accept-Ranges": "bytes",
            "Location": call.hub.link(blob),
        }
        return Response(302, headers, b"Found. Redirecting to the CDN")
    headers["ETag"] = f'"{blob.oid}"'
    if call.hub.resolve_cache:
        path = quote(call.args["path"])
        where = f"/api/resolve-cache/{repo.kind}s/{repo.id}/{commit.id}/{path}"
        return Response(307, headers | {"Location": where}, b"Temporary Redirect")
    return small_file(call, blob, headers)


@route("GET HEAD", RESOLVE_CACHE)
def resolve_cache(call: Call) -> Response:
    """Serve a small file from where `resolve` sends the client."""
    commit = call.repo(read=True).resolve(call.args["rev"])
    blob = commit.tree[call.args["path"]]
    return small_file(call, blob, {"X-Repo-Commit": commit.id, "ETag": f'"{blob.oid}"'})


def small_file(call: Call, blob: Blob, headers: dict[str, str]) -> Response:
    """Serve a file that git keeps; compressed, and then whole, if the Hub is set to do so."""
    if call.hub.gzip and "gzip" in call.request.headers.get("accept-encoding", ""):
        content = gzip.compress(call.hub.store.path(blob.sha256).read_bytes(), mtime=0)
        return Response(200, headers | {"Content-Encoding": "gzip"}, content)
    return file_response(call.hub, call.request, blob.sha256, blob.size, headers)
