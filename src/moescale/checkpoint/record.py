"""Where an output says what it is: in a file of its own, or in the header of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moescale.checkpoint.gguf.header import parse_header
from moescale.checkpoint.gguf.names import first_of
from moescale.errors import CheckpointError

PROVENANCE = "moescale.json"
KEY = "moescale.provenance"
"""The key of a GGUF file that holds the same."""

Read = Callable[[str, int, int], bytes]
"""Gives a stretch of a file: its name, from where, and how many bytes at most."""


def recorded(files: Mapping[str, int], read: Read) -> bytes | None:
    """The provenance of an output, as its text; None where there is none.

    Args:
        files: name and size of all its files.
        read: reads one of them.
    """
    if PROVENANCE in files:
        return read(PROVENANCE, 0, files[PROVENANCE])
    if (first := first_of(files)) is None:
        return None

    def stretch(start: int, size: int) -> bytes:
        return read(first, start, size)

    try:
        said = parse_header(stretch, files[first], first).get(KEY)
    except CheckpointError:
        return None
    return said.encode(errors="surrogateescape") if isinstance(said, str) else None
