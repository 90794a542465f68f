"""The part of the Hub's API that makes changes: refs, uploads, commits, pull requests."""

from __future__ import annotations

import base64
import json
import time
from typing import TYPE_CHECKING

from support.hub_faults import Json, Response, json_response
from support.hub_routes import KIND, REPO, Call, card_problems, find_repo, listing, route
from support.hub_store import MAIN, HubError, Pull, Repo, is_lfs, lfs_blob, stamp

if TYPE_CHECKING:
    from support.hub_server import Hub

REGULAR_LIMIT = 10 << 20
CONFLICT = "A commit has happened since. Please refresh and try again."
READ_ONLY = "You don't have the required permissions to perform this action"

# Refs and history


@route("GET", REPO + "/refs")
def refs(call: Call) -> Response:
    """List branches, tags and, when asked for, pull requests."""
    groups: dict[str, list[Json]] = {"branches": [], "converts": [], "tags": []}
    if call.flag("include_prs"):
        groups["pullRequests"] = []
    places = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, commit in call.repo().refs.items():
        _, place, name = ref.split("/", 2)
        group = groups.get(places[place])
        if group is not None:
            group.append({"name": name, "ref": ref, "targetCommit": commit})
    return json_response(groups)


@route("GET", REPO + "/commits/(?P<rev>[^/]+)")
def commits(call: Call) -> Response:
    """List the commits of a revision."""
    return listing(
        call,
        [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": stamp(commit.date),
            }
            for commit in call.repo().history(call.args["rev"])
        ],
        call.hub.page_size,
    )


@route("POST", REPO + "/branch/(?P<name>[^/]+)")
def create_branch(call: Call) -> Response:
    """Create a branch."""
    repo, name = call.repo(write=True), call.args["name"]
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {name}")
    if f"refs/heads/{name}" in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[f"refs/heads/{name}"] = repo.resolve(call.json().get("startingPoint", "main")).id
    return json_response({"success": True})


@route("DELETE", REPO + "/branch/(?P<name>[^/]+)")
def delete_branch(call: Call) -> Response:
    """Delete a branch other than main."""
    repo, ref = call.repo(write=True), f"refs/heads/{call.args['name']}"
    if ref == MAIN:
        raise HubError(403, "Cannot delete the main branch")
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, "Reference does not exist")
    return json_response({"success": True})


@route("POST", REPO + "/tag/(?P<rev>[^/]+)")
def create_tag(call: Call) -> Response:
    """Tag a commit."""
    repo, ref = call.repo(write=True), f"refs/tags/{call.json()['tag']}"
    if ref in repo.refs:
        raise HubError(409, "Tag reference already exists")
    repo.refs[ref] = repo.resolve(call.args["rev"]).id
    return json_response({"success": True})


@route("DELETE", REPO + "/tag/(?P<name>[^/]+)")
def delete_tag(call: Call) -> Response:
    """Delete a tag."""
    if call.repo(write=True).refs.pop(f"refs/tags/{call.args['name']}", None) is None:
        raise HubError(404, "Tag not found", "RevisionNotFound")
    return json_response({"success": True})


@route("POST", REPO + "/super-squash/(?P<rev>[^/]+)")
def super_squash(call: Call) -> Response:
    """Replace the history of a branch by one commit with its tree."""
    repo = call.repo(write=True)
    ref = repo.ref(call.args["rev"])
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(404, "Invalid rev id", "RevisionNotFound")
    message = call.json().get("message", "Super-squash")
    commit = repo.add_commit(ref, repo.resolve(ref).tree, message, author=call.user)
    return json_response({"commitId": commit.id})


# Uploads and commits


@route("POST", REPO + "/preupload/(?P<rev>[^/]+)")
def preupload(call: Call) -> Response:
    """Decide which files go to LFS and say which are already there."""
    commit = call.repo(write=not call.flag("create_pr")).resolve(call.args["rev"])
    files = []
    for item in call.json()["files"]:
        mode = "lfs" if is_lfs(item["path"], item["size"]) else "regular"
        known = commit.tree.get(item["path"])
        extra = {"oid": known.etag} if known else {}
        files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False} | extra)
    return json_response({"commitOid": commit.id, "files": files})


@route("POST", KIND + r"\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Response:
    """Tell the client how to upload each object that is missing."""
    repo, wanted = call.repo(write=True), call.json()
    transfers = wanted.get("transfers", ["basic"])
    chosen = next(
        (
            name
            for name in ("xet", "multipart", "basic")
            if name in transfers and (name != "xet" or call.hub.xet)
        ),
        "basic",
    )
    objects = []
    for item in wanted["objects"]:
        oid, size = item["oid"], item["size"]
        if call.hub.store.known(repo, oid, size):
            objects.append({"oid": oid, "size": size})
            continue
        upload = call.hub.uploads.open(repo, oid, size, chosen)
        verify = {"href": f"{call.hub.url(repo.kind, repo.id)}.git/info/lfs/verify"}
        objects.append(
            {
                "oid": oid,
                "size": size,
                "authenticated": True,
                "actions": {"upload": upload, "verify": verify},
            }
        )
    return json_response({"transfer": chosen, "objects": objects})


@route("POST", KIND + r"\.git/info/lfs/verify")
def lfs_verify(call: Call) -> Response:
    """Check that an object has arrived."""
    wanted = call.json()
    if call.hub.store.known(call.repo(write=True), wanted["oid"], wanted["size"]) is None:
        raise HubError(404, "Object not found")
    return json_response({})


@route("POST", r"/api/complete-multipart/(?P<upload>\w+)")
def complete_multipart(call: Call) -> Response:
    """Join the parts of a multipart upload; the URL itself is the permission."""
    wanted = call.json()
    call.hub.uploads.complete(call.args["upload"], [part["etag"] for part in wanted["parts"]])
    return json_response({})


@route("POST", REPO + "/lfs-files/duplicate")
def duplicate_files(call: Call) -> Response:
    """Give another repo access to LFS objects of this one."""
    source, wanted = call.repo(read=True), call.json()
    goal = wanted["target"]
    target = find_repo(call, goal.get("type") or "model", goal["name"], write=True, read=False)
    done, failed = [], []
    for item in wanted["files"]:
        blob = source.objects.get(item["sha256"])
        if blob is None or not call.hub.xet or blob.xet_hash != item["xetHash"]:
            failed.append({"sha256": item["sha256"], "error": "File not found in source repo"})
        else:
            target.objects[blob.sha256] = blob
            done.append({"sha256": blob.sha256})
    return json_response({"success": done, "failed": failed})


@route("GET", REPO + "/xet-(?P<access>read|write)-token/(?P<rev>[^/]+)")
def xet_token(call: Call) -> Response:
    """Return a short-lived token for xet storage, and its address."""
    if not call.hub.xet:
        raise HubError(404, "Xet is not enabled for this repo")
    write = call.args["access"] == "write"
    repo = call.repo(write=write and not call.flag("create_pr"), read=True)
    if write and (call.token is None or call.token.role != "write"):
        raise HubError(403, READ_ONLY)
    if call.args["rev"] != "None":
        repo.resolve(call.args["rev"])
    data: Json = {
        "accessToken": "xet-" + call.args["access"],
        "casUrl": call.hub.cas_url,
        "exp": int(time.time()) + call.hub.xet_lifetime,
    }
    return json_response(
        data,
        X_Xet_Access_Token=data["accessToken"],
        X_Xet_Token_Expiration=data["exp"],
        X_Xet_Cas_Url=data["casUrl"],
    )


@route("POST", REPO + "/commit/(?P<rev>[^/]+)")
def commit(call: Call) -> Response:
    """Apply a commit to a branch, or to a new pull request."""
    create_pr = call.flag("create_pr")
    repo = call.repo(write=not create_pr)
    if call.token is None or call.token.role != "write":
        raise HubError(403, READ_ONLY)
    header, lines = read_commit(call.body)
    ref = call.hub.store.target(repo, call.args["rev"])
    base = repo.resolve(ref)
    expected = header.get("parentCommit")
    if expected and create_pr:
        base = repo.resolve(expected)
    elif expected and not base.id.startswith(expected):
        raise HubError(412, CONFLICT)
    learn_xet_objects(call.hub, repo, lines)
    new = call.hub.store.edited(repo, base.tree, lines)
    title, text = header["summary"], header.get("description", "")
    extra = {}
    if create_pr:
        pull = open_pull(repo, title, call.user, ref, base.id)
        ref = f"refs/pr/{pull.num}"
        url = f"{call.hub.url(repo.kind, repo.id)}/discussions/{pull.num}"
        extra = {"pullRequestUrl": url}
    made = repo.add_commit(ref, new, title, text, call.user, base.id)
    where = f"{call.hub.url(repo.kind, repo.id)}/commit/{made.id}"
    return json_response(
        {"success": True, "commitOid": made.id, "commitUrl": where, "hookOutput": ""} | extra
    )


def read_commit(body: bytes) -> tuple[Json, list[Json]]:
    """Read the header and operations of a commit; refuse a bad card or a big file."""
    header: Json = {}
    lines = []
    for text in body.splitlines():
        line = json.loads(text)
        if line["key"] == "header":
            header = line["value"]
            continue
        if line["key"] == "file":
            content = base64.b64decode(line["value"].pop("content"))
            if len(content) > REGULAR_LIMIT:
                raise HubError(413, f"{line['value']['path']} is too large for a regular file")
            if line["value"]["path"] == "README.md":
                errors, _ = card_problems(content.decode())
                if errors:
                    raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
            line["value"]["bytes"] = content
        lines.append(line)
    if not header.get("summary"):
        raise HubError(400, "a commit needs a header with a summary")
    return header, lines


def learn_xet_objects(hub: Hub, repo: Repo, lines: list[Json]) -> None:
    """Let a repo refer to files that reached xet storage."""
    for line in lines:
        if line["key"] != "lfsFile" or line["value"]["oid"] in repo.objects or hub.cas is None:
            continue
        if (file := hub.cas.file(line["value"]["oid"])) is not None:
            repo.objects[file.sha256] = lfs_blob(file.sha256, file.size, file.hash)


# Pull requests


def open_pull(repo: Repo, title: str, author: str, base: str, commit: str) -> Pull:
    """Open a pull request against a branch, starting from a commit."""
    pull = Pull(len(repo.pulls) + 1, title, author, base, commit)
    repo.pulls.append(pull)
    return pull


def pull_data(repo: Repo, pull: Pull) -> Json:
    """Describe a pull request or discussion."""
    return {
        "num": pull.num,
        "title": pull.title,
        "status": pull.status,
        "author": {"name": pull.author},
        "createdAt": stamp(repo.commits[pull.base_commit].date),
        "repo": {"name": repo.id, "type": repo.kind},
        "isPullRequest": pull.is_pull,
        "events": [],
        "changes": {"base": pull.base, "mergeCommitId": pull.merge_commit},
        "filesWithConflicts": [],
        "diff": "",
    }


@route("POST", REPO + "/discussions")
def create_discussion(call: Call) -> Response:
    """Open a pull request without changes, as a draft, or a discussion."""
    repo, wanted = call.repo(), call.json()
    if call.token is None or call.token.role != "write":
        raise HubError(403, READ_ONLY)
    pull = open_pull(repo, wanted["title"], call.user, MAIN, repo.refs[MAIN])
    pull.is_pull = bool(wanted.get("pullRequest"))
    if pull.is_pull:
        pull.status = "draft"
        repo.refs[f"refs/pr/{pull.num}"] = pull.base_commit
    return json_response(pull_data(repo, pull))


@route("GET", REPO + "/discussions")
def list_discussions(call: Call) -> Response:
    """List pull requests and discussions."""
    repo = call.repo()
    found = [pull_data(repo, pull) for pull in repo.pulls]
    return json_response({"count": len(found), "start": 0, "discussions": found})


def find_pull(repo: Repo, number: str) -> Pull:
    """Find a pull request by its number."""
    if not 0 < int(number) <= len(repo.pulls):
        raise HubError(404, "Discussion not found")
    return repo.pulls[int(number) - 1]


@route("GET", REPO + r"/discussions/(?P<num>\d+)")
def discussion(call: Call) -> Response:
    """Describe one pull request or discussion."""
    repo = call.repo()
    return json_response(pull_data(repo, find_pull(repo, call.args["num"])))


@route("POST", REPO + r"/discussions/(?P<num>\d+)/status")
def discussion_status(call: Call) -> Response:
    """Close or reopen a pull request."""
    pull = find_pull(call.repo(write=True), call.args["num"])
    pull.status = call.json()["status"]
    event = {
        "id": "0" * 24,
        "type": "status-change",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "author": {"name": pull.author},
        "data": {"status": pull.status},
    }
    return json_response({"newStatus": event})


@route("POST", REPO + r"/discussions/(?P<num>\d+)/merge")
def merge(call: Call) -> Response:
    """Merge a pull request: apply its changes since it was opened to its base."""
    repo = call.repo(write=True)
    pull = find_pull(repo, call.args["num"])
    before = repo.commits[pull.base_commit].tree
    after = repo.resolve(f"refs/pr/{pull.num}").tree
    head = repo.resolve(pull.base)
    kept = {path: blob for path, blob in head.tree.items() if path in after or path not in before}
    changed = {path: blob for path, blob in after.items() if before.get(path) != blob}
    made = repo.add_commit(pull.base, kept | changed, pull.title, author=call.user, parent=head.id)
    pull.status, pull.merge_commit = "merged", made.id
    return json_response({"mergeCommitId": made.id})
