"""How a journal describes a finished file, in a directory or on a branch."""

from __future__ import annotations

import re
from typing import Any

from moescale.errors import CheckpointError
from moescale.storage.base import FileRecord, check_name

NOT_A_JOURNAL = "not a journal of moescale"

PARSE_ERRORS = (ValueError, TypeError, KeyError, RecursionError, CheckpointError)
_SHA256 = re.compile("[0-9a-f]{64}")


def parse_entry(name: Any, entry: Any) -> FileRecord:
    """The record of a finished file; raises one of `PARSE_ERRORS` if moescale did not write it."""
    size, sha256 = entry["size"], entry["sha256"]
    if [type(name), type(size)] != [str, int] or size < 0:
        raise ValueError
    if not (sha256 is None or _SHA256.fullmatch(sha256)):
        raise ValueError
    check_name(name, "journal")
    return FileRecord(size, sha256)
