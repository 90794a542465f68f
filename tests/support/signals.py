"""For programs that wait for a signal, so that no test has to guess the time."""

from __future__ import annotations

import contextlib
import threading

from moescale import interrupts


class Told:
    """A flag for the first signal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Set it, in a handler. An Event would not do: the next signal could find its lock held."""
        with contextlib.suppress(RuntimeError):  # it was already released
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until it is set."""
        self._lock.acquire(timeout=seconds)


def told() -> Told:
    """A flag for the first signal; call this before the command installs its handlers."""
    event, interrupt = Told(), interrupts._interrupt

    def heard(*arguments: object) -> None:
        event.set()
        interrupt(*arguments)

    interrupts._interrupt = heard  # type: ignore[assignment]
    return event
