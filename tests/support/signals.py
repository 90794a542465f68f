"""For programs that stand still until they are interrupted, so that no test guesses how long."""

from __future__ import annotations

import contextlib
import threading

from moescale import interrupts


class Told:
    """Whether the first signal has come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """For a handler, which the next signal may interrupt: an Event's lock would be held."""
        with contextlib.suppress(RuntimeError):  # it was released before
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Stand still until then."""
        self._lock.acquire(timeout=seconds)


def told() -> Told:
    """What is set when the first signal has come; call it before the command listens."""
    event, interrupt = Told(), interrupts._interrupt

    def heard(*arguments: object) -> None:
        event.set()
        interrupt(*arguments)

    interrupts._interrupt = heard  # type: ignore[assignment]
    return event
