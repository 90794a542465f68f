"""Several files at once: results, the first failure, and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import pytest
from support.properties import MemorySource

from moescale.conversion import executor
from moescale.conversion.executor import JobResult, Monitor, Pool, run_jobs
from moescale.errors import InterruptedRun
from moescale.storage.base import Source

_R = TypeVar("_R")


@dataclass(frozen=True)
class Call(Generic[_R]):
    """A job that calls a function with its name."""

    name: str
    work: Callable[[str, Callable[[], None]], _R]
    size: int = 0
    source: Source = field(default_factory=lambda: MemorySource({}))

    def __call__(self, monitor: Monitor) -> _R:
        """Call it."""
        return self.work(self.name, monitor.raise_if_cancelled)


def call(
    names: Sequence[str], work: Callable[[str, Callable[[], None]], _R], limit: int
) -> dict[str, _R]:
    """Call a function for every name, at most `limit` at once."""

    def keep(name: str, done: JobResult[_R]) -> _R:
        return done.result

    return run_jobs([Call(name, work) for name in names], limit, keep, lambda *_: None, Pool())


@pytest.fixture
def _raising() -> Iterator[None]:
    """Let SIGUSR1 do what Ctrl-C does, blocked in the main thread."""
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("_raising")
def test_a_signal_that_another_thread_took_ends_the_run() -> None:
    """The system may deliver a signal to any thread; the waiting thread still notices it."""
    stopped = threading.Event()

    def work(name: str, check: Callable[[], None]) -> None:
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            time.sleep(0.01)
            try:
                check()
            except InterruptedRun:
                stopped.set()
                raise

    with pytest.raises(KeyboardInterrupt):
        call(["a"], work, 1)
    assert stopped.wait(120)


def test_the_first_failure_stops_the_others() -> None:
    """Running jobs end at their next piece, waiting ones never start; the failure is raised."""
    started: list[str] = []
    running = threading.Event()

    def work(name: str, check: Callable[[], None]) -> str:
        started.append(name)
        if name == "bad":
            running.wait(120)
            raise ZeroDivisionError
        running.set()
        while True:
            check()
            time.sleep(0.01)

    with pytest.raises(ZeroDivisionError):
        call(["long", "bad", "never"], work, 2)
    assert sorted(started) == ["bad", "long"]


def test_a_thread_that_has_failed_begins_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed thread starts no other job, even before the main thread notices the failure."""
    monkeypatch.setattr(executor, "wait", lambda left, *_: wait(left))
    started: list[str] = []

    def work(name: str, check: Callable[[], None]) -> None:
        started.append(name)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(["bad", "next", "last"], work, 1)
    assert started == ["bad"]


def test_results_are_by_name() -> None:
    """Every name gets the result of its call."""
    assert call(["a", "b", "c"], lambda name, _: name * 2, 2) == {"a": "aa", "b": "bb", "c": "cc"}
    assert call([], lambda name, _: name, 2) == {}


@pytest.mark.parametrize(
    ("cores", "jobs", "threads"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (16, 1, 6), (16, 3, 2), (16, 4, 1), (64, 40, 1)],
)
def test_a_few_jobs_share_all_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int, threads: int
) -> None:
    """Idle cores edit, up to six at a time: each thread takes memory."""
    monkeypatch.setattr(executor, "cores", lambda: cores)
    assert Pool().editing_threads(jobs) == threads
