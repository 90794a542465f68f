"""The Hub as a source: what is read, from where, and how much."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from support import checkpoints
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, Lab, rescaled
from support.hub_faults import corrupt, run, status, truncate
from support.hub_store import Sparse

from moescale.errors import RewriteError, SourceError, TemporaryError, UsageError
from moescale.storage.hub import client as hub_module
from moescale.storage.hub.source import HubSource
from moescale.storage.location import HubRef, is_repo_id, parse_ref, ref_from_url

LARGE = r"^(cdn|api /lab/mix/resolve)"


def everything(folder: Path) -> set[str]:
    """The names of all files below a folder that are large enough to hold weights."""
    return {str(p) for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 50_000}


# Locations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("hf://org/name", "org/name", None),
        ("hf://org/na.me_1-x@main", "org/na.me_1-x", "main"),
        ("hf://org/name@refs/pr/12", "org/name", "refs/pr/12"),
        ("hf://org/name@feature/a@b", "org/name", "feature/a@b"),
        ("hf://org/name@" + "a" * 40, "org/name", "a" * 40),
        ("org/name@rev", "org/name", "rev"),
        ("hf://org/name/", "org/name", None),
    ],
)
def test_a_place_is_read(text: str, repo: str, revision: str | None) -> None:
    """Repo and revision are separated, whatever the revision looks like."""
    assert parse_ref(text) == HubRef(repo, revision)
    assert parse_ref(str(parse_ref(text))) == parse_ref(text)


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("https://huggingface.co/org/name", "hf://org/name"),
        ("http://huggingface.co/org/name/", "hf://org/name"),
        ("https:/huggingface.co/org/name", "hf://org/name"),  # as pathlib shortens it
        ("huggingface.co/org/name", "hf://org/name"),
        ("https://hf.co/org/name.git", "hf://org/name"),
        ("https://www.huggingface.co/org/name?library=x#use", "hf://org/name"),
        ("https://huggingface.co/org/name/tree/main", "hf://org/name@main"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "hf://org/name@refs/pr/1"),
        ("https://huggingface.co/org/name/tree/v1/sub", "hf://org/name@v1/sub"),
        ("https://huggingface.co/org/name/blob/main/config.json", "hf://org/name@main"),
        ("https://huggingface.co/org/name/resolve/main/s/a.safetensors", "hf://org/name@main/s"),
        ("https://huggingface.co/org/name/commit/abc", "hf://org/name@abc"),
        ("org/name", None),
        ("./x", None),
        ("hf://org/name", None),
    ],
)
def test_an_address_is_a_place(address: str, place: str | None) -> None:
    """An address from a browser means its repo, revision and folder."""
    assert ref_from_url(address) == place


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/org",
        "https://huggingface.co/org/name/discussions/3",
        "https://example.org/org/name",
    ],
)
def test_an_address_of_something_else_is_refused(address: str) -> None:
    """It is a usage error, and never a folder."""
    with pytest.raises(UsageError, match="address"):
        ref_from_url(address)


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://name",
        "hf://org/name@",
        "hf://org/name//x",
        "hf://org/name/../x",
        "hf://org/../x",
        "hf://org/na--me",
        "hf://org/name.",
        "hf:///etc/passwd",
        "hf://org/näme",
        "hf://org/name?x=1",
    ],
)
def test_a_place_that_is_none_is_refused(text: str) -> None:
    """A text that cannot be a Hub repo is a usage error that shows the expected form."""
    with pytest.raises(UsageError, match="hf://org/name"):
        parse_ref(text)
    assert not is_repo_id(text.removeprefix("hf://").partition("@")[0]) or text.endswith("@")


FOLDERS = (
    "lab/many/runs/500",
    "hf://lab/many/runs/500",
    "hf://lab/many@main/runs/500",
    "lab/many/runs/500@main",
    "https://huggingface.co/lab/many/tree/main/runs/500",
)


@pytest.mark.parametrize("place", FOLDERS)
def test_a_folder_of_a_repo_is_a_checkpoint(lab: Lab, place: str) -> None:
    """Every spelling of the folder selects the files below it, and the plan names the folder."""
    hub = lab.start()
    lab.monkeypatch.chdir(lab.root)
    files = {f"runs/500/{name}": content for name, content in lab.files.items()}
    commit = hub.add_repo("lab/many", {**files, "runs/400/config.json": b"{}", "a.txt": b"a"})
    out = lab.root / "out"
    told = json.loads(lab.done(place, str(out), "-k", "3", "--verify", "--json").out)
    assert told["source"] == {"kind": "hub", "id": "lab/many/runs/500", "revision": commit}
    made = checkpoints.tree(out)
    assert made.keys() == lab.source.keys() | {"moescale.json"}
    assert rescaled(lab.source).items() <= made.items()
    lab.done(place, PLACE, "-k", "3", "--verify")
    assert lab.run("lab/many/runs/600", "-k", "3", "--dry-run").code == 3


def test_offline_a_folder_of_a_repo_is_a_checkpoint(lab: Lab) -> None:
    """The cache keeps the folders of a repo."""
    hub = lab.start()
    hub.add_repo(SRC, {f"a/b/{name}": content for name, content in lab.files.items()})
    lab.fill_cache()
    lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for place in (f"{SRC}/a/b", f"hf://{SRC}@main/a/b"):
        found = HubSource(parse_ref(place))
        assert set(found.files()) == lab.source.keys()
        assert found.read("config.json") == lab.source["config.json"]


def test_an_output_is_no_folder_of_a_repo(lab: Lab) -> None:
    """A destination is a whole repo; an address is refused, since only `hf://` uploads."""
    lab.start()
    for place, word in ((f"{PLACE}/sub", "folder"), ("https://hf.co/a/b", "hf://a/b")):
        outcome = lab.run(SRC, place, "-k", "3")
        assert outcome.code == 2
        assert word in outcome.failure


def test_a_misspelt_local_path_is_named(lab: Lab) -> None:
    """If a local folder has the first part of the name, the error names the likely path."""
    lab.start()
    lab.monkeypatch.chdir(lab.root)
    shutil.copytree(lab.folder, lab.root / "m" / "tiny")
    outcome = lab.run("m/tinyy", "-k", "3", "--dry-run")
    assert outcome.code == 3
    assert "does not exist (did you mean m/tiny?)" in outcome.failure
    assert "hf://m/tinyy: not found" in outcome.failure


def test_a_directory_wins_over_a_repo(lab: Lab) -> None:
    """A directory with the name of a repo wins, and the plan says so; `hf://` selects the repo."""
    lab.start()
    lab.monkeypatch.chdir(lab.root)
    Path("lab").mkdir()
    Path(SRC).symlink_to(lab.folder)
    found = {
        source: json.loads(lab.done(source, "-k", "3", "--dry-run", "--json").out)["source"]
        for source in (SRC, f"hf://{SRC}")
    }
    assert found[SRC]["kind"] == "local"
    assert found[f"hf://{SRC}"] == {"kind": "hub", "id": SRC, "revision": lab.commit}


# Revisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["branch", "tag", "commit", "pull request", "slashes"])
@pytest.mark.parametrize("way", ["option", "place"])
def test_every_form_of_a_revision_is_read(lab: Lab, form: str, way: str) -> None:
    """Branch, tag, commit and pull request lead to their files and commits."""
    hub = lab.start()
    repo = hub.repo(SRC)
    old = lab.commit
    hub.commit(SRC, {"config.json": b"{}"})
    names = {
        "branch": ("refs/heads/old", "old"),
        "tag": ("refs/tags/v1.0", "v1.0"),
        "commit": ("refs/heads/unused", old),
        "pull request": ("refs/pr/7", "refs/pr/7"),
        "slashes": ("refs/heads/a/b@c", "a/b@c"),
    }
    ref, name = names[form]
    repo.refs[ref] = old
    chosen = [f"hf://{SRC}@{name}"] if way == "place" else [SRC, "--revision", name]
    plan = json.loads(lab.done(*chosen, "-k", "3", "--dry-run", "--json").out)
    assert plan["source"] == {"kind": "hub", "id": SRC, "revision": old}


def test_a_revision_is_given_once(lab: Lab) -> None:
    """Two revisions, or a revision for a directory, are usage errors."""
    lab.start()
    for source in (f"hf://{SRC}@main", str(lab.folder)):
        outcome = lab.run(source, "--revision", "main", "-k", "3", "--dry-run")
        assert outcome.code == 2
        assert "revision" in outcome.failure


@pytest.mark.parametrize("place", ["lab/nothing", f"hf://{SRC}@nowhere"])
def test_what_is_not_there_is_said_in_one_line(lab: Lab, place: str) -> None:
    """For a missing repo or revision the run ends with 3 and an error that names it."""
    lab.start()
    outcome = lab.run(place, str(lab.root / "out"), "-k", "3")
    assert outcome.code == 3
    assert place.removeprefix("hf://") in outcome.failure
    assert not (lab.root / "out").exists()


def test_everything_is_read_at_one_commit(lab: Lab) -> None:
    """A branch that moves during a run has no effect; card and provenance name the commit."""
    hub = lab.start()
    expected = rescaled(lab.source)
    spoil = dict.fromkeys((*SHARDS, "config.json", "LICENSE"), b"other")
    hub.fault(r"/tree/", run(lambda: hub.commit(SRC, spoil)))
    target = lab.root / "out"
    lab.done(SRC, str(target), "-k", "3", "-q")
    output = checkpoints.tree(target)
    assert {name: output[name] for name in SHARDS} == expected
    assert output["LICENSE"] == lab.source["LICENSE"]
    assert hub.branches(SRC)["main"] != lab.commit
    assert json.loads(output["moescale.json"])["source"]["revision"] == lab.commit
    assert lab.commit.encode() in output["README.md"]
    revisions = {found[1] for r in hub.requests if (found := re.search(r"resolve/(\w+)/", r.path))}
    assert revisions == {lab.commit}


# Traffic ------------------------------------------------------------------------------------


def huge_repo() -> dict[str, bytes | Sparse]:
    """A Mixtral of 1 TB in 200 shards that consist of headers only."""
    config = json.loads(checkpoints.MIXTRAL_CONFIG) | {
        "num_hidden_layers": 200,
        "num_local_experts": 40,
        "hidden_size": 4096,
    }
    shape = (4096, 5000)
    size = 2 * shape[0] * shape[1]
    files: dict[str, bytes | Sparse] = {"config.json": json.dumps(config).encode()}
    weight_map = {}
    for layer in range(200):
        name = f"model-{layer + 1:05}-of-00200.safetensors"
        at = f"model.layers.{layer}.block_sparse_moe.experts."
        tensors = [f"{at}{e}.w{w}.weight" for e in range(40) for w in (1, 2, 3)]
        weight_map |= dict.fromkeys(tensors, name)
        entries = {
            tensor: {
                "dtype": "BF16",
                "shape": list(shape if ".w2." in tensor else shape[::-1]),
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i, tensor in enumerate(tensors)
        }
        head = checkpoints.header(entries)
        files[name] = Sparse(head, len(head) + size * len(tensors))
    index = {"metadata": {}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def test_a_dry_run_of_a_terabyte_reads_the_headers_only(lab: Lab) -> None:
    """A plan for a repo of 1 TB takes a few MB, two or three requests per shard, and seconds."""
    hub = lab.start()
    hub.add_repo("lab/huge", huge_repo())
    begun = time.process_time()
    plan = json.loads(lab.done("lab/huge", "-k", "3", "--dry-run", "--json").out)
    assert time.process_time() - begun < 20
    assert plan["bytes"]["read"] > 0.98e12
    assert len(plan["tensors"]) == 8000
    assert hub.traffic()[1] < 9 << 20
    assert len(hub.find("^cdn")) == 200


def test_a_run_streams_each_weight_once(lab: Lab) -> None:
    """Every byte of a shard is sent once, and no other copy of it is kept."""
    hub = lab.start()
    sizes = [len(lab.source[name]) for name in SHARDS]
    temporary = lab.root / "tmp"
    temporary.mkdir()
    seen: set[str] = set()

    def look() -> None:
        seen.update(everything(lab.root / "home") | everything(temporary))

    lab.monkeypatch.setenv("TMPDIR", str(temporary))
    hub.fault("", run(look), times=None)
    lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q")
    assert sum(sizes) <= hub.traffic("^cdn")[1] <= sum(sizes) + len(SHARDS) * (100 << 10)
    assert not seen
    assert not (lab.root / "home" / "hub").exists()


def test_a_file_in_the_cache_is_not_fetched(lab: Lab) -> None:
    """Files that the Hub cache has at the commit are read from there, but not a truncated copy."""
    hub = lab.start()
    lab.fill_cache(*SHARDS[:2], "config.json", "*.index.json", "LICENSE")
    cached = lab.root / "home" / "hub" / "models--lab--mix" / "snapshots" / lab.commit
    broken = (cached / SHARDS[1]).resolve()
    broken.write_bytes(broken.read_bytes()[:-1])
    hub.log.clear()
    lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q")
    asked = {found[1] for r in hub.requests if (found := re.search(r"/resolve/\w+/(.*)", r.path))}
    assert asked == lab.source.keys() - {
        SHARDS[0],
        "config.json",
        "model.safetensors.index.json",
        "LICENSE",
        "empty.txt",
    }
    output = checkpoints.tree(lab.root / "out")
    assert {name: output[name] for name in SHARDS} == rescaled(lab.source)


# Offline ------------------------------------------------------------------------------------


def test_offline_the_cache_gives_the_same_output(lab: Lab) -> None:
    """With HF_HUB_OFFLINE a cached model gives the same files as the Hub, without a request."""
    hub = lab.start()
    want = lab.on_disk()
    lab.fill_cache()
    hub.log.clear()
    lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for number, source in enumerate((SRC, f"hf://{SRC}@main", f"hf://{SRC}@{lab.commit}")):
        target = lab.root / f"out-{number}"
        lab.done(source, str(target), "-k", "3", "-q", "--verify")
        assert checkpoints.tree(target) == want
    assert not hub.requests


def test_offline_twins_need_not_be_in_the_cache(lab: Lab) -> None:
    """Files that are left out in any case need not be cached; files that are copied must be."""
    hub = lab.start()
    hub.commit(SRC, checkpoints.LEFT_OUT)
    lab.fill_cache("*.safetensors", "*.json", *checkpoints.EXTRAS)
    hub.log.clear()
    lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q", "--verify")
    assert "left out: consolidated.00.pth" in outcome.err
    assert not hub.requests
    assert not checkpoints.LEFT_OUT.keys() & checkpoints.tree(lab.root / "out").keys()


def test_offline_a_child_honours_the_setting(lab: Lab) -> None:
    """A separate process honours the variable itself."""
    hub = lab.start()
    lab.fill_cache()
    hub.log.clear()
    outcome = lab.child(SRC, str(lab.root / "out"), "-k", "3", "-q", HF_HUB_OFFLINE="1")
    assert (outcome.code, outcome.err) == (0, "")
    assert not hub.requests


def test_offline_nothing_is_uploaded(lab: Lab) -> None:
    """With HF_HUB_OFFLINE a destination on the Hub is refused, and the error gives the reason."""
    hub = lab.start()
    lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = lab.run(str(lab.folder), PLACE, "-k", "3", "-q")
    assert outcome.code == 3
    assert f"{PLACE}: cannot be written to because HF_HUB_OFFLINE is set" in outcome.failure
    assert not hub.requests


@pytest.mark.parametrize(
    ("cached", "missing"),
    [
        ((), SRC),
        (("config.json",), "model"),
        (("config.json", "*.safetensors", "*.index.json"), "README.md"),
        (
            ("*.json", "*.md", "LICENSE", "*.txt", "*.safetensors", "*.py", "*.jinja"),
            ".gitattributes",
        ),
    ],
)
def test_offline_an_incomplete_cache_is_refused(
    lab: Lab, cached: tuple[str, ...], missing: str
) -> None:
    """A file that is not in the cache ends the run with an error of one line."""
    lab.start()
    if cached:
        lab.fill_cache(*cached)
    lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = lab.run(SRC, str(lab.root / "out"), "-k", "3")
    last = "\n".join(outcome.err.strip().splitlines()[-2:])
    assert outcome.code == 3
    assert missing in last
    assert "HF_HUB_OFFLINE is set" in last


def test_offline_an_older_cache_has_no_list_of_the_repo(lab: Lab) -> None:
    """If the cache has no list of the repo's files, the cached files count as all."""
    lab.start()
    want = lab.on_disk()
    lab.fill_cache()
    for path in (lab.root / "home" / "hub" / "models--lab--mix" / "trees").iterdir():
        path.unlink()
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q")
    assert checkpoints.tree(lab.root / "out") == want


# Interruptions and checks ---------------------------------------------------------------------


def test_a_download_goes_on_at_the_byte_where_it_broke(lab: Lab) -> None:
    """After an interruption inside a shard, the next request asks for the rest only."""
    hub = lab.start()
    size = len(lab.source[SHARDS[0]])
    whole = f"bytes=0-{size - 1}"
    fault = hub.fault(
        lambda r: r.host == "cdn" and r.headers.get("range") == whole, truncate(123_456)
    )
    lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q", "-j", "1")
    assert fault.fired == 1
    ranges = [r.headers["range"] for r in hub.find("^cdn")]
    assert f"bytes=123456-{size - 1}" in ranges
    assert ranges.count(whole) == 1 + sum(len(lab.source[n]) == size for n in SHARDS[1:])
    output = checkpoints.tree(lab.root / "out")
    assert {name: output[name] for name in SHARDS} == rescaled(lab.source)


@pytest.mark.parametrize("to", ["disk", "Hub"])
def test_a_flipped_byte_in_a_shard_is_noticed(lab: Lab, to: str) -> None:
    """Bytes with another SHA-256 than the stated one never count; a rerun fetches them again."""
    hub = lab.start()
    size = len(lab.source[SHARDS[1]])
    whole = f"bytes=0-{size - 1}"
    fault = hub.fault(
        lambda r: r.host == "cdn" and r.headers.get("range") == whole, corrupt(size - 10)
    )
    target = str(lab.root / "out") if to == "disk" else PLACE
    outcome = lab.run(SRC, target, "-k", "3", "-q")
    assert (outcome.code, fault.fired) == (5, 1)
    assert "received other bytes than the Hub has" in outcome.failure
    if to == "Hub":
        assert set(hub.files(DST)) == {".gitattributes"}
    lab.done(SRC, target, "-k", "3", "-q")
    output = checkpoints.tree(lab.root / "out") if to == "disk" else lab.output()
    assert {name: output[name] for name in SHARDS} == rescaled(lab.source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
def test_a_flipped_byte_in_a_small_file_is_noticed(lab: Lab, name: str) -> None:
    """Files that git keeps are checked against git's own digest."""
    hub = lab.start(resolve_cache=False)
    hub.fault(f"resolve/.*/{name}$", corrupt(3), times=None)
    outcome = lab.run(SRC, str(lab.root / "out"), "-k", "3", "-q")
    assert outcome.code == 5
    assert f"{name}: received other bytes than the Hub has" in outcome.failure
    hub.log.clear()
    lab.done(SRC, str(lab.root / "out"), "-k", "3", "-q")


def test_a_plan_made_from_other_headers_is_not_carried_out(lab: Lab) -> None:
    """A shard whose header differs from the one in the plan stops the run."""
    lab.start()
    source = HubSource(HubRef(SRC))
    source.files()
    source.read(SHARDS[0], 0, 8)
    source.read(SHARDS[0], 8, 500)
    source._planned[SHARDS[0]] = (508, b"other")
    with (
        pytest.raises(TemporaryError, match="its header differs from the planned one"),
        source.open(SHARDS[0]) as reader,
    ):
        reader.read_into(memoryview(bytearray(1000)), 0)


def test_a_file_that_is_not_read_to_its_end_does_not_count(lab: Lab) -> None:
    """Leaving a stream early is an error, since its digest is then unknown."""
    lab.start()
    source = HubSource(HubRef(SRC))
    with (
        pytest.raises(RewriteError, match="not read to the end"),
        source.open(SHARDS[0]) as reader,
    ):
        reader.read_into(memoryview(bytearray(10)), 0)


# Hostile repos ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "C:/x", "a//b", "x\n"])
@pytest.mark.parametrize("to", ["disk", "Hub"])
def test_a_hostile_name_is_refused_before_anything_is_written(lab: Lab, name: str, to: str) -> None:
    """A name that leads out of the repo ends the run, and nothing is written anywhere."""
    hub = lab.start()
    hub.add_repo(SRC, {**lab.files, name: b"x"})
    before = set(lab.root.rglob("*"))
    outcome = lab.run(SRC, str(lab.root / "deep" / "out") if to == "disk" else PLACE, "-k", "3")
    assert outcome.code == 3
    assert "not a plain path" in outcome.failure
    assert set(lab.root.rglob("*")) == before
    assert not hub.has(DST)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..\\x.safetensors"])
def test_an_index_that_points_outside_is_refused(lab: Lab, name: str) -> None:
    """A shard outside the repo that an index names is never opened."""
    hub = lab.start()
    index = json.loads(lab.source["model.safetensors.index.json"])
    index["weight_map"][next(iter(index["weight_map"]))] = name
    hub.commit(SRC, {"model.safetensors.index.json": json.dumps(index).encode()})
    outcome = lab.run(SRC, PLACE, "-k", "3")
    assert outcome.code == 3
    assert "not a plain path" in outcome.failure
    assert not hub.has(DST)


def test_other_folders_of_a_repo_do_not_count(lab: Lab) -> None:
    """`.cache/` and `.git/` are not part of the checkpoint."""
    hub = lab.start()
    hub.add_repo(SRC, {**lab.files, ".cache/huggingface/x": b"x"})
    assert set(HubSource(HubRef(SRC)).files()) == lab.source.keys()


def test_no_access_is_said(lab: Lab) -> None:
    """For a gated model the error says that access is missing, for a private one "not found"."""
    hub = lab.start()
    hub.add_repo("lab/gated", lab.files, gated=True)
    hub.add_repo("lab/secret", lab.files, private=True)
    gated = lab.run("lab/gated", "-k", "3", "--dry-run")
    secret = lab.run("lab/secret", "-k", "3", "--dry-run")
    assert (gated.code, secret.code) == (3, 3)
    assert "the repo is gated (403)" in gated.failure
    assert f"Accept its terms at {hub.endpoint}/lab/gated" in gated.failure
    assert "lab/secret: not found (404)" in secret.failure


# Secrets ------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_only(lab: Lab) -> None:
    """The Hub gets the token with every request of moescale; its storage never gets it."""
    hub = lab.start(xet="http")
    hub.add_repo(SRC, lab.files, private=True)
    hub.tokens[hub.token].namespaces = frozenset({"me", "lab"})
    outcome = lab.done(SRC, PLACE, "-k", "3", "-v", "--verify")
    assert not hub.leaks()
    assert all("authorization" in r.headers for r in hub.find(r"^api /api/models/lab/mix"))
    assert hub.find("^cdn")
    assert hub.find("^cas")
    written = b"".join(lab.output().values()) + (outcome.out + outcome.err).encode()
    assert hub.token.encode() not in written


def test_the_token_is_in_nothing_that_is_written(lab: Lab) -> None:
    """It is not in the output with every log enabled, nor in a log, a journal or any other file."""
    hub = lab.start(xet="http")
    logs = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "RUST_LOG": "debug"}
    hub.fault(("POST", "/commit/main"), status(403))
    outcome = lab.child(SRC, PLACE, "-k", "3", "-v", **logs)
    assert outcome.code == 3
    assert "<TOKEN>" in outcome.err
    assert hub.token not in outcome.out + outcome.err
    contents = [path.read_bytes() for path in lab.root.rglob("*") if path.is_file()]
    assert any(b'"job":' in content for content in contents)  # the journal, as the Hub stores it
    assert any(b"hf_xet logging configured" in content for content in contents)  # a log of hf_xet
    assert not [content for content in contents if hub.token.encode() in content]


def test_an_error_never_shows_the_token(lab: Lab) -> None:
    """If the client's message contains the token, it is removed."""
    hub = lab.start()
    with (
        pytest.raises(SourceError) as caught,
        hub_module.translated_errors("x", SourceError),
    ):
        raise ValueError(f"bad header 'Bearer {hub.token}'")
    assert hub.token not in str(caught.value)
    assert "[token]" in str(caught.value)


def test_a_disk_that_is_too_small_for_a_repo_is_said_first(lab: Lab) -> None:
    """Hub files share no blocks, so the run ends before the first weight and makes no folder."""
    lab.start()
    usage = shutil.disk_usage(lab.root)._replace(free=100)
    lab.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outcome = lab.run(SRC, str(lab.root / "out"), "-k", "3", "-q")
    assert outcome.code == 3
    assert "the output needs" in outcome.failure
    assert not (lab.root / "out").exists()
