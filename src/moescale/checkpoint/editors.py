"""Threads that edit parts of a tensor while other parts are read and written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

_R = TypeVar("_R")


class Editors:
    """Threads that run calls in order.

    Attributes:
        ahead: how many further calls run while the result of one is in use.
    """

    def __init__(self, threads: int) -> None:
        """The threads start when they are needed."""
        self.ahead = threads
        self._executor = ThreadPoolExecutor(threads, "moescale-edit")

    def run(self, calls: Iterable[Callable[[], _R]]) -> Iterator[_R]:
        """The results in order; a call is only taken from the iterable when its turn comes."""
        running = deque[Future[_R]]()
        for call in calls:
            running.append(self._executor.submit(call))
            if len(running) > self.ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def __enter__(self) -> Editors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the end of the threads."""
        self._executor.shutdown(cancel_futures=True)
