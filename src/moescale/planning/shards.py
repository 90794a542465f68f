"""The shards of a checkpoint, their headers, and the index of the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from moescale.checkpoint.safetensors.header import LENGTH_BYTES, header_length, parse_header
from moescale.checkpoint.safetensors.index import (
    INDEX,
    SINGLE,
    SUFFIX,
    Faults,
    Shards,
    by_shard,
    check_against_headers,
    index_name,
    make_index,
    parse_index,
    shards_without_index,
)
from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import CheckpointError
from moescale.storage.base import FileInfo, Source, check_name

PIECE = 1 << 20
"""Bytes of two tensors to compare at a time."""


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The set of weights that loaders read.

    Attributes:
        shards: names of the shards, and of their index.
        headers: by name of the shard, without copies of tensors that are not kept.
        faults: differences between the index and the headers.
        left_out: files that do not belong in the output, each with the reason.
    """

    shards: Shards
    headers: Mapping[str, Header]
    faults: Faults
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_shards(source: Source, files: Mapping[str, FileInfo]) -> ShardSet:
    """The set of weights that loaders read.

    Raises:
        CheckpointError: a shard is damaged or missing, or loaders would read different sets.
    """
    shards, listed, left_out = _find_shards(source, files)
    headers, faults = check_against_headers(
        shards, listed, read_headers(source, files, shards.names)
    )
    if shards.index is not None and SINGLE in files and SINGLE not in headers:
        left_out = {**left_out, SINGLE: _same_as_set(source, files, shards.index, headers)}
    return ShardSet(shards, headers, faults, left_out)


def _find_shards(
    source: Source, files: Mapping[str, FileInfo]
) -> tuple[Shards, dict[str, list[str]] | None, dict[str, str]]:
    """The shards, the tensors that the index lists in each, and the index if it is left out."""
    index = index_name(files)
    if index is None:
        return shards_without_index(files), None, {}
    listed = by_shard(parse_index(source.read(index), index))
    absent = [name for name in sorted(listed) if check_name(name, index) not in files]
    if absent and SINGLE in files and SINGLE not in listed:
        why = f"stale: it lists {absent[0]}, which is missing, and loaders read {SINGLE}"
        return Shards((SINGLE,)), None, {index: why}
    if absent:
        raise _absent(source, files, index, absent[0], listed)
    return Shards(tuple(sorted(listed)), index), listed, {}


def _absent(
    source: Source,
    files: Mapping[str, FileInfo],
    index: str,
    absent: str,
    listed: Mapping[str, Sequence[str]],
) -> CheckpointError:
    """The error for a missing shard: its tensors may be in files with other names."""
    wanted = {tensor for shard, names in listed.items() if shard not in files for tensor in names}
    others = [n for n in files if n.endswith(SUFFIX) and "/" not in n and n not in listed]
    found_in: dict[str, str] = {}
    try:
        for name, header in read_headers(source, files, others):
            found_in |= dict.fromkeys((t.name for t in header.tensors), name)
    except CheckpointError:  # a damaged file proves nothing
        found_in = {}
    if wanted <= found_in.keys():
        return CheckpointError(
            f"{index}: lists {absent}, which is missing; its tensors are in other files, such as"
            f" {found_in[min(wanted)]}",
            hint="The index is stale: remove it, or write a new one.",
        )
    return CheckpointError(
        f"{index}: lists {absent}, which is missing",
        hint="The download is incomplete; fetch the missing file.",
    )


def _same_as_set(
    source: Source, files: Mapping[str, FileInfo], index: str, headers: Mapping[str, Header]
) -> str:
    """The reason to leave out the single file beside an indexed set.

    Raises:
        CheckpointError: the file holds something else.
    """
    one = {SINGLE: read_header(source, files[SINGLE])}
    if not same_weights(source, one, headers):
        raise two_sets(source, index)
    return f"the same tensors and bytes as the shards of {index}, which are kept"


def two_sets(source: Source, other: str) -> CheckpointError:
    """The error for two sets of weights of which loaders read different ones."""
    why = " or were not compared, since they are on the Hub" if source.remote else ""
    return CheckpointError(
        f"{SINGLE} and the shards of {other} are two sets of weights, which differ{why}:"
        " transformers reads the first, other loaders the second",
        hint="Remove the set that is not the model.",
    )


def same_weights(source: Source, one: Mapping[str, Header], other: Mapping[str, Header]) -> bool:
    """Whether two sets of shards hold the same tensors.

    Always False on the Hub, where a comparison would take as long as two downloads.
    """
    by_name = {t.name: (shard, t) for shard, header in other.items() for t in header.tensors}
    pairs = {s: [(t, by_name.get(t.name)) for t in h.tensors] for s, h in one.items()}
    found = [(t, entry[1]) for pair in pairs.values() for t, entry in pair if entry]
    alike = all((a.dtype, a.shape) == (b.dtype, b.shape) for a, b in found)
    if not alike or not len(found) == len(by_name) == sum(map(len, pairs.values())):
        return False
    if source.remote:
        return False
    return all(
        _same_bytes(source, shard, tensor, *entry)
        for shard, pair in pairs.items()
        for tensor, entry in pair
        if entry is not None
    )


def _same_bytes(source: Source, one: str, tensor: Tensor, other: str, twin: Tensor) -> bool:
    return all(
        source.read(one, tensor.start + at, min(PIECE, tensor.nbytes - at))
        == source.read(other, twin.start + at, min(PIECE, tensor.nbytes - at))
        for at in range(0, tensor.nbytes, PIECE)
    )


def read_header(source: Source, file: FileInfo) -> Header:
    """The header of one file.

    Raises:
        CheckpointError: the file is damaged, or not safetensors.
    """
    length = header_length(source.read(file.name, 0, LENGTH_BYTES), file.size, file.name)
    return parse_header(source.read(file.name, LENGTH_BYTES, length), file.size, file.name)


def shard_header(source: Source, file: FileInfo) -> Header | None:
    """The header of a shard; None if the file is not one, whatever its name."""
    try:
        return read_header(source, file) if file.name.endswith(SUFFIX) else None
    except CheckpointError:
        return None


def read_headers(
    source: Source, files: Mapping[str, FileInfo], names: Iterable[str]
) -> Iterator[tuple[str, Header]]:
    """The headers of the named files; several are read at a time if each read is a request."""
    names = list(names)
    if source.parallel_reads == 1:
        yield from ((name, read_header(source, files[name])) for name in names)
        return
    with ThreadPoolExecutor(source.parallel_reads) as pool:
        headers = pool.map(lambda name: read_header(source, files[name]), names)
        yield from zip(names, headers, strict=True)


def output_index(found: ShardSet) -> tuple[str, bytes | None] | None:
    """The name of the output's index, and its content if it is new.

    Without an index, loaders find only ``model.safetensors``.
    """
    if found.shards.index is not None:
        return found.shards.index, None
    if SINGLE in found.headers:
        return None
    return INDEX, make_index(found.headers)
