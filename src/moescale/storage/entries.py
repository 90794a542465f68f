"""What the journal of an unfinished run says of a file, in a directory or on a branch."""

from __future__ import annotations

import re
from typing import Any

from moescale.errors import CheckpointError
from moescale.storage.base import Written, check_name

NOT_OURS = "not a journal of moescale"

UNREADABLE = (ValueError, TypeError, KeyError, RecursionError, CheckpointError)
_SHA256 = re.compile("[0-9a-f]{64}")


def listed(name: Any, entry: Any) -> Written:
    """What a journal says of a file; raises one of `UNREADABLE` if that is none of ours."""
    size, sha256 = entry["size"], entry["sha256"]
    if [type(name), type(size)] != [str, int] or size < 0:
        raise ValueError
    if not (sha256 is None or _SHA256.fullmatch(sha256)):
        raise ValueError
    check_name(name, "journal")
    return Written(size, sha256)
