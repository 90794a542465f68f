"""Work on large files: one picklable job a file, done by one executor.

The executor is one of threads here, or that of a Dask cluster. The first failure and Ctrl-C stop
all that is being done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from moescale.errors import InterruptedRun
from moescale.storage.base import Progress, Source, Writers

_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)
_K = TypeVar("_K")

WAKE_SECONDS = 0.5


class Monitor(Protocol):
    """What a job tells while it runs, and how it is stopped."""

    def raise_if_cancelled(self) -> None:
        """Raise once the run is to stop; called between pieces."""

    def count(self, size: int) -> None:
        """Take the number of bytes done since the last call, from any thread."""

    def run(self, call: Callable[[], _R]) -> _R:
        """Call what does the job."""


class Job(Protocol[_R_co]):
    """All that is to be done to one large file; it can be sent to another machine."""

    @property
    def name(self) -> str:
        """The file."""

    @property
    def size(self) -> int:
        """Its new size in bytes."""

    @property
    def source(self) -> Source:
        """Where this file, and no other, is read."""

    def __call__(self, monitor: Monitor) -> _R_co:
        """Do it."""


@dataclass(frozen=True, slots=True)
class Done(Generic[_R]):
    """What came of a job; `received` are bytes that it read over the network."""

    result: _R
    received: int


def do(job: Job[_R], monitor: Monitor) -> Done[_R]:
    """Do one job; what every executor calls, on whatever machine."""
    return monitor.run(lambda: Done(job(monitor), job.source.received))


@dataclass(frozen=True, slots=True)
class _Here:
    """The monitor of a thread of this process."""

    stop: threading.Event
    count: Callable[[int], None]

    def raise_if_cancelled(self) -> None:
        if self.stop.is_set():
            raise InterruptedRun("stopped")

    def run(self, call: Callable[[], _R]) -> _R:
        return call()


class Pool:
    """Threads of this process; a cluster is another pool."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def check_reachable(self, *storages: Writers | Source) -> None:
        """Refuse places that not all can reach."""

    def executor(self, jobs: int) -> Executor:
        """What does at most `jobs` jobs at once."""
        return ThreadPoolExecutor(jobs, "moescale")

    def monitor(self, job: Job[Any], progress: Progress) -> Monitor:
        """The monitor that goes with a job."""
        return _Here(self._stop, partial(progress, job.name))

    def result(self, job: Job[_R], future: Future[Done[_R]]) -> Done[_R]:
        """What came of a job, or an error of ours that says what went wrong."""
        return future.result()

    def watch(self) -> None:
        """Raise when nobody is left who could do a job; called now and then."""

    def stop(self, executor: Executor) -> None:
        """Stop what is being done, and wait until nothing is."""
        self._stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


def each(
    jobs: Iterable[Job[_R]],
    limit: int,
    keep: Callable[[str, Done[_R]], _K],
    progress: Progress,
    pool: Pool,
    cancel: Callable[[], None] = lambda: None,
) -> dict[str, _K]:
    """Do every job, and keep what came of it, one after the other.

    Args:
        jobs: what is to be done; each is taken when its turn comes.
        limit: jobs that are done at once.
        keep: gets a file's name and what came of its job; its results are returned by name.
        progress: is told of every piece.
        pool: who does the jobs.
        cancel: wakes up threads that wait for something outside.

    Raises:
        Exception: the first one, of a job or of `keep`. What was done by then is kept.
    """
    waiting, results = iter(jobs), dict[str, _K]()
    running: dict[Future[Any], Job[_R]] = {}
    keeping: dict[Future[Any], str] = {}
    with ThreadPoolExecutor(1, "moescale-keep") as keeper, pool.executor(limit) as executor:
        try:
            while True:
                for job in islice(waiting, limit - len(running)):
                    running[executor.submit(do, job, pool.monitor(job, progress))] = job
                if not running and not keeping:
                    return results
                # It wakes up now and then: a signal that the system hands to another thread is
                # noted there, but Python runs its handler in this one, and does not wake it up.
                done, _ = wait({*running, *keeping}, WAKE_SECONDS, FIRST_COMPLETED)
                for future in [future for future in running if _succeeded(future)]:
                    job = running.pop(future)
                    kept = keeper.submit(keep, job.name, pool.result(job, future))
                    keeping[kept] = job.name
                for failed in done & running.keys():
                    pool.result(running.pop(failed), failed)
                for kept in done & keeping.keys():
                    results[keeping.pop(kept)] = kept.result()
                pool.watch()
        except BaseException:  # Ctrl-C, too: what runs stops at its next piece
            cancel()
            pool.stop(executor)
            for future, job in running.items():
                if _succeeded(future):
                    keeper.submit(keep, job.name, future.result())
            raise


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
