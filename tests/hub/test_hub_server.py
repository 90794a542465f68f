"""The loopback Hub against the real `huggingface_hub`: reading, refusals, refs and commits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.hub_client import DST, FILES, SRC, WEIGHTS, Start, hubs, read_range
from support.hub_faults import run, status
from support.hub_store import Sparse


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a Hub with a source repo and an empty destination, and a client for it."""
    with hubs(tmp_path, monkeypatch) as starter:
        yield starter


def add(path: str, content: bytes) -> CommitOperationAdd:
    """Make an operation that adds a file."""
    return CommitOperationAdd(path, content)


# Reading


def test_a_repo_is_described(start: Start) -> None:
    """Info, tree, paths-info, refs and commits say what is in a repo."""
    hub, api = start()
    sha = hub.branches(SRC)["main"]
    assert api.whoami()["name"] == "me"
    info = api.model_info(SRC, files_metadata=True, securityStatus=True)
    assert (info.sha, info.private, info.gated) == (sha, False, False)
    sizes = {item.rfilename: item.size for item in info.siblings}
    assert sizes == {path: len(content) for path, content in FILES.items()}
    tree = {item.path: item for item in api.list_repo_tree(SRC, recursive=True)}
    assert set(tree) == {*FILES, "sub", "sub/deep"}
    lfs = tree["model.safetensors"].lfs
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert len(tree["model.safetensors"].xet_hash) == 64
    assert tree["config.json"].lfs is None
    assert [item.path for item in api.list_repo_tree(SRC)] == [
        "config.json",
        "model.safetensors",
        "sub",
    ]
    assert {item.path for item in api.list_repo_tree(SRC, "sub")} == {"sub/deep", "sub/vocab.txt"}
    found = api.get_paths_info(SRC, ["config.json", "sub", "missing"], expand=True)
    assert [item.path for item in found] == ["config.json", "sub"]
    assert found[0].last_commit.oid == sha
    assert [item.commit_id for item in api.list_repo_commits(SRC)] == [sha]
    assert api.model_info(SRC, expand=["sha"]).siblings is None


def test_every_form_of_a_revision_is_resolved(start: Start) -> None:
    """A branch, a tag, a full SHA and a pull request lead to their commits."""
    hub, api = start()
    first = hub.branches(DST)["main"]
    api.create_tag(DST, tag="v1")
    second = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=DST).oid
    api.create_branch(DST, branch="work/one", revision=first)
    pull = api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id=DST, create_pr=True)
    expected = {
        "main": second,
        "v1": first,
        "work/one": first,
        second: second,
        pull.pr_revision: pull.oid,
    }
    assert pull.pr_revision == "refs/pr/1"
    for revision, commit in expected.items():
        assert api.model_info(DST, revision=revision).sha == commit
    refs = api.list_repo_refs(DST, include_pull_requests=True)
    assert {item.name for item in refs.branches} == {"main", "work/one"}
    assert [item.ref for item in refs.tags + refs.pull_requests] == ["refs/tags/v1", "refs/pr/1"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info(DST, revision="nowhere")


def test_long_lists_come_in_pages(start: Start) -> None:
    """The client follows the links between the pages of a tree."""
    hub, api = start(page_size=2)
    assert set(api.list_repo_files(SRC)) == set(FILES)
    assert len(hub.find("/tree/")) == 3


@pytest.mark.parametrize("settings", [{}, {"resolve_cache": False}, {"gzip": True}])
def test_a_small_file_is_served_by_the_hub(start: Start, settings: dict) -> None:
    """A file that git keeps arrives whole, with or without a redirect and compression."""
    hub, api = start(**settings)
    url = hf_hub_url(SRC, "sub/deep/tokenizer.json", endpoint=hub.endpoint)
    seen = api.get_hf_file_metadata(url=url)
    assert seen.commit_hash == hub.branches(SRC)["main"]
    assert seen.etag == hub.files(SRC)["sub/deep/tokenizer.json"].oid
    assert seen.size == 200
    path = api.hf_hub_download(SRC, "sub/deep/tokenizer.json")
    assert Path(path).read_bytes() == FILES["sub/deep/tokenizer.json"]
    assert not hub.find("^cdn")


def test_an_lfs_file_comes_from_another_host_without_the_token(start: Start) -> None:
    """The redirect leads to the CDN, and the client drops the token on the way."""
    hub, api = start()
    url = hf_hub_url(SRC, "model.safetensors", endpoint=hub.endpoint)
    seen = api.get_hf_file_metadata(url=url)
    assert (seen.etag, seen.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert seen.location.startswith("http://localhost:")
    assert read_range(hub, "model.safetensors", "10-19") == (206, WEIGHTS[10:20])
    assert read_range(hub, "model.safetensors", "3145000-") == (206, WEIGHTS[3145000:])
    assert read_range(hub, "model.safetensors", "-7") == (206, WEIGHTS[-7:])
    assert read_range(hub, "model.safetensors", f"{len(WEIGHTS)}-")[0] == 416
    assert read_range(hub, "model.safetensors") == (200, WEIGHTS)
    first, *rest = hub.find("^cdn")
    assert "authorization" not in first.headers
    assert "authorization" in hub.find("resolve")[-1].headers
    assert sum(item.sent for item in rest[:2]) == len(WEIGHTS[3145000:]) + 7
    assert not hub.leaks()
    headers = {"Authorization": f"Bearer {hub.token}"}
    assert get_session().get(seen.location, headers=headers).status_code == 400
    assert len(hub.leaks()) == 1


def test_a_signed_address_expires(start: Start) -> None:
    """An expired address on the CDN is refused; resolving again gives a new one."""
    hub, api = start()
    url = hf_hub_url(SRC, "model.safetensors", endpoint=hub.endpoint)
    location = api.get_hf_file_metadata(url=url).location
    assert get_session().head(location).status_code == 200
    hub.expire_links()
    assert get_session().get(location).status_code == 403
    assert read_range(hub, "model.safetensors", "0-0") == (206, WEIGHTS[:1])


def test_a_huge_repo_costs_neither_disk_nor_time(start: Start, tmp_path: Path) -> None:
    """Files of many GB with made-up digests are listed and read by ranges."""
    hub, api = start()
    shards = {f"model-{number}.safetensors": Sparse(b"head", 40 << 30) for number in range(25)}
    hub.add_repo("lab/huge", shards)
    tree = list(api.list_repo_tree("lab/huge"))
    assert sum(item.size for item in tree) == 1000 << 30
    url = hf_hub_url("lab/huge", "model-7.safetensors", endpoint=hub.endpoint)
    headers = {"Range": "bytes=0-5"}
    assert get_session().get(url, headers=headers).content == b"head\0\0"
    assert hub.traffic()[1] < 20_000


# Refusals


def test_what_may_not_be_seen_is_refused_as_the_hub_does(start: Start) -> None:
    """Missing, private and gated repos and missing files raise the client's own errors."""
    hub, api = start()
    anyone = HfApi(endpoint=hub.endpoint, token=False)
    stranger = HfApi(
        endpoint=hub.endpoint, token=hub.add_token("hf_stranger", namespaces=frozenset({"you"}))
    )
    hub.add_repo("me/secret", FILES, private=True)
    hub.add_repo("me/gated", FILES, gated=True)
    for client, name, code in (
        (api, "me/nothing", 404),
        (anyone, "me/nothing", 401),
        (stranger, "me/secret", 404),
        (anyone, "me/secret", 401),
    ):
        with pytest.raises(RepositoryNotFoundError) as caught:
            client.model_info(name)
        assert caught.value.response.status_code == code
    assert api.model_info("me/secret").private
    assert stranger.model_info("me/gated").gated == "auto"
    for client in (stranger, anyone):
        with pytest.raises(GatedRepoError):
            client.auth_check("me/gated")
        with pytest.raises(GatedRepoError):
            client.hf_hub_download("me/gated", "config.json")
    api.auth_check("me/gated", write=True)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(SRC, "nothing.json")


def test_tokens_say_what_they_may_do(start: Start) -> None:
    """A read token and another user's namespace get 403; bad and expired tokens get 401."""
    hub, api = start()
    reader = HfApi(endpoint=hub.endpoint, token=hub.read_token)
    for action in (
        lambda: reader.auth_check(DST, write=True),
        lambda: reader.create_repo("me/new"),
        lambda: reader.create_commit(DST, [add("a.txt", b"1")], commit_message="x"),
        lambda: api.create_repo("lab/new"),
        lambda: api.create_commit(SRC, [add("a.txt", b"1")], commit_message="x"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            action()
        assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").model_info(SRC)
    hub.expire()
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.model_info(SRC)
    assert caught.value.response.status_code == 401


def test_bad_card_metadata_is_refused_before_and_at_the_commit(start: Start) -> None:
    """The validation names an error, warns of missing metadata, and the commit checks again."""
    hub, api = start()
    bad = b"---\nlicense: Not A License!\n---\n"
    with pytest.raises(ValueError, match="license"):
        api.create_commit(DST, [add("README.md", bad)], commit_message="x")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.create_commit(DST, [add("README.md", b"# Hello\n")], commit_message="x")
    hub.fault("validate-yaml", status(200, {"errors": [], "warnings": []}))
    with pytest.raises(HfHubHTTPError, match="Invalid metadata"):
        api.create_commit(DST, [add("README.md", bad)], commit_message="x")


# Repos, refs, commits


def test_repos_are_created_and_deleted(start: Start) -> None:
    """A new repo contains `.gitattributes`, is private on request, and cannot be created twice."""
    hub, api = start()
    url = api.create_repo("org/new", private=True)
    assert (url.repo_id, hub.repo("org/new").private) == ("org/new", True)
    assert set(hub.files("org/new")) == {".gitattributes"}
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("org/new")
    assert caught.value.response.status_code == 409
    assert api.create_repo("org/new", exist_ok=True).repo_id == "org/new"
    api.update_repo_settings("org/new", private=False)
    assert not hub.repo("org/new").private
    api.delete_repo("org/new")
    assert not hub.has("org/new")


def test_branches_and_tags_come_and_go(start: Start) -> None:
    """A second branch or tag of the same name is 409, a missing one is 404, main stays."""
    hub, api = start()
    api.create_branch(DST, branch="work")
    api.create_branch(DST, branch="work", exist_ok=True)
    api.create_tag(DST, tag="t", revision="work")
    for action, code in (
        (lambda: api.create_branch(DST, branch="work"), 409),
        (lambda: api.create_branch(DST, branch="refs/pr/9"), 400),
        (lambda: api.create_tag(DST, tag="t"), 409),
        (lambda: api.delete_branch(DST, branch="main"), 403),
        (lambda: api.delete_branch(DST, branch="none"), 404),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            action()
        assert caught.value.response.status_code == code
    api.delete_branch(DST, branch="work")
    api.delete_tag(DST, tag="t")
    assert set(hub.repo(DST).refs) == {"refs/heads/main"}


def test_a_commit_adds_replaces_and_deletes(start: Start) -> None:
    """All operations of a commit appear at once, deletions of files and folders too."""
    hub, api = start()
    names = ["keep.txt", "old.txt", "dir/a.txt", "dir/b.txt"]
    api.create_commit(DST, [add(name, b"1") for name in names], commit_message="one")
    made = api.create_commit(
        DST,
        [add("keep.txt", b"2"), CommitOperationDelete("old.txt"), CommitOperationDelete("dir/")],
        commit_message="two",
        commit_description="text",
    )
    assert made.oid == hub.branches(DST)["main"]
    assert set(hub.files(DST)) == {".gitattributes", "keep.txt"}
    assert hub.read(DST, "keep.txt") == b"2"
    titles = [item.title for item in api.list_repo_commits(DST)]
    assert titles == ["two", "one", "initial commit"]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit(DST, [CommitOperationDelete("none.txt")], commit_message="x")
    api.super_squash_history(DST, commit_message="squashed")
    assert [item.title for item in api.list_repo_commits(DST)] == ["squashed"]
    assert hub.read(DST, "keep.txt") == b"2"


def test_a_commit_on_a_moved_branch_is_refused(start: Start) -> None:
    """A commit whose `parent_commit` is not the head any more gets 412 and changes nothing."""
    hub, api = start()
    parent = hub.branches(DST)["main"]
    rival = run(lambda: hub.commit(DST, {"rival.txt": b"1"}))
    hub.fault(("POST", "/commit/"), rival)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(DST, [add("a.txt", b"1")], commit_message="x", parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert set(hub.files(DST)) == {".gitattributes", "rival.txt"}


def test_pull_requests_keep_main_until_they_are_merged(start: Start) -> None:
    """A pull request has its own ref: made with a commit or empty, filled, merged, closed."""
    hub, api = start()
    made = api.create_commit(DST, [add("a.txt", b"1")], commit_message="one", create_pr=True)
    assert (made.pr_num, set(hub.files(DST))) == (1, {".gitattributes"})
    draft = api.create_pull_request(DST, "two")
    assert (draft.status, draft.git_reference) == ("draft", "refs/pr/2")
    api.create_commit(
        DST, [add("b.txt", b"2")], commit_message="fill", revision=draft.git_reference
    )
    assert set(hub.files(DST, "refs/pr/2")) == {".gitattributes", "b.txt"}
    api.merge_pull_request(DST, 2)
    assert set(hub.files(DST)) == {".gitattributes", "b.txt"}
    api.change_discussion_status(DST, 1, "closed")
    states = {item.num: item.status for item in api.get_repo_discussions(DST)}
    assert states == {1: "closed", 2: "merged"}


def test_the_store_takes_paths_and_hostile_names(start: Start, tmp_path: Path) -> None:
    """A file is served from its path, and a tree may contain names that a client must not trust."""
    hub, api = start()
    path = tmp_path / "outside.safetensors"
    path.write_bytes(WEIGHTS)
    hub.add_repo("lab/bad", {"../x": b"1", "/etc/x": b"2", "w.safetensors": path})
    assert hub.path("lab/bad", "w.safetensors") == path
    assert set(api.list_repo_files("lab/bad")) >= {"../x", "w.safetensors"}
    with pytest.raises(HfHubHTTPError) as caught:
        operation = add("a", b"1")
        operation.path_in_repo = "../a"
        api.create_commit(DST, [operation], commit_message="x")
    assert caught.value.response.status_code == 400
