"""Guesses the routed down-projections of an unknown model type, for error hints."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable


def likely_down_projection(names: Collection[str]) -> str | None:
    """The first name that looks like a routed down-projection; None if none does."""
    experts, down = re.compile(r"experts?\b"), re.compile("down|w2|fc2|wo|output")
    for name in sorted(names):
        match = experts.search(name)
        if match and down.search(name, match.end()) and "share" not in name:
            return name
    return _looks_numbered(names)


_NUMBERED = re.compile(r"[^0-9]*\.[0-9]+(\.[^0-9]*)\.[0-9]+\.(.+)\.weight")
_NOT_DOWN = re.compile("norm|(?<![a-z])(?:gate|router|up|in|wi|[wv][13]|fc[13])(?![a-z])")


def _looks_numbered(names: Iterable[str]) -> str | None:
    """The first weight of a numbered expert, if only one kind of matrix qualifies."""
    found: dict[str, str] = {}
    for name in sorted(names, reverse=True):
        match = _NUMBERED.fullmatch(name)
        routed = match and "share" not in name and re.search("moe|expert", match[1])
        if match and routed and not _NOT_DOWN.search(match[2]):
            found[match[2]] = name
    return found.popitem()[1] if len(found) == 1 else None
