"""The shards of a checkpoint, their headers, and the index of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from moescale.checkpoint.header import LENGTH_BYTES, Header, header_length, parse_header
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
from moescale.repos.base import FileInfo, Source, check_name


def read_shards(
    source: Source, files: Mapping[str, FileInfo]
) -> tuple[Shards, dict[str, Header], list[str]]:
    """The shards, their headers by name, and what is wrong with the index but does no harm."""
    shards, listed = _find_shards(source, files)
    headers, warnings = check_against_headers(
        shards, listed, _read_headers(source, files, shards.names)
    )
    return shards, headers, warnings


def _find_shards(
    source: Source, files: Mapping[str, FileInfo]
) -> tuple[Shards, dict[str, list[str]] | None]:
    """The shards, and what the index lists of each."""
    index = index_name(files)
    if index is None:
        return shards_without_index(files), None
    listed = by_shard(parse_index(source.read(index), index))
    names = tuple(sorted(listed))
    for name in names:
        check_name(name, index)
        if name not in files:
            raise CheckpointError(
                f"{index}: lists {name}, which is not there",
                hint="The download is incomplete; fetch the missing file.",
            )
    return Shards(names, index), listed


def _read_headers(
    source: Source, files: Mapping[str, FileInfo], names: Sequence[str]
) -> Iterator[tuple[str, Header]]:
    """The headers of all shards; several at once where each is a request."""

    def read(name: str) -> Header:
        size = files[name].size
        length = header_length(source.read(name, 0, LENGTH_BYTES), size, name)
        return parse_header(source.read(name, LENGTH_BYTES, length), size, name)

    if source.identity.kind == "local":
        yield from ((name, read(name)) for name in names)
        return
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from zip(names, pool.map(read, names), strict=True)


def output_index(shards: Shards, headers: Mapping[str, Header]) -> tuple[str, bytes | None] | None:
    """The name of the output's index, and its content where it has to be made."""
    if shards.index is not None:
        return shards.index, None
    return (INDEX, make_index(headers)) if len(shards.names) > 1 else None
