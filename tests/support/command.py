"""Runs the command in the process of the tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Done:
    """The output of a run of the command, and its exit code."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process, and restore the signal handlers afterwards."""
    from moescale import cli  # imported here, since the tests of imports come first

    monkeypatch.setattr(sys, "argv", ["moescale", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
