"""The command as tests run it in their own process: the fixture ``moescale`` in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """What a run of the command printed, and its exit code."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]
