"""Which files are the shards, with and without an index."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import pytest
from support import checkpoints

from moescale.checkpoint.safetensors.header import header_length, parse_header
from moescale.checkpoint.safetensors.index import (
    INDEX,
    Shards,
    by_shard,
    check_against_headers,
    index_name,
    make_index,
    parse_index,
    shards_without_index,
)
from moescale.checkpoint.tensor import Header
from moescale.errors import CheckpointError


def headers(shards: Mapping[str, list[str]]) -> dict[str, Header]:
    """Headers of shards with these tensors, of two bytes each."""
    result = {}
    for name, tensors in shards.items():
        file = checkpoints.shard(dict.fromkeys(tensors, ("U8", (2,), b"ab")))
        length = header_length(file[:8], len(file), name)
        result[name] = parse_header(file[8 : 8 + length], len(file), name)
    return result


def index(content: object) -> bytes:
    """The bytes of an index."""
    return json.dumps(content).encode()


# Which index --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], None),
        (["model.safetensors"], None),
        ([INDEX], INDEX),
        (["diffusion.safetensors.index.json"], "diffusion.safetensors.index.json"),
        (["x.safetensors.index.json", INDEX], INDEX),
        (["consolidated.safetensors.index.json"], None),
        (["sub/model.safetensors.index.json"], None),
        (["pytorch_model.bin.index.json"], None),
    ],
)
def test_the_index_is_the_one_that_loaders_read(files: list[str], found: str | None) -> None:
    """The usual name wins, else the only index at the top level; indexes of twins do not count."""
    assert index_name(files) == found


def test_two_unusual_indexes_are_refused() -> None:
    """Two candidate indexes are refused instead of guessing."""
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*b\.safetensors"):
        index_name(["b.safetensors.index.json", "a.safetensors.index.json"])


# What the index says ------------------------------------------------------------------------------


def test_the_weight_map_is_read() -> None:
    """Only the weight map matters; other entries are ignored."""
    data = index({"metadata": {"total_size": 1.5e9, "x": None}, "weight_map": {"a": "s"}, "z": []})
    assert parse_index(data, INDEX) == {"a": "s"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"weight_map":{"a":"s"}}', {"a": "s"}),
        ('{"metadata":{"weight_map":{"x":"y"}},"weight_map":{"a":"s"}}', {"a": "s"}),
        ('{"metadata":{"weight_map":{"x":"y"}},"weight_map":{}}', None),
        ('{"metadata":{"weight_map":{"x":"y"}}}', None),
        ('[{"weight_map":{"x":"y"}}]', None),
        (r'{"\"weight_map":{"x":"y"},"weight_map":{"a":"s"}}', {"a": "s"}),
        (r'{"weight_map":{"\u0061":"s"}}', {"a": "s"}),
        ('{"weight_map":{"a":"s"},"z":{"weight_map":{"x":"y"}}}', {"a": "s"}),
        ('{"weight_map":{"x":"y"},"weight_map":{"a":"s"}}', None),
        ('{"weight_map":{"a":"s","a":"s"}}', None),
        ('{"weight_map":{"a":"s",}}', None),
        ('{"weight_map":{"a":"s"}', None),
        ('{"weight_map":{"a":"s"}}}', None),
        ('{"weight_map":{"a":"\n"}}', None),
        ('{"weight_map":{"a":"s","b":1}}', None),
    ],
)
def test_the_map_of_the_outermost_object_counts(text: str, found: dict[str, str] | None) -> None:
    """Any spelling of an index is read as `json` reads it, or refused."""
    if found is not None:
        assert parse_index(text.encode(), INDEX) == found == json.loads(text)["weight_map"]
        return
    with pytest.raises(CheckpointError):
        parse_index(text.encode(), INDEX)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"weight_map": {"a": "s", "a": "t"}}', "occurs twice"),
        (b"[" * 100_000, "nested"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "'a'"),
        (b'{"weight_map": {"a": null}}', "'a'"),
    ],
    ids=range(10),
)
def test_a_broken_index_is_refused(data: bytes, why: str) -> None:
    """One line names the file and the fault."""
    with pytest.raises(CheckpointError, match=why) as caught:
        parse_index(data, INDEX)
    assert caught.value.message.startswith(INDEX)
    assert len(caught.value.message.splitlines()) == 1


# Without an index ---------------------------------------------------------------------------------


def test_a_single_shard_needs_no_index() -> None:
    """Loaders use ``model.safetensors`` alone, whatever other files there are."""
    found = shards_without_index(["model.safetensors", "other.safetensors", "config.json"])
    assert found == Shards(("model.safetensors",))


def test_a_complete_set_is_taken() -> None:
    """Numbered shards are accepted if all of them exist, in the order of their names."""
    names = [f"model-{i:05}-of-00003.safetensors" for i in (3, 1, 2)]
    assert shards_without_index(names).names == tuple(sorted(names))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_incomplete_set_is_refused(missing: int) -> None:
    """The error names a missing shard before anything is read."""
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3) if i != missing]
    with pytest.raises(CheckpointError, match=f"part {missing} of 3 is missing"):
        shards_without_index(names)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["pytorch_model.bin"],
        ["consolidated.safetensors"],
        ["adapter_model.safetensors"],
        ["sub/model.safetensors"],
    ],
)
def test_no_shards_is_an_error(names: list[str]) -> None:
    """Twins, adapters and subfolders are not weights of the model."""
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        shards_without_index(names)


@pytest.mark.parametrize(
    "spelling",
    [
        "model-{:05}-of-{:05}",
        "model-{:04}-of-{:04}",
        "model-{}-of-{}",
        "model-{:05}-of-{:04}",
        "model_{:05}-of-{:05}",
        "model-{:05}_of_{:05}",
        "model.safetensors-{:05}-of-{:05}",
        "{:05}-of-{:05}",
        "model-{:05}-of-{:07}",
        "model-part-{}-of-{}-fp8",
        "Model {} of {}",
        "model{}of{}",
        "MODEL-{:03}-OF-{:03}",
        "model-{{x}}-{}-of-{}",
    ],
)
def test_any_count_in_a_name_counts(spelling: str) -> None:
    """However the total is written, the missing part is named as its file would be."""
    files = [f"{spelling.format(i, 3)}.safetensors" for i in (1, 2, 3)]
    for missing in files[1:]:
        with pytest.raises(CheckpointError, match="is missing") as caught:
            shards_without_index(name for name in files if name != missing)
        assert caught.value.message.startswith(f"{missing}: part ")
    assert set(shards_without_index(files).names) == set(files)


def test_a_set_may_count_from_zero() -> None:
    """Parts 0 to M - 1 are complete; without one of them the set is incomplete."""
    files = [f"model-{i:05}-of-00003.safetensors" for i in range(3)]
    assert shards_without_index(files).names == tuple(files)
    with pytest.raises(CheckpointError, match=r"^model-00001-of-00003\.safetensors"):
        shards_without_index([files[0], files[2]])


@pytest.mark.parametrize(
    "stem", ["pytorch_model-00001-TP-000", "tensor00000", "proof2", "model-2of"]
)
def test_names_without_a_total_say_nothing_of_parts(stem: str) -> None:
    """A number without a total does not make a file part of a set."""
    assert shards_without_index([f"{stem}.safetensors"]).names == (f"{stem}.safetensors",)


def test_a_total_beyond_measure_is_an_answer_at_once() -> None:
    """A huge total in a file name is not counted up to."""
    with pytest.raises(CheckpointError, match="part 2 of 999999999"):
        shards_without_index(["model-1-of-999999999.safetensors"])


# Index and headers --------------------------------------------------------------------------------


def checked(
    weight_map: dict[str, str] | None, found: dict[str, Header], scaled: Collection[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """The tensors that count, by shard, and the remarks if `scaled` are to be scaled."""
    listed = None if weight_map is None else by_shard(weight_map)
    shards = Shards(tuple(found), None if weight_map is None else INDEX)
    taken, faults = check_against_headers(shards, listed, found.items())
    return {s: [t.name for t in h.tensors] for s, h in taken.items()}, faults.check(scaled)


def test_index_and_headers_that_agree_pass() -> None:
    """There is no remark if everything agrees."""
    found = headers({"s1": ["a", "b"], "s2": ["c"]})
    all_there = {"s1": ["a", "b"], "s2": ["c"]}
    assert checked({"a": "s1", "b": "s1", "c": "s2"}, found) == (all_there, [])
    assert checked(None, found) == (all_there, [])


def test_a_listed_tensor_that_is_not_there_is_said() -> None:
    """Loaders ignore it; if the tensor is to be scaled, the index is stale."""
    found = headers({"s1": ["a"], "s2": ["b"]})
    weight_map = {"a": "s1", "x": "s1", "b": "s2"}
    taken, [remark] = checked(weight_map, found, {"a", "b"})
    assert (taken, "'x' in s1" in remark) == ({"s1": ["a"], "s2": ["b"]}, True)
    with pytest.raises(CheckpointError, match="lists 'x' in s1") as caught:
        checked(weight_map, found, {"x"})
    assert "stale" in str(caught.value)
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("home", ["s1", "s2"])
def test_of_two_copies_the_listed_one_counts(home: str) -> None:
    """The other copy stays in its shard but is not part of the model; both shards are named."""
    found = headers({"s1": ["a", "x"], "s2": ["x", "b"]})
    taken, [remark] = checked({"a": "s1", "b": "s2", "x": home}, found)
    assert [shard for shard, names in taken.items() if "x" in names] == [home]
    assert all(word in remark for word in ("'x'", "s1", "s2", f"the one in {home} is used"))


def test_without_an_index_the_last_copy_counts() -> None:
    """A loader that reads all shards in the order of their names ends up with that copy."""
    taken, [remark] = checked(None, headers({"s1": ["x"], "s2": ["x"], "s3": ["x", "b"]}))
    assert taken == {"s1": [], "s2": [], "s3": ["x", "b"]}
    assert "'x' is in s3 and in s1 (and 1 more)" in remark


@pytest.mark.parametrize("weight_map", [None, {"x": "s2"}])
def test_two_copies_of_what_is_scaled_are_refused(weight_map: dict[str, str] | None) -> None:
    """Loaders differ in which copy they use, so the error names the tensor and both shards."""
    if weight_map:
        weight_map["y"] = "s1"
    with pytest.raises(CheckpointError, match="'x'") as caught:
        checked(weight_map, headers({"s1": ["y", "x"], "s2": ["x"]}), {"x"})
    assert all(word in caught.value.message for word in ("s1", "s2"))
    assert "fetch" not in str(caught.value)


def test_unlisted_tensors_are_mentioned() -> None:
    """A remark names and counts tensors that the index does not list."""
    _, [remark] = checked({"a": "s1"}, headers({"s1": ["a", "b"]}))
    assert remark.endswith("does not list 'b'")
    found = headers({"s1": ["d", "a"], "s2": ["c", "b", "e"]})
    _, [remark] = checked({"a": "s1", "e": "s2"}, found)
    assert remark.endswith("does not list 'b' (and 2 more)")


def test_a_made_index_is_what_loaders_expect() -> None:
    """The index that is made for shards without one lists every tensor and the total size."""
    found = headers({"s2": ["c"], "s1": ["b", "a"]})
    made = json.loads(make_index(found))
    assert made["metadata"] == {"total_size": 6}
    assert made["weight_map"] == {"a": "s1", "b": "s1", "c": "s2"}
    assert list(made["weight_map"]) == ["a", "b", "c"]
