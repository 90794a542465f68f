"""For programs that stand still until they are interrupted, so that no test guesses how long."""

from __future__ import annotations

import threading

from moescale import interrupts


def told() -> threading.Event:
    """What is set when the first signal has come; call it before the command listens."""
    event, interrupt = threading.Event(), interrupts._interrupt

    def heard(*arguments: object) -> None:
        event.set()
        interrupt(*arguments)

    interrupts._interrupt = heard  # type: ignore[assignment]
    return event
