"""Runs jobs on the workers of a Dask cluster, through its `concurrent.futures` interface.

A worker gets the job of one file, with its source and its writers, and returns a pending file. Only
the machine that runs the command gives files their names. No token is ever sent: each worker uses
its own. If a worker dies, Dask gives its file to another one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pkgutil
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from distributed import Client, KilledWorker, get_worker

from moescale.conversion.executor import Job, JobResult, Monitor, Pool
from moescale.errors import (
    InterruptedRun,
    MoescaleError,
    RewriteError,
    TemporaryError,
    UsageError,
)
from moescale.storage.base import Destination, Progress, Source, Writers
from moescale.version import __version__

_R = TypeVar("_R")

CONNECT_SECONDS = 20.0
"""How long to wait for the scheduler, and then for a first worker."""

NO_WORKER_SECONDS = 60.0
"""How long to wait for a new worker when none is left."""

CANCEL_CHECK_SECONDS, WORKER_CHECK_SECONDS = 1.0, 5.0
"""How often a worker checks for cancellation, and a run for living workers."""

REPORT_BYTES = 64 << 20
"""How many bytes a worker does between two reports: 16,000 messages for a terabyte."""

_RESUMES = "The same command resumes."


# On the machine that runs the command ---------------------------------------------------------


@contextmanager
def connect(scheduler: str) -> Iterator[Workers]:
    """The workers of a scheduler, which must all have this version of moescale.

    Args:
        scheduler: an address like ``tcp://host:8786``, or the path of a scheduler file.

    Raises:
        UsageError: it is neither of these, or a machine has another version.
        TemporaryError: the scheduler does not answer, or has no worker.
    """
    address = _address(scheduler)
    with _quiet_client():
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="moescale")
        except OSError as error:  # includes timeouts
            raise TemporaryError(
                f"--dask {scheduler}: no scheduler answers: {_first_line(error)}",
                hint="Check the address, or start `dask scheduler` there.",
            ) from None
        except ValueError as error:
            raise UsageError(f"--dask {scheduler}: {_first_line(error)}") from None
        try:
            _wait_for_worker(client, scheduler)
            _check_versions(client)
            yield Workers(client, scheduler)
        finally:
            client.close(timeout=2)


def _address(scheduler: str) -> str:
    if "://" in scheduler:
        return scheduler
    try:
        return str(json.loads(Path(scheduler).read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"--dask {scheduler}: is neither an address like tcp://host:8786 nor a scheduler file"
        ) from None


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's log of a lost connection, which moescale reports as one error."""
    loggers = [logging.getLogger(f"distributed.{name}") for name in ("client", "comm", "core")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _wait_for_worker(client: Any, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise TemporaryError(
            f"--dask {scheduler}: the scheduler has no worker", hint="Start one with `dask worker`."
        ) from None


def _check_versions(client: Any) -> None:
    """Ask all machines, with a function that they have even without moescale."""
    ask, name = pkgutil.resolve_name, "moescale.version:__version__"
    found = client.run(ask, name, on_error="return")
    found = {f"worker {address}": version for address, version in found.items()}
    try:
        found["the scheduler"] = client.run_on_scheduler(ask, name)
    except Exception as error:
        found["the scheduler"] = error
    for who, version in found.items():
        if isinstance(version, ImportError):
            raise UsageError(f"--dask: {who} has no moescale; this is moescale {__version__}")
        if isinstance(version, Exception):
            raise _no_answer(who, version)
        if version != __version__:
            raise UsageError(f"--dask: {who} has moescale {version}; this is {__version__}")


def _no_answer(who: str, error: Exception) -> TemporaryError:
    return TemporaryError(f"--dask: {who} does not answer: {_first_line(error)}", hint=_RESUMES)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Workers(Pool):
    """The pool of a cluster's workers."""

    def __init__(self, client: Any, scheduler: str) -> None:
        """`client` is connected to `scheduler`."""
        self._client = client
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Progress, Job[Any], int]] = {}
        self._checked = self._seen = time.monotonic()  # the last check, and the last living worker
        self._topic = f"moescale-{secrets.token_hex(8)}"
        client.subscribe_topic(self._topic, lambda event: self._on_position(*event[1]))

    def default_jobs(self, destination: Destination) -> int:
        """The number of threads of all workers."""
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def editing_threads(self, jobs: int) -> int:
        """One: each thread of a worker has a job of its own."""
        return 1

    def prepare(self, source: Source, destination: Destination) -> None:
        """Let every worker reach the source and the destination.

        Raises:
            MoescaleError: the error of the first worker that does not reach them.
        """
        destination.prepare_for_workers()
        self.check_reachable(source, destination.writers)

    def check_reachable(self, *storages: Writers | Source) -> None:
        """Let every worker check the sources and writers.

        Raises:
            MoescaleError: the error of the first worker that does not reach them.
        """
        answers = self._client.run(check_storages, storages, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, MoescaleError):
                raise answer
            if isinstance(answer, Exception):
                raise _no_answer(f"worker {address}", answer)

    def executor(self, jobs: int) -> Executor:
        """The executor of the client; `run_jobs` limits the number of jobs."""
        executor: Executor = self._client.get_executor(pure=False)
        return executor

    def monitor(self, job: Job[Any], progress: Progress) -> Monitor:
        """The monitor of a job; its worker reports under a topic of this run."""
        with self._lock:
            self._running[job.name] = progress, job, 0
        return _WorkerMonitor(__version__, self._topic, job.name)

    def result(self, job: Job[_R], future: Future[JobResult[_R]]) -> JobResult[_R]:
        """The result of a job.

        Raises:
            TemporaryError: the workers that had the job died, or the scheduler is lost.
            MoescaleError: the error of the job.
        """
        try:
            done = future.result()
        except CancelledError:
            raise self._lost() from None
        except KilledWorker as error:
            raise TemporaryError(
                f"{job.name}: {error.allowed_failures + 1} workers died while processing it, last"
                f" {error.last_worker.address}",
                hint=f"Check its log and its memory. {_RESUMES}",
            ) from None
        except ImportError as error:  # a worker that joined after the version check
            why = f"a worker has a different version of moescale: {_first_line(error)}"
            raise UsageError(f"--dask: {why}") from None
        self._on_position(job.name, job.size)
        with self._lock:
            del self._running[job.name]
        return done

    def check_alive(self) -> None:
        """Give up if the scheduler is lost, or if there has been no worker for a while."""
        if self._client.status in ("closing", "closed"):
            raise self._lost()
        if time.monotonic() - self._checked < WORKER_CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        try:
            if self._client.nthreads():
                self._seen = self._checked
        except OSError:  # the client reconnects by itself
            return
        if self._checked - self._seen > NO_WORKER_SECONDS:
            raise TemporaryError(
                f"--dask {self._scheduler}: no worker is left", hint=f"Start some. {_RESUMES}"
            )

    def _lost(self) -> TemporaryError:
        return TemporaryError(f"--dask {self._scheduler}: the scheduler is lost", hint=_RESUMES)

    def _on_position(self, name: str, position: int) -> None:
        """Report the progress of a file; a second attempt counts only what exceeds the first."""
        with self._lock:
            if name not in self._running:
                return
            progress, job, before = self._running[name]
            self._running[name] = progress, job, max(before, position)
        if position > before:
            progress(name, position - before)

    def stop(self, executor: Executor) -> None:
        """Let the workers stop, without waiting for them."""
        executor.shutdown(wait=False)


# On a worker ----------------------------------------------------------------------------------


async def check_storages(storages: tuple[Writers | Source, ...]) -> None:
    """Check that this machine reaches the storages, in a thread so as not to block Dask."""

    def check() -> None:
        for storage in storages:
            storage.check_reachable()

    await asyncio.to_thread(_with_machine_name, check)


def _with_machine_name(call: Callable[[], _R]) -> _R:
    """Call it; an error names this machine.

    Other exceptions become a `MoescaleError` without a cause: some cannot be pickled, and the run
    would wait forever.
    """
    where = f"(worker on {socket.gethostname()})"
    try:
        return call()
    except MoescaleError as error:
        told = type(error)(f"{error.message} {where}", hint=error.hint)
    except Exception as error:
        logging.getLogger(__name__).exception("a job failed")
        told = RewriteError(
            f"{type(error).__name__}: {_first_line(error)} {where}",
            hint="The worker's log says more.",
        )
    raise told


class _WorkerMonitor:
    """Reports a worker's progress, and stops its job if the run no longer waits for the result."""

    def __init__(self, version: str, topic: str, name: str) -> None:
        """Created by the machine that runs the command, and sent with the job."""
        self._version, self._topic, self._name = version, topic, name
        self._position = self._said = 0
        self._looked = 0.0

    def run(self, call: Callable[[], _R]) -> _R:
        """Run a job on this worker.

        Raises:
            UsageError: the worker joined after the version check, and has another version.
        """
        self._worker, self._lock = get_worker(), threading.Lock()
        self._key = self._worker.get_current_task()

        def checked() -> _R:
            if self._version != __version__:
                raise UsageError(
                    f"--dask: a worker has moescale {__version__}, not {self._version}"
                )
            return call()

        return _with_machine_name(checked)

    def count(self, size: int) -> None:
        """Add the bytes, and report now and then."""
        with self._lock:
            self._position += size
            if self._position - self._said < REPORT_BYTES:
                return
            reported = self._said = self._position
        self._worker.log_event(self._topic, [self._name, reported])

    def raise_if_cancelled(self) -> None:
        """Stop if the job was cancelled, or its run has ended."""
        if time.monotonic() - self._looked < CANCEL_CHECK_SECONDS:
            return
        self._looked = time.monotonic()
        state = self._worker.state.tasks.get(self._key)
        if state is None or state.state == "cancelled":
            raise InterruptedRun("stopped")
