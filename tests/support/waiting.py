"""Waits for a condition, for instance in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

DEADLINE = 120.0
"""Seconds; only a condition that never comes true takes that long."""


def until(what: Callable[[], Any]) -> Any:
    """Wait until a condition is true; return its value."""
    end = time.monotonic() + DEADLINE
    while not (value := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value
