"""Runs one picklable job per large file, on one executor.

The executor has threads of this process, or is that of a Dask cluster. The first failure stops all
jobs, and so does Ctrl-C.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from moescale.errors import InterruptedRun
from moescale.storage.base import Destination, Progress, Source, Writers, ignore

_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)
_K = TypeVar("_K")

WAKE_SECONDS = 0.5

_EDITING_THREADS = 6
"""The largest number in all jobs. Each takes 4 to 6 MiB of memory."""


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Monitor(Protocol):
    """Takes a job's progress, and can stop it."""

    def raise_if_cancelled(self) -> None:
        """Raise if the run has been stopped; called between pieces."""

    def count(self, size: int) -> None:
        """Add the number of bytes done since the last call; called from any thread."""

    def run(self, call: Callable[[], _R]) -> _R:
        """Run the job."""


class Job(Protocol[_R_co]):
    """The complete work on one large file; it can be sent to another machine."""

    @property
    def name(self) -> str:
        """The name of the file."""

    @property
    def size(self) -> int:
        """The size of the new file, in bytes."""

    @property
    def source(self) -> Source:
        """A source limited to this file."""

    def __call__(self, monitor: Monitor) -> _R_co:
        """Do the work."""


@dataclass(frozen=True, slots=True)
class JobResult(Generic[_R]):
    """The result of a job.

    Attributes:
        result: the return value of the job.
        received: bytes that it received over the network.
    """

    result: _R
    received: int


def run_job(job: Job[_R], monitor: Monitor) -> JobResult[_R]:
    """Do one job; every executor calls this, on any machine."""
    return monitor.run(lambda: JobResult(job(monitor), job.source.received))


@dataclass(frozen=True, slots=True)
class _ThreadMonitor:
    """The monitor of a job in a thread of this process."""

    stop: threading.Event
    count: Callable[[int], None]

    def raise_if_cancelled(self) -> None:
        if self.stop.is_set():
            raise InterruptedRun("stopped")

    def run(self, call: Callable[[], _R]) -> _R:
        return call()


class Pool:
    """A pool of threads of this process; a cluster is another kind of pool."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def default_jobs(self, destination: Destination) -> int:
        """How many files are written in parallel if the user does not say."""
        return min(destination.default_jobs, cores())

    def editing_threads(self, jobs: int) -> int:
        """How many threads edit the tensors of each job, so that a few jobs use all cores."""
        return max(1, min(cores(), _EDITING_THREADS) // max(1, jobs))

    def prepare(self, source: Source, destination: Destination) -> None:
        """Let every worker reach the source and the destination; threads always do."""

    def check_reachable(self, *storages: Writers | Source) -> None:
        """Check that every worker reaches the sources and writers; threads always do."""

    def executor(self, jobs: int) -> Executor:
        """An executor for at most `jobs` jobs in parallel."""
        return ThreadPoolExecutor(jobs, "moescale")

    def monitor(self, job: Job[Any], progress: Progress) -> Monitor:
        """The monitor of a job."""
        return _ThreadMonitor(self._stop, partial(progress, job.name))

    def result(self, job: Job[_R], future: Future[JobResult[_R]]) -> JobResult[_R]:
        """The result of a job; raises a `MoescaleError` if it failed."""
        return future.result()

    def check_alive(self) -> None:
        """Raise if no worker is left; called periodically."""

    def stop(self, executor: Executor) -> None:
        """Stop the running jobs, and wait for their end."""
        self._stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


def run_jobs(
    jobs: Iterable[Job[_R]],
    limit: int,
    keep: Callable[[str, JobResult[_R]], _K],
    progress: Progress,
    pool: Pool,
    cancel: Callable[[], None] = ignore,
) -> dict[str, _K]:
    """Run all jobs in parallel, and process their results one after the other.

    Args:
        jobs: the jobs; each is taken from the iterable when its turn comes.
        limit: how many run in parallel.
        keep: processes the name of a file and the result of its job; its return values are
            returned by name.
        progress: called for every piece.
        pool: runs the jobs.
        cancel: wakes up threads that wait for a storage.

    Raises:
        Exception: the first one of a job or of `keep`, after the results so far were processed.
    """
    waiting, results = iter(jobs), dict[str, _K]()
    running: dict[Future[Any], Job[_R]] = {}
    keeping: dict[Future[Any], str] = {}
    with ThreadPoolExecutor(1, "moescale-keep") as keeper, pool.executor(limit) as executor:
        try:
            while True:
                for job in islice(waiting, limit - len(running)):
                    running[executor.submit(run_job, job, pool.monitor(job, progress))] = job
                if not running and not keeping:
                    return results
                # The timeout is for signals: if the system delivers one to another thread, Python
                # runs its handler in this thread, but does not wake it up.
                done, _ = wait({*running, *keeping}, WAKE_SECONDS, FIRST_COMPLETED)
                for future in [future for future in running if _succeeded(future)]:
                    job = running.pop(future)
                    kept = keeper.submit(keep, job.name, pool.result(job, future))
                    keeping[kept] = job.name
                for failed in done & running.keys():
                    pool.result(running.pop(failed), failed)
                for kept in done & keeping.keys():
                    results[keeping.pop(kept)] = kept.result()
                pool.check_alive()
        except BaseException:  # also Ctrl-C; running jobs stop at their next piece
            cancel()
            pool.stop(executor)
            for future, job in running.items():
                if _succeeded(future):
                    keeper.submit(keep, job.name, future.result())
            raise


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
