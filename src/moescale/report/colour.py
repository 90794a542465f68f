"""Bold and colour, where a terminal shows them and nobody asked for plain text."""

from __future__ import annotations

import os
import re
from typing import TextIO

BOLD, RED, GREEN, YELLOW = "1", "1;31", "1;32", "1;33"
"""Parameters of the escape sequence that starts each."""

_CHOSEN = re.compile(r"^->  .*$", re.MULTILINE)
_PROVED = re.compile(r"^Verified", re.MULTILINE)
_COUNT = re.compile(r"^experts per token .*$", re.MULTILINE)


def shows_colour(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal with colours; see https://no-color.org."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if os.name == "nt" and not os.environ.keys() & {"WT_SESSION", "ANSICON", "TERM"}:
        return False
    return stream.isatty()


def painted(text: str, colour: str, stream: TextIO | None) -> str:
    """The text in a colour, as it is where the stream shows none."""
    return f"\x1b[{colour}m{text}\x1b[0m" if shows_colour(stream) else text


def plan_painted(text: str, stream: TextIO | None) -> str:
    """The text of a plan, in which the numbers of experts and the rule that is taken stand out."""
    if not shows_colour(stream):
        return text
    text = _COUNT.sub(lambda line: painted(line[0], BOLD, stream), text)
    return _CHOSEN.sub(lambda line: painted(line[0], GREEN, stream), text)


def summary_painted(text: str, stream: TextIO | None) -> str:
    """What was done, in which a proof stands out."""
    return _PROVED.sub(lambda word: painted(word[0], GREEN, stream), text)
