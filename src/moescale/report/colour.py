"""Bold and colour, if the terminal shows them and the user does not disable them."""

from __future__ import annotations

import os
import re
from typing import TextIO

BOLD, RED, GREEN, YELLOW = "1", "1;31", "1;32", "1;33"
"""Parameters of the escape sequences."""

_CHOSEN = re.compile(r"^->  .*$", re.MULTILINE)
_PROVED = re.compile(r"^Verified", re.MULTILINE)
_COUNT = re.compile(r"^experts per token .*$", re.MULTILINE)


def shows_colour(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal with colours; honours https://no-color.org."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if os.name == "nt" and not os.environ.keys() & {"WT_SESSION", "ANSICON", "TERM"}:
        return False
    return stream.isatty()


def painted(text: str, colour: str, stream: TextIO | None) -> str:
    """The text in a colour; unchanged if the stream shows no colours."""
    return f"\x1b[{colour}m{text}\x1b[0m" if shows_colour(stream) else text


def plan_painted(text: str, stream: TextIO | None) -> str:
    """The text of a plan, with the numbers of experts and the taken rule emphasised."""
    if not shows_colour(stream):
        return text
    text = _COUNT.sub(lambda line: painted(line[0], BOLD, stream), text)
    return _CHOSEN.sub(lambda line: painted(line[0], GREEN, stream), text)


def summary_painted(text: str, stream: TextIO | None) -> str:
    """The summary of a run, with its verification emphasised."""
    return _PROVED.sub(lambda word: painted(word[0], GREEN, stream), text)
