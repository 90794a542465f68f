"""Several files at once, where the first failure and Ctrl-C stop all of them.

A file is a `Task`, which says all that is to be done to it; a `Crew` does it, here in the thread
that asks or on another machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from moescale.checkpoint.rewrite import Segment
from moescale.errors import InterruptedRun
from moescale.repos.base import Bench, Progress, Source

_R = TypeVar("_R")
_P = TypeVar("_P", Bench, Source)

WAKE_SECONDS = 0.5

Check = Callable[[], None]
"""Raises once the run is to stop; called between pieces."""

Count = Callable[[int], None]
"""Called with the number of bytes done since the last call, from any thread."""


@dataclass(frozen=True, slots=True)
class Task:
    """One large file: its name, its new size in bytes, and how it is put together.

    With `digest` its SHA-256 is wanted.
    """

    name: str
    size: int
    digest: bool
    segments: tuple[Segment, ...]


Work = Callable[[Task, Source, _P, Check, Count], _R]
"""What is done to a file: from a source, on a bench or against another source."""


class Crew(Protocol):
    """Who does the work. What it is given may be sent to another machine."""

    def check(self, *places: Bench | Source) -> None:
        """Refuse places that not all can reach."""

    def do(
        self,
        work: Work[_P, _R],
        task: Task,
        source: Source,
        place: _P,
        check: Check,
        progress: Progress,
    ) -> _R:
        """Do one task and wait for it."""

    def cancel(self) -> None:
        """Stop what is being done elsewhere."""


class Here:
    """The crew of one: the thread that asks does the work."""

    def check(self, *places: Bench | Source) -> None:
        """What is here can be reached."""

    def do(
        self,
        work: Work[_P, _R],
        task: Task,
        source: Source,
        place: _P,
        check: Check,
        progress: Progress,
    ) -> _R:
        """Do one task."""
        return work(task, source, place, check, lambda size: progress(task.name, size))

    def cancel(self) -> None:
        """Nothing is done elsewhere."""


def each(
    names: Sequence[str],
    work: Callable[[str, Check], _R],
    jobs: int,
    *cancels: Callable[[], None],
) -> Mapping[str, _R]:
    """Call `work` for every name, at most `jobs` at once.

    Args:
        names: what to work on.
        work: gets a name and what it has to call between pieces.
        jobs: threads.
        cancels: wake up threads that wait for something outside.

    Raises:
        Exception: the one that ended the run, not those of the threads that it stopped.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise InterruptedRun("stopped")

    def attempt(name: str) -> _R:
        check()
        try:
            return work(name, check)
        except BaseException:
            stop.set()  # here: until the main thread wakes up, this one would begin the next
            raise

    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="moescale") as pool:
        futures: dict[str, Future[_R]] = {}
        finished = False
        try:
            for name in names:
                futures[name] = pool.submit(attempt, name)
            _wait(futures.values())
            finished = all(future.done() for future in futures.values())
        finally:  # Ctrl-C arrives here too: what runs stops at its next piece
            pool.shutdown(wait=False, cancel_futures=True)
            if not finished:
                stop.set()
                for cancel in cancels:
                    cancel()
    errors = [f.exception() for f in futures.values() if not f.cancelled()]
    real = [error for error in errors if error is not None]
    real.sort(key=lambda error: isinstance(error, InterruptedRun))
    if real:
        raise real[0]
    return {name: future.result() for name, future in futures.items()}


def _wait(futures: Iterable[Future[Any]]) -> None:
    """Wait until all are done, or one has failed.

    It wakes up now and then: a signal that the system hands to another thread is noted there, but
    Python runs its handler in this one, and does not wake it up.
    """
    left = set(futures)
    while left:
        done, left = wait(left, WAKE_SECONDS, FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            return
