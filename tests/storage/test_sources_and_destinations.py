"""Requirements for every source and destination: one suite for directory, Hub and cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
from huggingface_hub import constants
from support import checkpoints
from support.hub_checkpoints import DST, PLACE, SHARDS, SRC, Lab, rescaled

from moescale.errors import CheckpointError, DestinationError
from moescale.planning import provenance
from moescale.storage.base import Destination, Source
from moescale.storage.hub.destination import HubDestination, HubOptions
from moescale.storage.hub.source import HubSource
from moescale.storage.local.destination import LocalDestination
from moescale.storage.local.source import LocalSource
from moescale.storage.location import HubRef, parse_ref

SOURCES = ("directory", "Hub", "cache")
DESTINATIONS = ("directory", "Hub, xet", "Hub, no xet")
JOB = {"version": "0", "plan": "p"}
BIG = bytes(range(256)) * 5000
NAME = "model.safetensors"


# Sources ------------------------------------------------------------------------------------


def place_of(lab: Lab, kind: str) -> str:
    """The location of this kind of source, as a user gives it."""
    if kind == "cache":
        lab.fill_cache()
        lab.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lab.hub.log.clear()
    return str(lab.folder) if kind == "directory" else SRC


def open_source(lab: Lab, kind: str) -> Source:
    """Open the source of this kind."""
    place = place_of(lab, kind)
    return LocalSource(lab.folder) if kind == "directory" else HubSource(parse_ref(place))


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, lab: Lab) -> Source:
    """The checkpoint in a directory, on the Hub, and in the Hub's cache without a network."""
    lab.start()
    return open_source(lab, request.param)


def test_a_source_lists_its_files(lab: Lab, source: Source) -> None:
    """Every file of the checkpoint is listed with its size, folders with forward slashes."""
    assert {name: f.size for name, f in source.files().items()} == {
        name: len(data) for name, data in lab.source.items()
    }
    assert all(f.name == name for name, f in source.files().items())


def test_a_source_says_what_it_is(lab: Lab, source: Source) -> None:
    """A directory has a path; a repo has a name and the commit that is read."""
    identity = source.identity
    if identity.kind == "hub":
        assert (identity.id, identity.revision, identity.repo) == (SRC, lab.commit, SRC)
    else:
        assert (identity.id, identity.revision) == (str(lab.folder), None)
    assert identity.name in (SRC, lab.folder.name)


def test_a_source_reads_stretches(lab: Lab, source: Source) -> None:
    """Any part of any file can be read, also in the order in which headers are read."""
    shard = lab.source[SHARDS[1]]
    assert source.read(SHARDS[1], 0, 8) == shard[:8]
    assert source.read(SHARDS[1], 8, 1000) == shard[8:1008]
    assert source.read(SHARDS[1], 8, 40_000) == shard[8:40_008]
    assert source.read(SHARDS[0], 5, 0) == b""
    assert (
        source.read(SHARDS[0], len(lab.source[SHARDS[0]]) - 3, 3)[-1:]
        == (lab.source[SHARDS[0]][-1:])
    )
    for name in ("config.json", "extra/deep/notes.txt", "empty.txt"):
        assert source.read(name) == lab.source[name]


def test_a_source_streams(lab: Lab, source: Source) -> None:
    """An open file can be read from start to end, in pieces of any size."""
    for name in (SHARDS[0], "empty.txt", "tokenizer_config.json"):
        want = lab.source[name]
        found = bytearray(len(want))
        with source.open(name) as reader:
            for start in range(0, len(want), 100_000):
                reader.read_into(memoryview(found)[start : start + 100_000], start)
        assert found == want


def test_a_source_has_a_state_for_the_journal(lab: Lab, source: Source) -> None:
    """The state of a file is JSON, and is the same if the source is opened again."""
    states = {name: source.fingerprint(name) for name in source.files()}
    assert json.loads(json.dumps(states)) == states
    assert source.last_changed() >= 0
    again: Source
    again = (
        LocalSource(lab.folder)
        if source.identity.kind == "local"
        else HubSource(HubRef(SRC, lab.commit))
    )
    assert {name: again.fingerprint(name) for name in again.files()} == states


def test_another_content_is_another_state(lab: Lab) -> None:
    """A file that changes in a directory or on a branch gets another state."""
    hub = lab.start()
    before = [
        LocalSource(lab.folder).fingerprint(SHARDS[0]),
        HubSource(HubRef(SRC)).fingerprint(SHARDS[0]),
    ]
    (lab.folder / SHARDS[0]).write_bytes(lab.source[SHARDS[1]])
    hub.commit(SRC, {SHARDS[0]: lab.source[SHARDS[1]]})
    after = [
        LocalSource(lab.folder).fingerprint(SHARDS[0]),
        HubSource(HubRef(SRC)).fingerprint(SHARDS[0]),
    ]
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("name", ["a\\b.txt", "C:x.txt", "tab\t.txt"])
@pytest.mark.parametrize("kind", ["directory", "Hub"])
def test_names_that_could_leave_the_repo_are_refused(lab: Lab, kind: str, name: str) -> None:
    """A backslash, a drive letter or a control character in a name ends the run at once."""
    lab.start()
    (lab.folder / name).write_bytes(b"x")
    lab.hub.add_repo(SRC, {**lab.files, name: b"x"})
    with pytest.raises(CheckpointError, match="not a plain path"):
        open_source(lab, kind).files()


# Destinations -------------------------------------------------------------------------------


@pytest.fixture(params=DESTINATIONS)
def destinations(request: pytest.FixtureRequest, lab: Lab) -> Callable[..., Destination]:
    """A function that opens the same destination repeatedly, as reruns do."""
    lab.start(xet=request.param != "Hub, no xet")
    if request.param == "directory":
        return lambda **_: LocalDestination(lab.root / "out")
    return lambda **options: HubDestination(HubRef(DST), HubOptions(**options))


def contents(lab: Lab, destination: Destination) -> dict[str, bytes]:
    """The files that a reader of the destination finds, without the state of an unfinished run."""
    if isinstance(destination, LocalDestination):
        return {n: d for n, d in checkpoints.tree(destination.root).items() if ".moescale" not in n}
    found = lab.output() if lab.hub.has(DST) else {}
    return {name: data for name, data in found.items() if name != ".gitattributes"}


def write(destination: Destination, name: str, data: bytes, finish: bool = True) -> None:
    """Write a large file in several pieces."""
    with destination.writers.open(name, len(data), True) as writer:
        for start in range(0, len(data), 500_000):
            writer.write(memoryview(data)[start : start + 500_000])
        if finish:
            written = destination.commit_file(name, writer.finish())
            assert (written.size, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def publish(destination: Destination, name: str = NAME, data: bytes = BIG) -> None:
    """Perform a whole run: a large file, a small one, and the last ones."""
    write(destination, name, data)
    destination.write_small("README.md", b"# x\n")
    names = {name, "README.md", "config.json"}
    destination.publish({"config.json": b"{}"}, frozenset(names))
    destination.close()


def test_an_empty_destination_has_nothing(destinations: Callable[..., Destination]) -> None:
    """A destination that does not exist is empty and has no unfinished run."""
    destination = destinations()
    assert destination.existing() == {}
    assert destination.unfinished_job() is None


def test_a_destination_shows_a_whole_output(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """After `publish` all files are present with their bytes, and no run is unfinished."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    publish(destination)
    want = {NAME: BIG, "README.md": b"# x\n", "config.json": b"{}"}
    assert contents(lab, destination) == want
    again = destinations()
    assert again.unfinished_job() is None
    assert {n: s for n, s in again.existing().items() if n != ".gitattributes"} == {
        name: len(data) for name, data in want.items()
    }
    assert again.read_existing("config.json") == b"{}"
    assert again.changed_at("config.json") > 0


def test_an_unfinished_run_loads_nowhere_and_is_known(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """Before `publish` there is no config to load; job and finished files can be read back."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    write(destination, NAME, BIG)
    write(destination, "other.safetensors", BIG[:1000], finish=False)
    destination.write_small("README.md", b"# x\n")
    destination.close()
    assert "config.json" not in contents(lab, destination)
    assert "other.safetensors" not in contents(lab, destination)
    again = destinations()
    assert again.unfinished_job() == JOB
    again.begin(JOB, replace=False)
    assert {n: w.size for n, w in again.finished_files().items() if n.endswith("safetensors")} == {
        NAME: len(BIG)
    }
    assert again.finished_files()[NAME].sha256 == hashlib.sha256(BIG).hexdigest()
    again.write_small("README.md", b"# x\n")
    again.publish({"config.json": b"{}"}, frozenset({NAME, "README.md", "config.json"}))
    again.close()
    assert contents(lab, again)[NAME] == BIG


def test_a_replaced_run_starts_from_nothing(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """With `replace` the other run's files do not count, and are gone at the end."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    write(destination, "old.safetensors", BIG[::-1])
    destination.close()
    again = destinations(overwrite=True)
    again.check_replaceable()
    again.begin({"version": "1"}, replace=True)
    assert not again.finished_files()
    publish(again)
    assert set(contents(lab, again)) == {NAME, "README.md", "config.json"}


def test_old_content_goes_when_it_is_replaced(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """`publish` removes files that the new output lacks, in folders too."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    write(destination, "sub/old.safetensors", BIG)
    destination.publish({"config.json": b"{}"}, frozenset({"sub/old.safetensors", "config.json"}))
    destination.close()
    again = destinations(overwrite=True)
    again.begin({"version": "1"}, replace=True)
    publish(again, data=BIG[:3000])
    assert contents(lab, again)[NAME] == BIG[:3000]
    assert "sub/old.safetensors" not in contents(lab, again)


def test_a_finished_output_can_be_amended(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """A small file of a finished output can be replaced alone."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    publish(destination)
    destination.replace_small("config.json", b'{"a": 1}')
    assert contents(lab, destination) == {
        NAME: BIG,
        "README.md": b"# x\n",
        "config.json": b'{"a": 1}',
    }


def test_a_shard_that_is_given_up_can_be_written_again(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """An error inside a shard discards it; the same destination accepts it again."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    with pytest.raises(ZeroDivisionError), destination.writers.open(NAME, len(BIG), True) as writer:
        writer.write(memoryview(BIG)[:1000])
        raise ZeroDivisionError
    publish(destination)
    assert contents(lab, destination)[NAME] == BIG


def test_a_destination_copies_from_a_reader(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """A part of another file is appended and reported piece by piece."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    with (
        LocalSource(lab.folder).open(SHARDS[0]) as reader,
        destination.writers.open(NAME, 300_000, False) as writer,
    ):
        assert sum(writer.copy_from(reader, 0, 100_000)) == 100_000
        assert sum(writer.copy_from(reader, 100_000, 300_000)) == 200_000
        assert destination.commit_file(NAME, writer.finish()).size == 300_000
    destination.publish({"config.json": b"{}"}, frozenset({NAME, "config.json"}))
    destination.close()
    assert contents(lab, destination)[NAME] == lab.source[SHARDS[0]][:300_000]


def test_a_destination_knows_whether_it_is_the_source(
    lab: Lab, destinations: Callable[..., Destination]
) -> None:
    """It recognises the source that it contains, and no other."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    publish(destination)
    own: Source
    if isinstance(destination, LocalDestination):
        own = LocalSource(destination.root)
    else:
        own = HubSource(HubRef(DST, lab.hub.branches(DST)["main"]))
    assert destinations().is_same_as(own.identity)
    assert not destinations().is_same_as(LocalSource(lab.folder).identity)
    assert not destinations().is_same_as(HubSource(HubRef(SRC)).identity)


def test_two_jobs_do_not_mix(destinations: Callable[..., Destination]) -> None:
    """Another job sees the unfinished one, and differs from it."""
    destination = destinations()
    destination.begin(JOB, replace=False)
    destination.close()
    found = destinations().unfinished_job()
    assert found == JOB
    assert provenance.job_difference(provenance.decode_job(found), {**JOB, "version": "9"}) == (
        "another version"
    )


# Every source to every destination ----------------------------------------------------------


@pytest.mark.parametrize("to", DESTINATIONS)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_pair_makes_the_same_model(lab: Lab, kind: str, to: str) -> None:
    """Every source with every destination gives the expected shards and the same other files."""
    hub = lab.start(xet=to != "Hub, no xet")
    place = place_of(lab, kind)
    if kind == "cache" and to != "directory":
        outcome = lab.run(place, PLACE, "-k", "3")
        assert (outcome.code, hub.requests) == (3, [])
        return
    target = lab.root / "out"
    lab.done(place, str(target) if to == "directory" else PLACE, "-k", "3", "--verify")
    output = checkpoints.tree(target) if to == "directory" else lab.output()
    source = lab.source
    assert {name: output[name] for name in SHARDS} == rescaled(source)
    kept = set(checkpoints.EXTRAS) - {"README.md"}
    assert {name: output[name] for name in kept} == {name: source[name] for name in kept}
    made = {"README.md", "moescale.json", "config.json", "model.safetensors.index.json"}
    assert output.keys() == {*SHARDS, *kept, *made}
    digests = {f["name"]: f["sha256"] for f in json.loads(output["moescale.json"])["files"]}
    found = {n: hashlib.sha256(d).hexdigest() for n, d in output.items() if n != "moescale.json"}
    assert digests == found
    assert lab.source == source


def test_a_destination_refuses_to_go_on_with_a_stranger(
    destinations: Callable[..., Destination],
) -> None:
    """A journal of another job is refused, even if it appears just before `begin`."""
    destination = destinations()
    other = destinations()
    destination.begin({"version": "other"}, replace=False)
    destination.close()
    with pytest.raises(DestinationError):
        other.begin(JOB, replace=False)
