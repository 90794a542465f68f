"""Reads the provenance of an output, from `moescale.json` or from the header of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from moescale.checkpoint.gguf.names import first_of, is_gguf, part_name
from moescale.errors import CheckpointError

PROVENANCE = "moescale.json"
KEY = "moescale.provenance"
"""The GGUF key that holds the provenance."""

Read = Callable[[str, int, int], bytes]
"""Reads part of a file, given its name, the offset and the maximum number of bytes."""


def stored_provenance(files: Mapping[str, int], read: Read) -> bytes | None:
    """The text of an output's provenance; None if it has none.

    Args:
        files: the size of each of its files, by name.
        read: reads part of one of them.
    """
    if PROVENANCE in files:
        return read(PROVENANCE, 0, files[PROVENANCE])
    if (first := first_of(files)) is None:
        return None
    from moescale.checkpoint.gguf.header import parse_header

    def stretch(start: int, size: int) -> bytes:
        return read(first, start, size)

    try:
        record = parse_header(stretch, files[first], first).get(KEY)
    except CheckpointError:
        return None
    return record.encode(errors="surrogateescape") if isinstance(record, str) else None


def names_here(listed: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """The current name of each file that the provenance lists; GGUF files may have been renamed."""
    here = {part_name(name): name for name in files if is_gguf(name)}
    stems = {part.stem for part in here}
    if len(stems) != 1:
        return {name: name for name in listed}
    (stem,) = stems
    parts = {name: replace(part_name(name), stem=stem) for name in listed if is_gguf(name)}
    return {name: here.get(parts[name], name) if name in parts else name for name in listed}
