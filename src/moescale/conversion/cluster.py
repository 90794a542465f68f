"""Shards on the workers of a Dask cluster, through its `concurrent.futures` interface.

A worker gets the job of one file, with the places that it goes from and to, and gives back what it
made. The machine that runs the command alone gives files their names. No token is ever sent: each
worker uses its own. A file whose worker dies is done again elsewhere, by Dask.
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

from moescale.conversion.executor import Done, Job, Monitor, Pool
from moescale.errors import (
    InterruptedRun,
    MoescaleError,
    RewriteError,
    TemporaryError,
    UsageError,
)
from moescale.storage.base import Progress, Source, Writers
from moescale.version import __version__

_R = TypeVar("_R")

CONNECT_SECONDS = 20.0
"""How long the scheduler, and then a first worker, may take to appear."""

LONELY_SECONDS = 60.0
"""How long a run waits for another worker when there is none left."""

LOOK_SECONDS, ASK_SECONDS = 1.0, 5.0
"""How often a worker looks whether its work is still wanted, and a run who is there."""

REPORT_BYTES = 64 << 20
"""How much a worker does before it says so: a terabyte is 16,000 messages."""

_RESUMES = "The same command resumes."


# On the machine that runs the command ---------------------------------------------------------


@contextmanager
def connect(place: str) -> Iterator[Workers]:
    """The workers of a scheduler, all of which have this very version of moescale.

    Args:
        place: an address like ``tcp://host:8786``, or the path of a scheduler file.

    Raises:
        UsageError: it is neither, or a machine has another version.
        TemporaryError: nobody answers.
    """
    address = _address(place)
    with _quiet_client():
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="moescale")
        except OSError as error:  # a timeout is one, too
            raise TemporaryError(
                f"--dask {place}: no scheduler answers: {_line(error)}",
                hint="Check the address, or start `dask scheduler` there.",
            ) from None
        except ValueError as error:
            raise UsageError(f"--dask {place}: {_line(error)}") from None
        try:
            _wait_for_worker(client, place)
            _check_versions(client)
            yield Workers(client, place)
        finally:
            client.close(timeout=2)


def _address(place: str) -> str:
    if "://" in place:
        return place
    try:
        return str(json.loads(Path(place).read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"--dask {place}: is neither an address like tcp://host:8786 nor a scheduler file"
        ) from None


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Let a lost connection be one error of ours instead of pages of log."""
    loggers = [logging.getLogger(f"distributed.{name}") for name in ("client", "comm", "core")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _wait_for_worker(client: Any, place: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise TemporaryError(
            f"--dask {place}: the scheduler has no worker", hint="Start one with `dask worker`."
        ) from None


def _check_versions(client: Any) -> None:
    """Ask everybody, through a function that is there without moescale, too."""
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
            raise _silent(who, version)
        if version != __version__:
            raise UsageError(f"--dask: {who} has moescale {version}; this is {__version__}")


def _silent(who: str, error: Exception) -> TemporaryError:
    return TemporaryError(f"--dask: {who} does not answer: {_line(error)}", hint=_RESUMES)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Workers(Pool):
    """A pool of other machines."""

    def __init__(self, client: Any, place: str) -> None:
        """`client` is connected to the scheduler at `place`."""
        self._client = client
        self._place = place
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Progress, Job[Any], int]] = {}
        self._asked = self._seen = time.monotonic()  # a worker was seen
        self._topic = f"moescale-{secrets.token_hex(8)}"
        client.subscribe_topic(self._topic, lambda event: self._arrived(*event[1]))

    def size(self) -> int:
        """Files that the workers can do at once."""
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def check_reachable(self, *storages: Writers | Source) -> None:
        """Let every worker look at the places.

        Raises:
            MoescaleError: what the first one says that cannot reach them.
        """
        answers = self._client.run(check_storages, storages, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, MoescaleError):
                raise answer
            if isinstance(answer, Exception):
                raise _silent(f"worker {address}", answer)

    def executor(self, jobs: int) -> Executor:
        """That of the client; it is given no more than `jobs` at once."""
        executor: Executor = self._client.get_executor(pure=False)
        return executor

    def monitor(self, job: Job[Any], progress: Progress) -> Monitor:
        """What the worker says is heard under a topic of this run."""
        with self._lock:
            self._running[job.name] = progress, job, 0
        return _OnWorker(__version__, self._topic, job.name)

    def result(self, job: Job[_R], future: Future[Done[_R]]) -> Done[_R]:
        """What a worker gives back.

        Raises:
            TemporaryError: the workers that had it died, or nobody is left.
            MoescaleError: what the worker says.
        """
        try:
            done = future.result()
        except CancelledError:
            raise self._lost() from None
        except KilledWorker as error:
            raise TemporaryError(
                f"{job.name}: {error.allowed_failures + 1} workers died while they had it, the"
                f" last of them {error.last_worker.address}",
                hint=f"Look into its log; has it enough memory? {_RESUMES}",
            ) from None
        except ImportError as error:  # a worker that came later
            raise UsageError(f"--dask: a worker has another moescale: {_line(error)}") from None
        self._arrived(job.name, job.size)
        with self._lock:
            del self._running[job.name]
        return done

    def watch(self) -> None:
        """Give up when the scheduler has left, or no worker has been there for long."""
        if self._client.status in ("closing", "closed"):
            raise self._lost()
        if time.monotonic() - self._asked < ASK_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            if self._client.nthreads():
                self._seen = self._asked
        except OSError:  # the client notices by itself, and tries to connect again
            return
        if self._asked - self._seen > LONELY_SECONDS:
            raise TemporaryError(
                f"--dask {self._place}: no worker is left", hint=f"Start some. {_RESUMES}"
            )

    def _lost(self) -> TemporaryError:
        return TemporaryError(f"--dask {self._place}: the scheduler is lost", hint=_RESUMES)

    def _arrived(self, name: str, position: int) -> None:
        """Pass on how far a file is; a second attempt counts from where the first one was."""
        with self._lock:
            if name not in self._running:
                return
            progress, job, before = self._running[name]
            self._running[name] = progress, job, max(before, position)
        if position > before:
            progress(name, position - before)

    def stop(self, executor: Executor) -> None:
        """Let the workers stop, and wait for nobody."""
        executor.shutdown(wait=False)


# On a worker ----------------------------------------------------------------------------------


async def check_storages(storages: tuple[Writers | Source, ...]) -> None:
    """Look whether this machine can reach the places; in a thread, so that the worker lives on."""

    def check() -> None:
        for storage in storages:
            storage.check_reachable()

    await asyncio.to_thread(_from_here, check)


def _from_here(call: Callable[[], _R]) -> _R:
    """Call it, and let an error say on which machine it was.

    What is no error of ours is made one, without a trace of where it came from: with that, not
    all errors can be sent, and the run would wait for ever.
    """
    where = f"(worker on {socket.gethostname()})"
    try:
        return call()
    except MoescaleError as error:
        told = type(error)(f"{error.message} {where}", hint=error.hint)
    except Exception as error:
        logging.getLogger(__name__).exception("a job failed")
        told = RewriteError(
            f"{type(error).__name__}: {_line(error)} {where}", hint="The worker's log says more."
        )
    raise told


class _OnWorker:
    """Says how far a worker is, and stops it when nobody waits for the result any more."""

    def __init__(self, version: str, topic: str, name: str) -> None:
        """It is made where the run is, and sent with the job."""
        self._version, self._topic, self._name = version, topic, name
        self._position = self._said = 0
        self._looked = 0.0

    def run(self, call: Callable[[], _R]) -> _R:
        """Do a job on this worker.

        Raises:
            UsageError: the worker, which came after the others were asked, has another version.
        """
        self._worker, self._lock = get_worker(), threading.Lock()
        self._key = self._worker.get_current_task()

        def checked() -> _R:
            if self._version != __version__:
                raise UsageError(
                    f"--dask: a worker has moescale {__version__}, not {self._version}"
                )
            return call()

        return _from_here(checked)

    def count(self, size: int) -> None:
        """Say how far it is, now and then."""
        with self._lock:
            self._position += size
            if self._position - self._said < REPORT_BYTES:
                return
            said = self._said = self._position
        self._worker.log_event(self._topic, [self._name, said])

    def raise_if_cancelled(self) -> None:
        """Stop when the job was cancelled, or whoever wanted it is gone."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        state = self._worker.state.tasks.get(self._key)
        if state is None or state.state == "cancelled":
            raise InterruptedRun("stopped")
