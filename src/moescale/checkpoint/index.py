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
    weight_map: Mapping[str, str] | None = None


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
        content: Any = parse_strict(data.decode())
    except ValueError as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{where}: the shard of tensor {tensor!r} is not a file name")
        weight_map[tensor] = sys.intern(shard)  # few names, each many times
    return weight_map


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


def check_against_headers(shards: Shards, headers: Mapping[str, Header]) -> list[str]:
    """Check that every tensor is in one shard only, and where the index says.

    Returns:
        Remarks on what the index does not list.

    Raises:
        CheckpointError: a tensor is missing from its shard, or is in two.
    """
    home: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in home:
                raise CheckpointError(f"tensor {name!r} is in {home[name]} and in {shard}")
            home[name] = shard
    if shards.weight_map is None:
        return []
    for name, shard in shards.weight_map.items():
        if home.get(name) != shard:
            raise CheckpointError(
                f"{shard}: has no tensor {name!r}, though {shards.index} says so",
                hint="Index and shards are of different versions; fetch the repo again.",
            )
    unlisted = len(home) - len(shards.weight_map)
    return [f"{shards.index} does not list {unlisted} of the tensors"] if unlisted else []


def make_index(headers: Mapping[str, Header]) -> bytes:
    """An index in the layout of huggingface_hub: total size, then tensor by tensor."""
    weight_map = {name: shard for shard, header in headers.items() for name in header.tensors}
    size = sum(t.nbytes for header in headers.values() for t in header.tensors.values())
    content = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
