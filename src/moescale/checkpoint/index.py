"""Which files of a repo are the shards of the checkpoint, with an index or without."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moescale.checkpoint.header import Header
from moescale.checkpoint.json_text import parse_strict
from moescale.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = "model" + INDEX_SUFFIX
SINGLE = "model" + SUFFIX

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5,6})-of-(?P<total>[0-9]{5,6})\.safetensors")
_OTHER_WEIGHTS = re.compile(r"(consolidated|adapter_)")


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards in the order of their names, and the index that lists them, if there is one."""

    names: tuple[str, ...]
    index: str | None = None


def index_name(files: Iterable[str]) -> str | None:
    """The index that loaders read: ``model.safetensors.index.json``, or else the only one.

    Raises:
        CheckpointError: there are several, and none has the usual name.
    """
    found = [name for name in files if name.endswith(INDEX_SUFFIX) and "/" not in name]
    found = [name for name in found if not _OTHER_WEIGHTS.match(name)]
    if INDEX in found or not found:
        return INDEX if found else None
    if len(found) > 1:
        raise CheckpointError(f"several indexes and no {INDEX}: {', '.join(sorted(found))}")
    return found[0]


def parse_index(data: bytes, where: str) -> Mapping[str, str]:
    """The map from tensor to shard of an index.

    Raises:
        CheckpointError: it is not such a map.
    """
    try:
        text = data.decode()
        del data  # an index may have many megabytes
        weight_map = _scanned(text) or _parsed(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{where}: the shard of tensor {tensor!r} is not a file name")
    return weight_map


def _parsed(text: str) -> Any:
    content = parse_strict(text)
    return content.get("weight_map") if isinstance(content, dict) else None


def _scanned(text: str) -> dict[str, str] | None:
    """The weight map of a plain index; None for any other, which `json` has to read.

    `json` makes a string of every value, though few differ, and a list and a dictionary of all:
    with 100,000 tensors more memory than the plan itself.
    """
    opening = _OPENING.search(text)
    if opening is None:
        return None
    found: dict[str, str] = {}
    count, start, end = 0, opening.end(), ","
    position = start
    while end == ",":
        entry = _ENTRY.match(text, position)
        if entry is None:
            return None
        name, shard, end = entry.groups()
        found[name] = sys.intern(shard)
        count, position = count + 1, entry.end()
    if count != len(found):
        return None
    before, after = text[:start], text[position:]
    try:  # it has to be the map of the outermost object
        return found if _parsed(f"{before}}}}}") == _parsed(f"{before}}}{after}") == {} else None
    except ValueError:
        return None


_OPENING = re.compile(r'"weight_map"[ \t\n\r]*:[ \t\n\r]*\{')
_ENTRY = re.compile(
    r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*([,}])'
)


def shards_without_index(files: Iterable[str]) -> Shards:
    """The shards of a repo that has no index.

    ``model.safetensors`` alone is what loaders take; else all safetensors files of the top
    folder, which must be complete sets where their names count them.

    Raises:
        CheckpointError: there is none, or a part of a set is missing.
    """
    names = sorted(
        name
        for name in files
        if name.endswith(SUFFIX) and "/" not in name and not _OTHER_WEIGHTS.match(name)
    )
    if SINGLE in names:
        return Shards((SINGLE,))
    if not names:
        raise CheckpointError(
            "no safetensors weights found",
            hint="Weights in other forms (*.bin, *.gguf) must be converted first.",
        )
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _PART.fullmatch(name)
        if match:
            key = match["stem"], int(match["total"])
            sets.setdefault(key, set()).add(int(match["number"]))
    for (stem, total), numbers in sets.items():
        if missing := next((i for i in range(1, total + 1) if i not in numbers), None):
            raise CheckpointError(
                f"{stem}: part {missing} of {total} is missing, and there is no index",
                hint="The download is incomplete; fetch the missing files.",
            )
    return Shards(tuple(names))


def by_shard(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of the tensors of each shard."""
    listed: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        listed.setdefault(shard, []).append(tensor)
    return listed


def check_against_headers(
    shards: Shards, listed: dict[str, list[str]] | None, headers: Iterable[tuple[str, Header]]
) -> tuple[dict[str, Header], list[str]]:
    """Check that every tensor is in one shard only, and where the index says.

    Args:
        shards: the shards and the name of their index.
        listed: what the index lists, by shard. It is used up, shard by shard: with 100,000
            tensors both sides are large, and never in memory as a whole together.
        headers: the header of each shard, read as they are asked for.

    Returns:
        All headers by shard, and remarks on what the index does not list.

    Raises:
        CheckpointError: a tensor is missing from its shard, or is in two.
    """
    taken: dict[str, Header] = {}
    unlisted = 0
    for shard, header in headers:
        taken[shard] = header
        if listed is not None:
            names = listed.pop(shard)
            unlisted += len(header.tensors) - len(names)
            _check_listed(shard, header, names, shards.index)
    if listed is None or unlisted:  # else each name stands once in the index
        _check_unique(taken)
    return taken, [f"{shards.index} does not list {unlisted} of the tensors"] if unlisted else []


def _check_listed(shard: str, header: Header, names: Iterable[str], index: str | None) -> None:
    there = header.by_name
    for name in names:
        if name not in there:
            raise CheckpointError(
                f"{shard}: has no tensor {name!r}, though {index} says so",
                hint="Index and shards are of different versions; fetch the repo again.",
            )


def _check_unique(headers: Mapping[str, Header]) -> None:
    home: dict[str, str] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if (other := home.setdefault(tensor.name, shard)) != shard:
                raise CheckpointError(f"tensor {tensor.name!r} is in {other} and in {shard}")


def make_index(headers: Mapping[str, Header]) -> bytes:
    """An index in the layout of huggingface_hub: total size, then tensor by tensor."""
    weight_map = {t.name: shard for shard, header in headers.items() for t in header.tensors}
    size = sum(t.nbytes for header in headers.values() for t in header.tensors)
    content = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
