"""Several files at once in threads, where the first failure and Ctrl-C stop all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from moescale.errors import InterruptedRun

_R = TypeVar("_R")

WAKE_SECONDS = 0.5

Check = Callable[[], None]
"""Raises once the run is to stop; called between pieces."""


def each(
    names: Sequence[str],
    work: Callable[[str, Check], _R],
    jobs: int,
    cancel: Callable[[], None] = lambda: None,
) -> Mapping[str, _R]:
    """Call `work` for every name, at most `jobs` at once.

    Args:
        names: what to work on.
        work: gets a name and what it has to call between pieces.
        jobs: threads.
        cancel: wakes up threads that wait for something outside.

    Raises:
        Exception: the one that ended the run, not those of the threads that it stopped.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise InterruptedRun("stopped")

    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="moescale") as pool:
        futures: dict[str, Future[_R]] = {}
        finished = False
        try:
            for name in names:
                futures[name] = pool.submit(work, name, check)
            _wait(futures.values())
            finished = all(future.done() for future in futures.values())
        finally:  # Ctrl-C arrives here too: what runs stops at its next piece
            pool.shutdown(wait=False, cancel_futures=True)
            if not finished:
                stop.set()
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
