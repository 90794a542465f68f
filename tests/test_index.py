"""Which files are the shards, with an index and without."""

from __future__ import annotations

import json
from collections.abc import Mapping

import checkpoints
import pytest

from moescale.checkpoint.header import Header, header_length, parse_header
from moescale.checkpoint.index import (
    INDEX,
    Shards,
    by_shard,
    check_against_headers,
    index_name,
    make_index,
    parse_index,
    shards_without_index,
)
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
    """The usual name wins; else the only index at the top; indexes of twins do not count."""
    assert index_name(files) == found


def test_two_unusual_indexes_are_refused() -> None:
    """Which of two indexes counts is not guessed."""
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*b\.safetensors"):
        index_name(["b.safetensors.index.json", "a.safetensors.index.json"])


# What it says -------------------------------------------------------------------------------------


def test_the_weight_map_is_read() -> None:
    """Only the map matters; whatever stands beside it does not."""
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
    """However an index is written, it is read as `json` reads it, or refused."""
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
        (b'{"weight_map": {"a": "s", "a": "t"}}', "stands twice"),
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
    """One line that names the file and what is wrong with it."""
    with pytest.raises(CheckpointError, match=why) as caught:
        parse_index(data, INDEX)
    assert caught.value.message.startswith(INDEX)
    assert len(caught.value.message.splitlines()) == 1


# Without an index ---------------------------------------------------------------------------------


def test_a_single_shard_needs_no_index() -> None:
    """``model.safetensors`` alone is what loaders take, whatever lies beside it."""
    found = shards_without_index(["model.safetensors", "other.safetensors", "config.json"])
    assert found == Shards(("model.safetensors",))


def test_a_complete_set_is_taken() -> None:
    """Shards that count themselves are taken when all are there, in the order of their names."""
    names = [f"model-{i:05}-of-00003.safetensors" for i in (3, 1, 2)]
    assert shards_without_index(names).names == tuple(sorted(names))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_incomplete_set_is_refused(missing: int) -> None:
    """A missing part is named, before anything is read."""
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
    """Twins, adapters and subfolders are no weights of the model."""
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        shards_without_index(names)


# Index and headers --------------------------------------------------------------------------------


def remarks(
    shards: Shards, weight_map: dict[str, str] | None, found: dict[str, Header]
) -> list[str]:
    """What a check says that passes; it gives back every header."""
    listed = None if weight_map is None else by_shard(weight_map)
    taken, said = check_against_headers(shards, listed, found.items())
    assert taken == found
    return said


def test_index_and_headers_that_agree_pass() -> None:
    """Nothing is said where all is well."""
    found = headers({"s1": ["a", "b"], "s2": ["c"]})
    assert remarks(Shards(("s1", "s2"), INDEX), {"a": "s1", "b": "s1", "c": "s2"}, found) == []
    assert remarks(Shards(("s1", "s2")), None, found) == []


def test_a_tensor_that_the_index_misplaces_is_named() -> None:
    """The shard that should hold it does not, so index and shards do not belong together."""
    found = headers({"s1": ["a"], "s2": ["b"]})
    with pytest.raises(CheckpointError, match="s1: has no tensor 'b'"):
        remarks(Shards(("s1", "s2"), INDEX), {"a": "s1", "b": "s1"}, found)


def test_a_tensor_in_two_shards_is_refused() -> None:
    """Which of two copies counts is not guessed."""
    with pytest.raises(CheckpointError, match="'a' is in s1 and in s2"):
        remarks(Shards(("s1", "s2")), None, headers({"s1": ["a"], "s2": ["a"]}))


def test_unlisted_tensors_are_mentioned() -> None:
    """Tensors that the index does not list are counted in a remark."""
    [remark] = remarks(Shards(("s1",), INDEX), {"a": "s1"}, headers({"s1": ["a", "b"]}))
    assert "does not list 1 " in remark


def test_a_made_index_is_what_loaders_expect() -> None:
    """The index of shards that come without one lists every tensor and the total size."""
    found = headers({"s2": ["c"], "s1": ["b", "a"]})
    made = json.loads(make_index(found))
    assert made["metadata"] == {"total_size": 6}
    assert made["weight_map"] == {"a": "s1", "b": "s1", "c": "s2"}
    assert list(made["weight_map"]) == ["a", "b", "c"]
