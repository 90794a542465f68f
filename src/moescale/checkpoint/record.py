"""Where a finished output says what it is: in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection

PROVENANCE = "moescale.json"


def recorded(names: Collection[str], read: Callable[[str], bytes]) -> bytes | None:
    """The provenance of an output, as its text; None where there is none.

    Args:
        names: of all its files.
        read: gives the content of one of them.
    """
    return read(PROVENANCE) if PROVENANCE in names else None
