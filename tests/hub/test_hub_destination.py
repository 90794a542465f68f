"""The Hub as a destination: what is sent, what is visible meanwhile, and the final state."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import IO

import pytest
from support import checkpoints
from support.hub_checkpoints import (
    CARD,
    DST,
    PLACE,
    SHARDS,
    SRC,
    STREAM,
    Lab,
    rescaled,
)
from support.hub_faults import run, status

from moescale.errors import DestinationError, bytes_text
from moescale.storage.hub.destination import HubDestination
from moescale.storage.location import HubRef

WORKING = "moescale-unfinished-main"


# What is published ----------------------------------------------------------------------------


def test_what_links_lead_to_is_published_only_on_demand(lab: Lab) -> None:
    """A linked shard is published; any other link out of the folder needs an option."""
    hub = lab.start()
    (lab.root / "elsewhere.txt").write_bytes(b"not of this model")
    (lab.folder / "notes.txt").symlink_to(lab.root / "elsewhere.txt")
    shard = lab.folder / SHARDS[0]
    shard.rename(lab.root / "blob")
    shard.symlink_to(lab.root / "blob")
    for more in ((), ("--dry-run",)):
        outcome = lab.run(str(lab.folder), PLACE, "-k", "3", *more)
        assert outcome.code == 3
        assert "'notes.txt' is a link out" in outcome.failure
        assert "--follow-links" in outcome.failure
    assert not hub.has(DST)
    lab.done(str(lab.folder), PLACE, "-k", "3", "--follow-links", "--verify")
    assert hub.read(DST, "notes.txt") == b"not of this model"
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)


# The repo and permission to write -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "private", "said"),
    [
        ((), False, "the Hub's default visibility"),
        (("--private",), True, "private"),
        (("--public",), False, "public"),
    ],
)
def test_a_missing_repo_is_created(
    lab: Lab, options: tuple[str, ...], private: bool, said: str
) -> None:
    """It gets the requested visibility, which the output states."""
    hub = lab.start()
    outcome = lab.done(SRC, PLACE, "-k", "3", *options)
    assert hub.repo(DST).private is private
    assert f"repo {DST} created ({said})" in outcome.err
    (asked,) = hub.find(("POST", "repos/create"))
    assert asked.status == 200


def test_a_repo_of_the_other_visibility_is_refused(lab: Lab) -> None:
    """--private does not write to a public repo, and --public does not write to a private one."""
    hub = lab.start()
    hub.add_repo(DST, {".gitattributes": b""})
    outcome = lab.run(SRC, PLACE, "-k", "3", "--private", "-q")
    assert outcome.code == 3
    assert "exists and is public" in outcome.failure
    hub.repo(DST).private = True
    assert lab.run(SRC, PLACE, "-k", "3", "--public", "-q").code == 3
    assert hub.branches(DST).keys() == {"main"}
    lab.done(SRC, PLACE, "-k", "3", "--private", "-q")


@pytest.mark.parametrize("who", ["reader", "nobody", "expired", "wrong", "foreign", "read only"])
def test_who_may_not_write_hears_it_before_the_first_weight(lab: Lab, who: str) -> None:
    """The run ends before it reads a weight, and the error says that the token is the reason."""
    hub = lab.start()
    hub.add_repo("lab/theirs", {"x.txt": b"1"})
    place = "hf://lab/theirs@new" if who == "foreign" else PLACE
    tokens = {"reader": hub.read_token, "nobody": "", "wrong": "hf_wrong"}
    if who in tokens:
        lab.monkeypatch.setenv("HF_TOKEN", tokens[who])
    if who == "expired":
        hub.fault("validate-yaml", run(hub.expire))
    if who == "read only":
        hub.add_repo(DST, {".gitattributes": b""})
        lab.monkeypatch.setenv("HF_TOKEN", hub.read_token)
    outcome = lab.run(SRC, place, "-k", "3", "-q")
    assert outcome.code == 3
    assert "token" in outcome.failure
    assert not [r for r in hub.find(STREAM) if r.headers.get("range", "").split("-")[-1] > "99999"]
    assert hub.traffic("^cdn")[1] <= len(SHARDS) * (32 << 10)
    assert not hub.has(DST) or set(hub.files(DST)) == {".gitattributes"}


def test_a_card_that_the_hub_refuses_ends_the_run_at_once(lab: Lab) -> None:
    """Bad metadata in the source's card ends with 3 before the first weight or a new repo."""
    hub = lab.start()
    hub.commit(SRC, {"README.md": CARD.replace(b"apache-2.0", b"No License!")})
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 3
    assert "the Hub rejects the metadata of README.md" in outcome.failure
    assert "license" in outcome.failure
    assert not hub.has(DST)
    assert hub.traffic("^cdn")[1] <= len(SHARDS) * (32 << 10)


def test_what_the_hub_remarks_on_the_card_is_passed_on(lab: Lab) -> None:
    """A warning of the Hub about the card does not stop the run, and appears at its end."""
    hub = lab.start()
    warning = status(200, {"errors": [], "warnings": [{"message": "odd licence"}]})
    hub.fault("validate-yaml", warning, times=None)
    assert "the Hub warns about README.md: odd licence" in lab.done(SRC, PLACE, "-k", "3").err


def test_a_name_that_the_hub_does_not_take_is_refused(lab: Lab) -> None:
    """The Hub does not accept `.cache` folders; a file in one is an error, not dropped silently."""
    lab.start()
    checkpoints.write_files(lab.folder, {"sub/.cache/x.txt": b"x"})
    outcome = lab.run(str(lab.folder), PLACE, "-k", "3", "-q")
    assert outcome.code == 3
    assert "sub/.cache/x.txt" in outcome.failure


# What is sent -------------------------------------------------------------------------------


def large_files(*folders: Path) -> set[str]:
    """Files of more than half a shard."""
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if path.stat().st_size > 200_000}


@pytest.mark.parametrize("source", ["Hub", "disk"])
def test_with_xet_no_shard_is_on_disk(lab: Lab, source: str) -> None:
    """At no request does the client's disk hold a shard or a part of one."""
    hub = lab.start(xet="http")
    temporary = lab.root / "tmp"
    temporary.mkdir()
    seen: set[str] = set()
    look = run(lambda: seen.update(large_files(lab.root / "home", temporary)))
    hub.fault(lambda r: r.method != "PUT", look, times=None)
    place = SRC if source == "Hub" else str(lab.folder)
    outcome = lab.child(place, PLACE, "-k", "3", "-q", TMPDIR=str(temporary))
    assert outcome.code == 0, outcome.err
    assert not seen
    assert hub.traffic("^cas")[0] > 1_000_000
    assert not hub.find(("PUT", "^cdn"))


@pytest.mark.parametrize("why", ["the user", "the server"])
def test_without_xet_one_shard_at_a_time_goes_through_a_file(lab: Lab, why: str) -> None:
    """The temporary file is unlinked, so nothing of it remains, and only one exists at a time."""
    hub = lab.start(xet=why == "the user")
    if why == "the user":
        from huggingface_hub import constants

        lab.monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    opened: list[IO[bytes]] = []
    most: list[int] = []
    make = tempfile.TemporaryFile

    def open_file() -> IO[bytes]:
        opened.append(make())
        most.append(sum(not file.closed for file in opened))
        return opened[-1]

    lab.monkeypatch.setattr("moescale.storage.hub.writer.tempfile.TemporaryFile", open_file)
    lab.done(SRC, PLACE, "-k", "3", "-q", "-j", "3")
    assert most == [1] * len(SHARDS)
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)
    assert len(hub.find(("PUT", "^cdn"))) == len(SHARDS)
    assert not hub.find("^cas")


def test_a_child_honours_the_variable_that_turns_xet_off(lab: Lab) -> None:
    """HF_HUB_DISABLE_XET=1 sends the shards to the CDN, and TMPDIR is empty afterwards."""
    hub = lab.start(xet="http")
    temporary = lab.root / "tmp"
    temporary.mkdir()
    outcome = lab.child(SRC, PLACE, "-k", "3", "-q", HF_HUB_DISABLE_XET="1", TMPDIR=str(temporary))
    assert (outcome.code, outcome.err) == (0, "")
    assert not hub.find("^cas")
    assert len(hub.find(("PUT", "^cdn"))) == len(SHARDS)
    assert not list(temporary.iterdir())


def test_room_for_the_file_is_checked_first(lab: Lab) -> None:
    """Without room for a shard none is read, and the error names the folder for temporary files."""
    hub = lab.start(xet=False)
    usage = shutil.disk_usage(lab.root)._replace(free=1000)
    lab.monkeypatch.setattr("moescale.storage.hub.writer.shutil.disk_usage", lambda _: usage)
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 1
    assert "of free space" in outcome.failure
    assert tempfile.gettempdir() in outcome.failure
    assert hub.traffic("^cdn")[1] <= len(SHARDS) * (32 << 10)


def test_only_new_bytes_are_sent(lab: Lab) -> None:
    """Bytes that the Hub's storage has are not sent again; the summary gives their number."""
    hub = lab.start(xet="http")
    lab.done(SRC, "hf://me/base", "-k", "2", "--rule", "none", "-q")
    lab.done(str(lab.folder), "hf://me/first", "-k", "3", "-q")
    hub.log.clear()
    outcome = lab.done(SRC, PLACE, "-k", "3")
    size = sum(len(lab.source[name]) for name in SHARDS)
    assert hub.traffic("^cas")[0] < size // 20
    assert f"{bytes_text(size)} were already on the Hub" in outcome.err
    assert f"http://127.0.0.1:{hub.endpoint.rpartition(':')[2]}/{DST}/commit/" in outcome.err
    assert "B received\n" in outcome.err


def test_the_hubs_limit_on_commits_is_kept(lab: Lab) -> None:
    """Beyond a number of commits, finished shards wait and are committed together."""
    hub = lab.start()
    lab.monkeypatch.setattr("moescale.storage.hub.destination.COMMITS_AT_ONCE", 2)
    lab.done(SRC, PLACE, "-k", "3", "-q", "-j", "1")
    titles = [commit.title for commit in hub.repo(DST).commits.values()]
    assert titles[1:4] == ["Start", SHARDS[0], "Finished shards"]
    assert len(titles) == 5
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)


def test_what_waits_for_a_commit_is_not_lost(lab: Lab) -> None:
    """A run that fails records the shards that arrived, and the next run does not repeat them."""
    hub = lab.start()
    lab.monkeypatch.setattr("moescale.storage.hub.destination.COMMITS_AT_ONCE", 1)
    hub.fault(("GET", f"resolve/.*{SHARDS[2]}"), status(404), nth=2)
    assert lab.run(SRC, PLACE, "-k", "3", "-q", "-j", "1").code == 3
    journal = json.loads(hub.read(DST, "moescale-journal.json", WORKING))
    assert set(journal["files"]) == set(SHARDS[:2])
    lab.done(SRC, PLACE, "-k", "3", "-q")
    assert {name: hub.read(DST, name) for name in SHARDS} == rescaled(lab.source)


# What is visible ------------------------------------------------------------------------------


class Watch:
    """Looks at a branch at every request of a run."""

    def __init__(self, lab: Lab, branch: str = "main") -> None:
        self.lab, self.branch = lab, branch
        self.seen: list[frozenset[tuple[str, str]] | None] = []
        lab.hub.fault("", run(self.look), times=None)

    def look(self) -> None:
        """Record the current content of the branch."""
        hub = self.lab.hub
        there = hub.has(DST) and self.branch in hub.branches(DST)
        tree = hub.files(DST, self.branch).items() if there else ()
        now = frozenset((name, blob.sha256) for name, blob in tree) if there else None
        if not self.seen or self.seen[-1] != now:
            self.seen.append(now)


def test_a_new_repo_changes_once(lab: Lab) -> None:
    """One commit takes the branch from the empty repo to the whole model; no other branch stays."""
    hub = lab.start()
    watch = Watch(lab)
    lab.done(SRC, PLACE, "-k", "3", "-q")
    watch.look()
    absent, born, whole = watch.seen
    assert absent is None
    assert {name for name, _ in born or ()} == {".gitattributes"}
    assert {name for name, _ in whole or ()} >= {*SHARDS, "config.json", "moescale.json"}
    assert [c.title for c in hub.repo(DST).history("main")][1:] == ["initial commit"]
    assert hub.branches(DST).keys() == {"main"}


def test_old_content_is_replaced_at_once(lab: Lab) -> None:
    """With `--overwrite`, one commit removes the old files and adds the new ones."""
    hub = lab.start()
    hub.add_repo(DST, {"old.safetensors": b"old" * 99, "config.json": b"{}", "a/b.txt": b"x"})
    refused = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert refused.code == 3
    assert "is not empty" in refused.failure
    assert hub.branches(DST).keys() == {"main"}
    watch = Watch(lab)
    lab.done(SRC, PLACE, "-k", "3", "-q", "--overwrite")
    watch.look()
    assert [{name for name, _ in seen or ()} for seen in watch.seen] == [
        {"old.safetensors", "config.json", "a/b.txt"},
        set(lab.output()),
    ]
    assert not {"old.safetensors", "a/b.txt"} & lab.output().keys()
    assert len(hub.repo(DST).history("main")) == 2


@pytest.mark.parametrize("branch", ["k3", "feature/of-3", "v1.0"])
def test_a_missing_branch_appears_whole(lab: Lab, branch: str) -> None:
    """Readers see the whole model on the new branch, or no branch."""
    hub = lab.start()
    hub.add_repo(DST, {"old.txt": b"old", ".gitattributes": b"*.md text\n"})
    want = lab.on_disk()
    watch = Watch(lab, branch)
    lab.done(SRC, f"{PLACE}@{branch}", "-k", "3", "-q")
    watch.look()
    assert watch.seen[0] is None
    assert len(watch.seen) == 2
    assert lab.output(revision=branch) == want
    assert set(hub.files(DST)) == {"old.txt", ".gitattributes"}
    assert hub.branches(DST).keys() == {"main", branch}
    assert len(hub.repo(DST).history(branch)) == 2
    hub.log.clear()
    lab.done(SRC, f"{PLACE}@{branch}", "-k", "3", "-q")
    assert not hub.find(("POST", ""))


def test_a_branch_that_a_rival_makes_is_not_taken_for_ours(lab: Lab) -> None:
    """If another process creates the missing branch meanwhile, the run is refused."""
    hub = lab.start()
    hub.add_repo(DST, {"old.txt": b"old"})
    rival = run(lambda: hub.commit(DST, {"rival.txt": b"1"}, branch="k3"))
    hub.fault(("POST", "/branch/k3"), rival)
    outcome = lab.run(SRC, f"{PLACE}@k3", "-k", "3", "-q")
    assert outcome.code == 3
    assert "someone else has just created the branch k3" in outcome.failure
    assert set(hub.files(DST, "k3")) == {"old.txt", "rival.txt"}


def test_a_pull_request_leaves_the_branch_alone(lab: Lab) -> None:
    """With `--create-pr` the branch does not change, and one pull request has the whole model."""
    hub = lab.start()
    hub.add_repo(DST, {"old.txt": b"old"})
    want = lab.on_disk()
    watch = Watch(lab)
    outcome = lab.done(
        SRC, PLACE, "-k", "3", "--create-pr", "--overwrite", "--verify", "--commit-message", "Take"
    )
    watch.look()
    assert len(watch.seen) == 1
    (pull,) = hub.repo(DST).pulls
    assert (pull.title, pull.status) == ("Take", "open")
    assert lab.output(revision="refs/pr/1").keys() - want.keys() == set()
    assert {n: d for n, d in lab.output(revision="refs/pr/1").items() if n in want} == want
    assert f"/{DST}/discussions/1\n" in outcome.err
    assert hub.branches(DST).keys() == {"main"}


def test_a_pull_request_against_a_missing_branch_is_refused(lab: Lab) -> None:
    """A pull request needs a branch to merge into, so the run ends before the first weight."""
    hub = lab.start()
    hub.add_repo(DST, {"old.txt": b"old"})
    outcome = lab.run(SRC, f"{PLACE}@k3", "-k", "3", "--create-pr", "-q")
    assert outcome.code == 3
    assert "the branch does not exist" in outcome.failure
    assert hub.branches(DST).keys() == {"main"}


@pytest.mark.parametrize("name", ["v1", "COMMIT", "refs/pr/1", "refs/pr/9"])
def test_only_a_branch_is_a_destination(lab: Lab, name: str) -> None:
    """A tag, a commit and a pull request are refused before the first weight."""
    hub = lab.start()
    commit = hub.add_repo(DST, {".gitattributes": b""})
    hub.repo(DST).refs |= {"refs/tags/v1": commit, "refs/pr/1": commit}
    place = f"{PLACE}@{name.replace('COMMIT', commit)}"
    outcome = lab.run(SRC, place, "-k", "3", "-q", "--overwrite")
    assert outcome.code == 3
    assert "is not a branch" in outcome.failure
    assert hub.traffic("^cdn")[1] <= len(SHARDS) * (32 << 10)
    assert hub.branches(DST).keys() == {"main"}


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (SRC, f"hf://{SRC}"),
        (f"hf://{SRC}@main", f"hf://{SRC}"),
        (f"hf://{SRC}@v1", f"hf://{SRC}@main"),
        (f"hf://{SRC}@COMMIT", f"hf://{SRC}"),
        (f"hf://{SRC}@work", f"hf://{SRC}@work"),
        (f"hf://{SRC}@v1", f"hf://{SRC}@work"),
    ],
)
def test_the_source_is_never_written_to(lab: Lab, source: str, destination: str) -> None:
    """The branch that is read is not a valid destination, however its commit is named."""
    hub = lab.start()
    hub.tokens[hub.token].namespaces = frozenset({"me", "lab"})
    repo = hub.repo(SRC)
    repo.refs |= {"refs/tags/v1": lab.commit, "refs/heads/work": lab.commit}
    before = dict(repo.refs)
    source = source.replace("COMMIT", lab.commit)
    outcome = lab.run(source, destination, "-k", "3", "--overwrite", "-q")
    assert outcome.code == 2
    assert "is the branch that the source is read from" in outcome.failure
    assert repo.refs == before


# The final state ----------------------------------------------------------------------------


@pytest.mark.parametrize("xet", [True, False])
def test_the_output_is_that_of_the_disk(lab: Lab, xet: bool) -> None:
    """Every file on the Hub has the bytes that the same job writes to a local disk."""
    lab.start(xet=xet)
    want = lab.on_disk()
    lab.done(SRC, PLACE, "-k", "3", "-q", "-j", "1")
    assert lab.output() == want
    assert {name: want[name] for name in SHARDS} == rescaled(lab.source)


@pytest.mark.parametrize("own", [True, False])
def test_the_attributes_of_the_source_win_if_it_has_some(lab: Lab, own: bool) -> None:
    """The source's `.gitattributes` is copied; without one the repo keeps its own."""
    hub = lab.start()
    if not own:
        hub.commit(SRC, {}, delete=(".gitattributes",))
    hub.add_repo(DST, {".gitattributes": b"*.x text\n", "config.json": b"{}"})
    lab.done(SRC, PLACE, "-k", "3", "-q", "--overwrite", "--verify")
    want = lab.source[".gitattributes"] if own else b"*.x text\n"
    assert hub.read(DST, ".gitattributes") == want


def test_what_is_done_is_not_done_again(lab: Lab) -> None:
    """The same command finds its output, writes nothing and ends with 0; another job is refused."""
    hub = lab.start()
    lab.done(SRC, PLACE, "-k", "3", "-q")
    hub.log.clear()
    assert "already done" in lab.done(SRC, PLACE, "-k", "3").err
    assert not hub.find(("POST", ""))
    assert hub.traffic("^cdn")[1] <= len(SHARDS) * (32 << 10)
    outcome = lab.run(SRC, PLACE, "-k", "4", "-q")
    assert outcome.code == 3
    assert "holds lab/mix with 3 experts per token" in outcome.failure


def test_a_changed_output_is_found_by_verification(lab: Lab) -> None:
    """`--verify` reads every byte of an output on the Hub, and exits with 4 if one differs."""
    hub = lab.start()
    lab.done(SRC, PLACE, "-k", "3", "-q")
    spoiled = bytearray(hub.read(DST, SHARDS[1]))
    spoiled[-5] ^= 1
    hub.commit(DST, {SHARDS[1]: bytes(spoiled)})
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q", "--verify")
    assert outcome.code == 4
    assert SHARDS[1] in outcome.failure


def test_what_the_hub_lists_is_compared_with_what_was_sent(lab: Lab) -> None:
    """A shard for which the Hub lists another digest is never published."""
    hub = lab.start()

    def swap() -> None:
        blobs = hub.store.blob(SHARDS[0], b"something else")
        hub.repo(DST).resolve(WORKING).tree[SHARDS[0]] = blobs  # type: ignore[index]

    hub.fault(
        lambda r: (
            f"/tree/{WORKING}" in r.path
            and hub.has(DST)
            and WORKING in hub.branches(DST)
            and hub.files(DST, WORKING).keys() >= set(SHARDS)
        ),
        run(swap),
    )
    outcome = lab.run(SRC, PLACE, "-k", "3", "-q")
    assert outcome.code == 1
    assert f"{SHARDS[0]}: the Hub does not list the content that was sent" in outcome.failure
    assert set(hub.files(DST)) == {".gitattributes"}


def test_a_run_with_an_unreadable_journal_is_refused(lab: Lab) -> None:
    """An unreadable journal belongs to another program, and the run is refused."""
    hub = lab.start()
    hub.add_repo(DST, {"a.txt": b"1"})
    hub.commit(DST, {"moescale-journal.json": b"[]"}, branch=WORKING)
    assert HubDestination(HubRef(DST)).unfinished_job() == "not a journal of moescale"
    with pytest.raises(DestinationError):
        HubDestination(HubRef(DST)).begin({"version": "1"}, replace=False)
    for journal in (b"no json", b"[" * 100_000, b'{"job":' * 9000 + b"1" + b"}" * 9000):
        hub.commit(DST, {"moescale-journal.json": journal}, branch=WORKING)
        assert lab.run(SRC, PLACE, "-k", "3", "-q").code == 3
