"""Reads the provenance of a finished output, and compares its files with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from moescale.checkpoint.rewrite import PIECE
from moescale.checkpoint.stored_provenance import PROVENANCE, names_here, stored_provenance
from moescale.planning import provenance
from moescale.results import Record
from moescale.storage.base import FileInfo, Source, io_errors

SMALL_BYTES = 32 << 20
"""Files up to this size are always read."""


def read_record(output: Source, verify: bool) -> Record | None:
    """The record of an output; None if it has no provenance.

    Args:
        output: the output.
        verify: read every file with a recorded SHA-256, whatever its size.
    """
    files = output.files()
    data = stored_provenance({name: file.size for name, file in files.items()}, output.read)
    found = None if data is None else provenance.decode(data)
    if found is None or "moescale" not in found.content:
        return None
    names = names_here(found.files, files)
    listed = {names[name]: value for name, value in found.files.items()}
    wanted = {n: sum_ for n, (_, sum_) in listed.items() if sum_ and n in files}
    read = {n for n in wanted if verify or files[n].size <= SMALL_BYTES}
    differences = dict(_differences(output, files, listed, read))
    sized = len(listed.keys() & files.keys()) - len(read)
    words = None if found.options is None else provenance.in_words(found.options)
    return Record(output.identity.id, found.content, words, differences, len(read), sized)


def _differences(
    output: Source,
    files: Mapping[str, FileInfo],
    listed: Mapping[str, tuple[object, object]],
    read: set[str],
) -> Iterator[tuple[str, str]]:
    for name, (size, digest) in listed.items():
        if name not in files:
            yield name, "is missing"
        elif files[name].size != size:
            yield name, f"has {files[name].size} bytes instead of {size}"
        elif name in read and _sha256(output, files[name]) != digest:
            yield name, "has changed since it was written"
    if PROVENANCE in files:  # a GGUF file contains its own, and may have other files beside it
        for name in sorted(files.keys() - listed.keys() - {PROVENANCE, ".gitattributes"}):
            yield name, "was not written by that run"


def _sha256(output: Source, file: FileInfo) -> str:
    """The SHA-256 of a file, read piece by piece."""
    digest, buffer, position = hashlib.sha256(), memoryview(bytearray(PIECE)), 0
    with io_errors(file.name), output.open(file.name) as reader:
        while position < file.size:
            piece = buffer[: min(PIECE, file.size - position)]
            reader.read_into(piece, position)
            digest.update(piece)
            position += len(piece)
    return digest.hexdigest()
