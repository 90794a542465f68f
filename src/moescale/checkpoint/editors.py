"""Threads that edit parts of a tensor while other parts are read and written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_R = TypeVar("_R")


class Editors(ThreadPoolExecutor):
    """Threads that run calls in order; leaving the `with` block waits for their end.

    Attributes:
        ahead: how many further calls run while the result of one is in use.
    """

    def __init__(self, threads: int) -> None:
        """The threads start when they are needed."""
        super().__init__(threads, "moescale-edit")
        self.ahead = threads

    def run(self, calls: Iterable[Callable[[], _R]]) -> Iterator[_R]:
        """The results in order; a call is only taken from the iterable when its turn comes."""
        running, left = deque[Future[_R]](), iter(calls)
        while (call := _next(left, running)) is not None:
            running.append(self.submit(call))
            if len(running) > self.ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _next(calls: Iterator[_R], running: Iterable[Future[Any]]) -> _R | None:
    """The next call; if there is an error, that of an earlier call comes first."""
    try:
        return next(calls, None)
    except Exception:
        for earlier in running:
            earlier.result()
        raise
